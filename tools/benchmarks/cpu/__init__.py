"""CPU benchmark (`tools/bench.py cpu`): contenders, and the runner that lets them step in turns."""
