"""What `tools/bench.py cpu` runs side by side, and the runner that lets one at a time do a step."""
