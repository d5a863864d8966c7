"""A recorded run whose chunks hold test items at known places, one deferred, one never read."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from k2train.data.manifest import Manifest
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.record.events import CheckpointSaved, ChunkDeferred, Resumed, Started
from k2train.record.ledger import Ledger
from tests.support.data_folder import add_chunk, finish
from tests.support.events import event

ROWS, LENGTH, BATCH = 6, 120, 3
LIST = (
    "river stone lamp orchard winter engine ribbon captain letter morning silver garden hammer "
    "bottle forest window candle market shadow saddle copper meadow basket violin harbor pepper "
    "tunnel blanket mirror spider butter needle anchor pocket ladder cotton feather kettle "
    "pillow "
)
WORDS = LIST.split()
STEPS = {"chunk_000": 1, "chunk_002": 3, "chunk_003": 5, "chunk_001": 7}
"""First step of each chunk: chunk_001 was moved to the end. Step 8 is to come."""
DONE = 7


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng([seed, 1]).choice(WORDS, count))


@dataclass(frozen=True)
class Planted:
    """A run, its data, and the text of every row."""

    run: Path
    data: Path
    tokenizer: Tokenizer
    rows: dict[tuple[str, int], bytes]

    def places(self, text: str) -> list[tuple[str, int]]:
        """Chunks and rows that hold a text, found by Python."""
        return sorted(place for place, row in self.rows.items() if text.encode() in row)


def plant(folder: Path, texts: dict[tuple[str, int], str]) -> Planted:
    """Make a run in which a row holds a text in the middle of a line, without a space beside it
    that the text does not have.
    """
    tokenizer = train_tokenizer([words(seed, 60) for seed in range(60)], 520)
    manifest, rows = _data(folder / "data", tokenizer, texts)
    _run(folder / "runs" / "planted", manifest)
    return Planted(folder / "runs" / "planted", folder / "data", tokenizer, rows)


def _data(
    folder: Path, tokenizer: Tokenizer, texts: dict[tuple[str, int], str]
) -> tuple[Manifest, dict[tuple[str, int], bytes]]:
    folder.mkdir()
    infos, rows = [], {}
    for number in range(len(STEPS)):
        name = f"chunk_{number:03d}"
        ids = []
        for row in range(ROWS):
            seed = 1000 + 100 * number + row
            middle = texts.get((name, row), " ")
            text = words(seed, 12) + middle + words(seed + 50, 120)
            ids.append(tokenizer.encode(text)[:LENGTH])
            rows[name, row] = tokenizer.decode_bytes(ids[-1])
        infos.append(add_chunk(folder, name, ids, tokenizer.vocab_size))
    tokenizer.save(folder / "tokenizer.model")
    facts = {"tokenizer": {"file": "tokenizer.model", "specials": list(tokenizer.specials)}}
    manifest = finish(folder, infos, LENGTH, tokenizer.vocab_size, tokenizer.sha256, facts)
    return manifest, rows


def _run(folder: Path, manifest: Manifest) -> None:
    """Attempt 1 read chunk_001 at step 3. Then it was moved to the end, behind chunk_003."""
    folder.mkdir(parents=True)
    config = {
        "data": {"manifest": str(manifest.path), "sequence_length": LENGTH},
        "batch": {"global_sequences": BATCH},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append(event(Started, attempt=1, data_manifest_sha256=manifest.sha256))
    for step in (0, 2):
        ledger.append(_saved(1, step))
    ledger.append(event(ChunkDeferred, attempt=1, chunk="chunk_001", step=2, order_index=3))
    ledger.append(event(Resumed, attempt=2, step=2))
    for step in (4, 6):
        ledger.append(_saved(2, step))

    lines = [_line(1, step, "chunk_000", step - 1) for step in (1, 2)]
    lines.append(_line(1, 3, "chunk_001", 0))
    lines += [
        _line(2, step, name, step - first)
        for name, first in STEPS.items()
        for step in (first, first + 1)
        if 2 < step <= DONE
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))


def _saved(attempt: int, step: int) -> CheckpointSaved:
    return event(CheckpointSaved, checkpoint=f"ckpt_{step // 2:03d}", attempt=attempt, step=step)


def _line(attempt: int, step: int, chunk: str, half: int) -> str:
    rows = [half * BATCH, half * BATCH + BATCH]
    facts = {"step": step, "attempt": attempt, "chunk": chunk, "loss": 3.0, "rows": rows}
    return json.dumps(facts) + "\n"
