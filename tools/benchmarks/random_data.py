"""Data folders of random token ids, for benches that train on or read any ids."""

from pathlib import Path

import numpy as np

from k2train.data.chunk import write_chunk, write_manifest
from k2train.data.manifest import Manifest


def random_folder(folder: Path, chunks: int, rows: int, length: int, vocab: int) -> Manifest:
    """Write a data folder of `chunks` chunks with `rows` sequences of `length` ids each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    infos = [
        write_chunk(
            folder,
            f"chunk_{i:03d}",
            [rng.integers(0, vocab, (rows, length)).astype(np.uint32)],
            rows,
            vocab,
            {},
        )
        for i in range(chunks)
    ]
    return write_manifest(
        folder,
        tokenizer_sha256="random",
        sequence_length=length,
        vocab_size=vocab,
        chunks=infos,
        facts={},
    )
