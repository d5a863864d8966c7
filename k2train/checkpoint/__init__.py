"""Checkpoints: numbered, sharded, independent of the parallel layout."""
