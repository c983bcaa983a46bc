"""The loop that every kind of training shares: sampler, schedule, checkpoints, logs. Knows no task."""
