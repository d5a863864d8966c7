"""What `tools/fault_run.py` is made of: a server of processes to break, a small run to break them in, the rows of the table."""
