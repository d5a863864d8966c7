"""One live job per run directory: kernel lock, lease and fencing token."""
