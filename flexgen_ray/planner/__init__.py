"""The planner: finds the policy that suits a job, or takes the given one, and predicts its time."""
