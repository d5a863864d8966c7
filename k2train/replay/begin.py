"""What a replay needs to begin: a start like the run's, on the layout that replays it. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from k2train.config.load import Config
from k2train.data.loss_mask import masked_as_asked
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import apply_events, make_order
from k2train.errors import RunError
from k2train.replay.recorded_run import RecordedRun
from k2train.train.preflight import Start
from k2train.train.resume_check import identity_of
from k2train.train.setup import Setup

ONE_PROCESS: dict[str, Any] = {
    "tensor": 1,
    "pipeline": 1,
    "sequence": False,
    "schedule": "1f1b",
    "stages_per_rank": 1,
    "layers_per_stage": None,
    "symmetric_memory": False,
}
"""Section `parallel` of a replay on one process."""


class Place(NamedTuple):
    """Where a replay runs."""

    world_size: int
    data: Path | None = None
    """Manifest of the data, where it has moved."""
    same_layout: bool = False
    """Whether the layout is that of the run, which then needs as many processes."""


def begin_of(run: RecordedRun, tree: Mapping[str, Any], place: Place) -> Start:
    """Return the start of a replay of steps that were done with the config `tree`.

    Raises UserError when config, data and processes do not fit.
    """
    values: dict[str, Any] = {
        key: dict(part) if isinstance(part, dict) else part for key, part in tree.items()
    }
    if not place.same_layout:
        if place.world_size > 1:
            raise RunError(
                f"a replay on {place.world_size} processes takes the layout of the run: start as "
                "many as that had, or one"
            )
        values["parallel"] |= ONE_PROCESS
    if place.data is not None:
        values["data"]["manifest"] = str(place.data)
    config = Config.model_validate(values)

    manifest = read_data_manifest(config.data.manifest)
    manifest = masked_as_asked(manifest, config.data.loss_mask)
    order = make_order(
        manifest, config.data.order, config.batch.global_sequences, config.data.sequence_length
    )
    order = apply_events(order, run.entries, str(run.directory / "ledger.jsonl"))
    setup = Setup.of(config, place.world_size)
    identity = identity_of(config, manifest, order)
    return Start(run.directory, setup, manifest, order, identity)
