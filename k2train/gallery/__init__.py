"""Static pages of what the checkpoints of a run answered."""
