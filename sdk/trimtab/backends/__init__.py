"""Where a run can be executed."""
