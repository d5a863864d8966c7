"""Replay of recorded steps: make a checkpoint again from the one before it, and compare."""
