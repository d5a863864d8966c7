"""Merging checkpoints: weighted sums of their weights, as checkpoints of their own."""
