"""Run lock: one live job per run directory, by kernel lock, lease and fencing token."""
