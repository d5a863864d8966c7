"""Import and export of K2's own chunk files."""
