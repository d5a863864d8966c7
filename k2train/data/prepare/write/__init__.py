"""Phase three: sorted runs to chunk files."""
