"""Document sources and their readers."""
