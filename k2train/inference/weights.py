"""Weights of a checkpoint of any layout, read into modules of any other, and nothing else of it.

- `model/` holds the weights in the precision of training. The fp32 master weights are in
  `optimizer/`, beside the moments, which are not read.
- Every piece is checked against its hash where it lies. Formats 1 and 2 have no such hashes: their
  files are verified first.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from k2train.checkpoint.manifest import CheckpointManifest, is_thinned
from k2train.checkpoint.piece_check import Damage
from k2train.checkpoint.reshard_read import Target, execute_reads, plan_reads
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from k2train.parallel.shard import named_slices


@torch.no_grad()
def read_weights(
    path: Path, manifest: CheckpointManifest, modules: Iterable[nn.Module], master: bool = False
) -> None:
    """Fill the parameters of `modules` from checkpoint `path`, with `master` from its fp32 weights.

    Raises CheckpointError when the checkpoint is not whole or has other tensors, UnavailableError
    when a file cannot be read for now.
    """
    folder = "optimizer" if master else "model"
    if master and (is_thinned(path) or "optimizer" not in manifest.tensors):
        raise CheckpointError(
            f"{path}: its fp32 weights were removed with the optimizer states; leave out --fp32 "
            "for the weights of its model"
        )

    targets = []
    for module in modules:
        for parameter, part in named_slices(module):
            key = f"{part.name}.master" if master else part.name
            offsets = [0] * len(part.global_shape)
            if part.dim is not None:
                offsets[part.dim] = part.start
            # A rank may hold nothing but padding.
            if part.start < part.stop:
                targets.append(Target(key, tuple(offsets), part.shape, part.of(parameter)))
            _check_shape(path, manifest.shapes(folder), key, list(part.global_shape))

    if manifest.format < 3:
        verify_checkpoint(path)
    try:
        execute_reads(plan_reads(path, folder, manifest, targets))
    except Damage as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def _check_shape(path: Path, found: dict[str, list[int]], key: str, shape: list[int]) -> None:
    if key not in found:
        raise CheckpointError(f"{path}: {key} is missing")
    if found[key] != shape:
        raise CheckpointError(
            f"{path}: {key} has shape {found[key]}, the model of its config {shape}"
        )
