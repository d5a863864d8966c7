"""Inference: text from a checkpoint."""
