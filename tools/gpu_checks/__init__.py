"""What `tools/gpu_check.py` checks on a device; without torch: `catalogue`, `verdicts`, `page`."""
