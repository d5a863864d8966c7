"""Verbatim search in the chunks of a data folder, and when a run trained on what was found."""
