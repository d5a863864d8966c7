"""Load a checkpoint of any layout into this one.

All ranks share the hashing of the files and agree on the outcome before a single value is touched. The values then go
straight into the optimizer's lines; the weights are made from the master weights, as after a step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from k2train.checkpoint.manifest import expected_files, is_thinned, read_manifest, verify_files
from k2train.checkpoint.tensors import MASTER, describe, model_tensors, optimizer_tensors
from k2train.errors import CheckpointError
from k2train.parallel.gradients import SlotTable
from k2train.parallel.grid import ProcessGrid


def agree_on_checkpoint(candidates: Sequence[Path], grid: ProcessGrid) -> tuple[Path | None, list[str]]:
    """The first of `candidates` that every rank finds whole, and what was wrong with those before it.

    Rank 0's list is the one that counts; each rank hashes its share of the files.
    """
    told = [[str(path) for path in candidates]]
    dist.broadcast_object_list(told, src=0, group=grid.host)
    refused: list[str] = []
    for text in told[0]:
        path = Path(text)
        answers: list[str] = [""] * grid.layout.world_size
        dist.all_gather_object(answers, _problem(path, grid), group=grid.host)
        wrong = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer]
        if not wrong:
            return path, refused
        refused.append(wrong[0])
    return None, refused


def _problem(path: Path, grid: ProcessGrid) -> str:
    try:
        manifest = read_manifest(path)
        names = expected_files(path, manifest)
        verify_files(path, manifest, names[grid.rank :: grid.layout.world_size])
    except CheckpointError as error:
        return str(error)
    return ""


@torch.no_grad()
def load_states(path: Path, table: SlotTable, lines: dict[str, Tensor], grid: ProcessGrid, dtype: torch.dtype) -> bool:
    """Fill the optimizer lines [elements] from checkpoint `path`; returns whether it had optimizer states.

    From a checkpoint thinned to its weights only `master` is filled and the moments are zeroed.
    Raises CheckpointError when its tensors are not those of this model.
    """
    manifest = read_manifest(path)
    host = {state: torch.full_like(line, float("nan"), device="cpu") for state, line in lines.items()}
    weights = torch.full_like(host[MASTER], float("nan"), dtype=dtype)
    thinned = is_thinned(path)
    if thinned:
        folder, wanted = "model", model_tensors(table, weights, grid.host_mesh)
    else:
        folder, wanted = "optimizer", optimizer_tensors(table, host, grid.host_mesh)
    _check_tensors(path, folder, manifest, describe(wanted), grid)
    reader = dcp.HuggingFaceStorageReader(str(path / folder))
    dcp.load(dict(wanted), storage_reader=reader, process_group=grid.host)
    for slot in table.slots:
        for state in [MASTER] if thinned else lines:
            filled = table.local(weights.float() if thinned else host[state], slot)
            assert not bool(filled.isnan().any()), f"{path}: {slot.piece.name}.{state} was not filled"
            table.local(lines[state], slot).copy_(filled)
    if thinned:
        for state, line in lines.items():
            if state != MASTER:
                line.zero_()
    return not thinned


def _check_tensors(
    path: Path, folder: str, manifest: dict[str, Any], wanted: dict[str, Any], grid: ProcessGrid
) -> None:
    """Same names and shapes over all ranks together; every rank raises alike."""
    parts: list[Any] = [None] * grid.layout.world_size
    dist.all_gather_object(parts, wanted, group=grid.host)
    expected = {name: facts["shape"] for part in parts for name, facts in part.items()}
    found = {name: facts["shape"] for name, facts in manifest["tensors"].get(folder, {}).items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, this model's is {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{path}: {'; '.join(problems[:3])}" + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        )
