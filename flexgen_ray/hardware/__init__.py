"""The machine: its memory, cores and rates, known from presets, files or short measurements."""
