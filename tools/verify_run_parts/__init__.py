"""Parts of tools/verify_run.py."""
