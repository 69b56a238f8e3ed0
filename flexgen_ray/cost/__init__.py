"""Durations: the cost of each op, the simulation of a run, and its lower bound."""
