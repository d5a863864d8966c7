"""Fault tests of `tools/fault_run.py`: process server, small run, and rows of faults."""
