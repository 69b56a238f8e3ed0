"""Which policy suits a job? Given, planned by linear programming, or filled."""
