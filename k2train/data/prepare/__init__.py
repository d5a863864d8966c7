"""Data preparation: a recipe and its documents become a data folder of chunks."""
