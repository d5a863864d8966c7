"""Held-out loss of one checkpoint: the sets that its run scores, or those of other data.

- Computed by the engine of training on one process, with kernels and precision of the config in
  the checkpoint's manifest. So the loss of a checkpoint of a run is the one that the run recorded.
- A thinned, an imported or a merged checkpoint will do: only weights are used.
- Loss masks count as in the run. Other data with masks is scored by them, unless the run ignored
  masks.

Alternatives considered:
- The model of generation: on a CPU it computes in fp32, whatever the run did, and has no loss.
"""

from pathlib import Path
from typing import Any

from k2train.checkpoint.load import load_states
from k2train.checkpoint.manifest import CheckpointManifest
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.config.load import Config
from k2train.data.chunk import check_files
from k2train.data.held_out import HeldOutSet
from k2train.data.loss_mask import masked_as_asked
from k2train.data.manifest import Manifest, require_borders
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError, DataError
from k2train.launch.environment import Launch
from k2train.parallel.grid import (
    ProcessGrid,
    choose_device,
    start_process_group,
    stop_process_group,
)
from k2train.replay.begin import ONE_PROCESS
from k2train.text import brief
from k2train.train.batches import BatchSource
from k2train.train.engine import Engine
from k2train.train.held_out_sets import held_out_limit, held_out_sets
from k2train.train.host_memory import keep_freed_memory
from k2train.train.preflight import Start
from k2train.train.setup import Setup
from k2train.train.strict_mode import prepare_strict_mode


def begin_score(path: Path, manifest: CheckpointManifest, data: Path | None = None) -> Start:
    """Return what a score of the checkpoint at `path` begins with; `data` is another data folder.

    Raises UserError when the data are not there, do not fit, or have nothing to score.
    """
    config = _config_of(path, manifest, data)
    read = read_data_manifest(config.data.manifest)
    if data is None or config.data.loss_mask == "ignore":
        read = masked_as_asked(read, config.data.loss_mask)
    _check_tokenizer(path, manifest, read)
    sets = held_out_sets(config, read)
    if not sets and data is not None:
        sets = (_whole_folder(config, read),)
    if not sets:
        raise DataError(
            f"{read.path} has no held-out chunk, and the config of {path} no "
            "data.held_out_sets: name a data folder with --manifest"
        )
    # No step is done: any order will do.
    names, rows = zip(*((info.name, info.rows) for info in read.chunks), strict=True)
    order = ChunkOrder(names, rows, config.batch.global_sequences)
    setup = Setup.of(config, 1)
    return Start(path.parent, setup, read, order, {}, sets)


def _config_of(path: Path, manifest: CheckpointManifest, data: Path | None) -> Config:
    """Return the config of a checkpoint, on one process. Raises CheckpointError without one."""
    tree: dict[str, Any] = {
        key: dict(part) if isinstance(part, dict) else part for key, part in manifest.config.items()
    }
    if not {"run", "model", "data", "batch", "lr"} <= set(tree):
        raise CheckpointError(
            f"{path}: its manifest has no whole config, as of an imported checkpoint: score a "
            "checkpoint of the run that starts from it"
        )
    tree["parallel"] = {**tree.get("parallel", {}), **ONE_PROCESS}
    if data is not None:
        tree["data"] |= {"manifest": str(data), "order": None}
        # Those of the run: they belong to its data.
        tree["data"]["held_out_sets"] = {}
        if tree["data"].get("held_out_rows") == 0 or tree["data"].get("held_out_batches") == 0:
            tree["data"] |= {"held_out_rows": None, "held_out_batches": None}
    return Config.model_validate(tree)


def _check_tokenizer(path: Path, manifest: CheckpointManifest, data: Manifest) -> None:
    wanted = manifest.data.tokenizer_sha256
    if wanted is not None and wanted != data.tokenizer_sha256:
        raise DataError(
            f"{data.path} was made with tokenizer {brief(data.tokenizer_sha256)}, {path} was "
            f"trained with {brief(wanted)}; prepare it with the same one"
        )


def _whole_folder(config: Config, data: Manifest) -> HeldOutSet:
    """Return the chunks of a data folder that holds nothing out."""
    found = HeldOutSet.of(data.path.parent.name, data, held_out_limit(config))
    names = [info.name for info, _ in found.scored()]
    if config.data.cross_documents == "block":
        require_borders(data, names)
    check_files(data, names)
    return found


def score(launch: Launch, path: Path, start: Start) -> tuple[HeldOutFacts, ...]:
    """Score the checkpoint at `path`, in a world of one.

    Raises CheckpointError when it is not whole, DataError when the data are damaged.
    """
    device = choose_device(launch)
    prepare_strict_mode(device, start.setup.config.kernels.deterministic, 1)
    keep_freed_memory(device.type)
    start_process_group(launch, device)
    grid = ProcessGrid(start.layout, 0, device)
    try:
        return score_on(grid, path, start)
    finally:
        stop_process_group(grid.host)


def score_on(grid: ProcessGrid, path: Path, start: Start) -> tuple[HeldOutFacts, ...]:
    """Score the checkpoint at `path` on a grid of one process."""
    engine = Engine(start.setup, grid, fill=False)
    optimizer = engine.optimizer
    load_states(path, engine.gradients.shard_layout, optimizer.flat_shards, grid, engine.dtype)
    optimizer.write_parameters()
    batches = BatchSource(start, grid, verify=True)
    try:
        batches.read_subsets(lambda: None)
        return batches.score(engine)
    finally:
        batches.close()
