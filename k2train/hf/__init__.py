"""Hugging Face: folders of transformers' LLaMA from checkpoints, and checkpoints from folders."""
