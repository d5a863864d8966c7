"""Evaluation: tasks scored on the checkpoints of a run, item by item."""
