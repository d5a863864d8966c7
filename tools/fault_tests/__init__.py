"""Fault tests of `tools/fault_run.py`: a server of processes, a small run, and the rows of
faults.
"""
