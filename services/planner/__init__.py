"""The planner: decides which workers serve together, and publishes it as the plan."""
