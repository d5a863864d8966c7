"""Numbered, sharded, layout-free checkpoints."""
