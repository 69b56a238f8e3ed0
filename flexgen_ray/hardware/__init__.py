"""What is a machine, and what does it give? Memory, rates, presets and short measurements."""
