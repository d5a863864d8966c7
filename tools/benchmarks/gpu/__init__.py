"""GPU benchmark (`tools/bench.py gpu`). Only `main` and `report` can be imported without torch."""
