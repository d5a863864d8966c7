"""Chunk files, their order and the loader."""
