"""The schedule: which ops a stage runs, in which order, and which ops wait for which."""
