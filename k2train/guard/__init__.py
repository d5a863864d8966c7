"""What protects a run: locks, signals, finite and spike checks."""
