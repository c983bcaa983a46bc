"""Training: one driver and one loop for every command. Knows no task."""
