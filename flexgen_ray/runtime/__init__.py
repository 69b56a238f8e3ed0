"""How is a schedule executed? Stages, lanes, op handlers and the scheduler of requests."""
