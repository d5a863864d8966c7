"""A data folder with loss masks, as uneven as they get, and the loss that each token must add."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k2train.data.loader import Loader, MicroBatch, Share
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.order import make_order
from k2train.parallel.grid import ProcessGrid
from tests.support.data_folder import add_chunk, finish

SEQUENCE, VOCAB, GLOBAL = 16, 251, 8
ROWS = 3 * GLOBAL
NAMES = ("chunk_000", "chunk_001", "held_out")
SUBSETS = [f"part{row % 2}" for row in range(ROWS)]
END = 2
"""Id of the end of a turn, which is learned."""
BORDERS = (5, 11)
"""Where documents begin inside every row."""


def rows_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [rows, SEQUENCE] of a chunk.

    Row r has a prompt, then a response with the end of its turn, which alone is learned. The rows
    have from 1 to SEQUENCE - 1 targets, so no two ranks or micro-batches have as many.
    """
    rng = np.random.default_rng(40 + number)
    ids = rng.integers(3, VOCAB, (ROWS, SEQUENCE))
    learned = np.zeros((ROWS, SEQUENCE), dtype=bool)
    for row in range(ROWS):
        # The first rows of a batch learn much, the last ones little.
        count = (1, 2, 3, 4, 5, 9, 14, 15)[(7 - row) % 8]
        first = int(rng.integers(1, SEQUENCE - count + 1))
        learned[row, first : first + count] = True
        ids[row, first + count - 1] = END
    return ids, learned


def masked_folder(folder: Path, masked: bool = True) -> Manifest:
    """Two chunks of three steps, and a held-out one; borders and subsets too."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, name in enumerate(NAMES):
        ids, learned = rows_of(number)
        tokens = {key: SUBSETS.count(key) * SEQUENCE for key in sorted(set(SUBSETS))}
        infos.append(
            add_chunk(
                folder,
                name,
                ids,
                VOCAB,
                tokens,
                pieces=pieces(),
                borders=[row * SEQUENCE + at for row in range(ROWS) for at in BORDERS],
                mask=learned if masked else None,
            )
        )
    return finish(folder, infos, SEQUENCE, VOCAB)


def pieces() -> dict[str, Any]:
    """Provenance: three documents a row, of one subset."""
    starts = (0, *BORDERS)
    ends = (*BORDERS, SEQUENCE)
    rows = [row for row in range(ROWS) for _ in starts]
    return {
        "row": rows,
        "start": [*starts] * ROWS,
        "length": [b - a for a, b in zip(starts, ends, strict=True)] * ROWS,
        "subset": [SUBSETS[row] for row in rows],
        "source": ["a"] * len(rows),
        "fim": ["none"] * len(rows),
        "document": [str(n) for n in range(len(rows))],
        "offset": [0] * len(rows),
        "repeat": [0] * len(rows),
    }


def masked_microbatches(config: Any, grid: ProcessGrid, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step as the loader reads them from `data.manifest`."""
    manifest = read_manifest(config.data.manifest)
    order = make_order(manifest, None, config.batch.global_sequences)
    share = Share(grid.dp.rank, grid.dp.size, config.batch.micro_sequences)
    block = config.data.cross_documents == "block"
    with Loader(manifest, order, share, VOCAB, documents=block) as loader:
        return loader.step((step - 1) % order.total_steps + 1)


def expected_losses(logits: Tensor, ids: np.ndarray, learned: np.ndarray) -> tuple[Tensor, Tensor]:
    """Summed loss [rows] and targets [rows], token by token as the format is written down.

    `logits` [rows, SEQUENCE, VOCAB]. Bit t of a row: the token at t is the label of position t-1.
    """
    logarithms = logits.double().log_softmax(dim=-1)
    sums = [torch.zeros((), dtype=torch.float64) for _ in ids]
    for row, token in np.argwhere(learned):
        sums[row] = sums[row] - logarithms[row, token - 1, int(ids[row, token])]
    return torch.stack(sums), torch.from_numpy(learned.sum(axis=1))
