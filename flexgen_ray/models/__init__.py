"""The model families, one short file each, and how their configs and checkpoints are read."""
