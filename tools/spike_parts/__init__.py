"""Parts of tools/spike.py that run in a process of their own."""
