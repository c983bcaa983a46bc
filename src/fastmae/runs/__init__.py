"""A run on disk: its folder, its checkpoints, and its encoder loaded back."""
