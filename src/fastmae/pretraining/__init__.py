"""The pre-training stage: plan, step, profile."""
