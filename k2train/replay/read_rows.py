"""Rows of single tensors from a checkpoint of any layout, every byte checked, nothing else read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.checkpoint.piece_check import Damage
from k2train.checkpoint.reshard_read import Target, execute_reads, plan_reads
from k2train.errors import CheckpointError
from k2train.parallel.device_digest import BITS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in BITS}


def read_rows(
    path: Path,
    manifest: CheckpointManifest,
    folder: str,
    shapes: Mapping[str, Sequence[int]],
    rows: range,
) -> list[Tensor]:
    """Read the same rows of some tensors of a folder, given by name and shape, in their dtypes.

    Raises CheckpointError when they are not there, or not what was saved.
    """
    return read_boxes(
        path,
        manifest,
        folder,
        [
            (name, (rows.start, *[0] * (len(shape) - 1)), (len(rows), *shape[1:]))
            for name, shape in shapes.items()
        ],
    )


def read_boxes(
    path: Path,
    manifest: CheckpointManifest,
    folder: str,
    boxes: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> list[Tensor]:
    """Read boxes of tensors of a folder, given by name, offsets and shape, as `read_rows` does."""
    targets = []
    for name, offsets, shape in boxes:
        facts = manifest.tensors[folder].get(name)
        if facts is None or facts["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {folder} has no {name} of a known type")
        values = torch.empty(shape, dtype=DTYPES[facts["dtype"]])
        targets.append(Target(name, offsets, shape, values))
    try:
        execute_reads(plan_reads(path, folder, manifest, targets))
    except Damage as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: {folder} cannot be read ({error})") from None
    return [target.values for target in targets]
