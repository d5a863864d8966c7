"""Facts and decisions about a run that need no device: standard library only."""
