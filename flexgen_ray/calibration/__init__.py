"""The measurement of this machine's rates, for the planner: `flexgen-ray calibrate`."""
