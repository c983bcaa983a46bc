"""Studies: several runs side by side."""
