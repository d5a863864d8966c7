"""From documents to chunk files."""
