"""Adapters through which other tools use this project."""
