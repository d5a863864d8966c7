"""The planner: what a config or a published row would cost on a cluster, and which layout is best.

- `plan` has the formulas, from numbers alone. This room reads files: clusters, rows, configs.
"""
