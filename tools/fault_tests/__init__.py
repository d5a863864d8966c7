"""What `tools/fault_run.py` is made of: a crew of processes to break, a small run to break them in, the rows of the table."""
