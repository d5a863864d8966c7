"""Names of a spike's folder and of the files of its bundle."""

from pathlib import Path

SPIKES = "spikes"
"""Folder of the spikes in a run directory."""
EVENT, SEQUENCES, TENSORS = "event.json", "sequences.jsonl", "tensors.jsonl"
BATCHES, STEPS, CONFIG = "batches.jsonl", "steps.jsonl", "config.yaml"


def spike_folder(run: Path, number: int) -> Path:
    """Return the folder of a spike, `spikes/spike_001` for the first."""
    return run / SPIKES / f"spike_{number:03d}"
