"""What `auto` meant when a run began: precision, schedule and cut, from its newest checkpoint.

- A run keeps what it has, also on a machine or with a version that would choose otherwise.
- Read before torch is imported, on every rank, from the same files.

Alternatives considered:
- A file of choices beside the checkpoints: it could be lost, or belong to another checkpoint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.checkpoint.manifest_types import CheckpointManifest
from k2train.config.load import Config, flat_values
from k2train.config.world_rules import world_mistakes
from k2train.errors import CheckpointError
from k2train.plan.pipeline_choice import AUTO


def run_directory(config: Config) -> Path:
    """Return the run directory of a config."""
    return Path(config.run.directory) / config.run.name


def _newest_first(config: Config) -> Iterator[tuple[Path, CheckpointManifest]]:
    """Checkpoints of the run and their manifests, the newest first."""
    for path in reversed(list_checkpoints(run_directory(config) / "checkpoints")):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            # Refused, with its reason, when a checkpoint is chosen.
            continue
        yield path, manifest


def with_precision(config: Config, precision: str) -> Config:
    """Return the config with what `precision: auto` stands for."""
    return config.model_copy(update={"precision": precision})


def with_recorded_precision(config: Config) -> tuple[Config, str]:
    """Return the config with the precision that its run has, if `auto` asks for that, and why.

    A run without a checkpoint has none yet: the devices decide, see `train.precision`.
    """
    if config.precision != "auto":
        return config, ""
    for path, manifest in _newest_first(config):
        if manifest.identity is not None:
            return with_precision(config, manifest.identity.precision), f"as in {path.name}"
    return config, ""


def with_recorded_pipeline(config: Config, world_size: int) -> tuple[Config, str]:
    """Return the config with the schedule and cut that its run has, where `auto` asks, and why.

    Only of a checkpoint with as many pipeline ranks, and where they fit the rest of the config.
    """
    asked = config.parallel
    if AUTO not in (asked.schedule, asked.layers_per_stage) or asked.pipeline == 1:
        return config, ""
    for path, manifest in _newest_first(config):
        found = _pipeline_of(config, manifest.config.get("parallel"))
        if found is not None and not world_mistakes(flat_values(found), world_size):
            cut = found.parallel.layers_per_stage
            layers = "as many layers on every stage" if cut is None else f"layers {list(cut)}"
            return found, f"pipeline auto is {found.parallel.schedule}, {layers}: as in {path.name}"
        return config, ""
    return config, ""


def _pipeline_of(config: Config, recorded: Any) -> Config | None:
    """Return the config with the `auto` keys of its pipeline as recorded.

    None if they do not fit, or are none: a damaged manifest is refused when it is chosen.
    """
    parallel = config.model_dump()["parallel"]
    if not isinstance(recorded, Mapping) or recorded.get("pipeline") != parallel["pipeline"]:
        return None
    keys = ["schedule", "stages_per_rank"] if parallel["schedule"] == AUTO else []
    keys += ["layers_per_stage"] if parallel["layers_per_stage"] == AUTO else []
    # A record without a key is older than the key, and knew one way only.
    only = {"schedule": "1f1b", "stages_per_rank": 1, "layers_per_stage": None}
    chosen = {**parallel, **{key: recorded.get(key, only[key]) for key in keys}}
    if AUTO in (chosen["schedule"], chosen["layers_per_stage"]):
        return None
    try:
        return Config.model_validate({**config.model_dump(), "parallel": chosen})
    except ValidationError:
        return None
