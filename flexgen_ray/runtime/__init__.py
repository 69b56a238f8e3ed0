"""Execution of a schedule: stages, lanes, op handlers and the scheduler of requests."""
