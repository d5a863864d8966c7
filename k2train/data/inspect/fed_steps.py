"""Comparison of what the steps of a run were fed with the rows of the chunks that they name.

- The metrics hold a hash of the ids of every step (`data.fed_ids`); it is computed again from the
  chunks. A chunk that was exchanged while it was trained on and then put back is found here alone.
- Each range of rows is read once, whatever number of attempts read it.
- One line a chunk: the first step that differs, and how many do.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from k2train.data.chunk import ChunkInfo, Manifest, open_chunk
from k2train.data.fed_ids import fingerprint_of_step, with_labels
from k2train.data.loss_mask import learned_of_rows
from k2train.errors import DataError
from k2train.record.metrics import StepRecord
from k2train.text import counted


def fingerprint_of_rows(manifest: Manifest, info: ChunkInfo, rows: range, masked: bool) -> str:
    """Hash of the ids of `rows` of a chunk, as a step that reads all of them records it.

    `masked`: with the labels of their loss masks, for a step that learned by them.
    Raises DataError when the chunk cannot be read or has no such rows.
    """
    if rows.stop > info.rows:
        raise DataError(f"{info.name} has {info.rows} rows, a step read {rows.start}-{rows.stop}")
    tokens = open_chunk(manifest, info)
    try:
        ids = tokens[rows.start : rows.stop]
        if not (masked and manifest.has_masks):
            return fingerprint_of_step(ids)
        return fingerprint_of_step(with_labels(ids, learned_of_rows(manifest, info, rows)))
    finally:
        tokens.close()


def fed_problems(manifest: Manifest, records: Iterable[StepRecord]) -> Iterator[str]:
    """Describe the chunks whose rows are not what the steps of `records` were fed."""
    chunks = {info.name: info for info in manifest.all_chunks()}
    read: dict[str, dict[tuple[int, int], list[StepRecord]]] = defaultdict(dict)
    for record in records:
        if record.ids is not None and len(record.rows) == 2:
            start, stop = record.rows
            read[record.chunk].setdefault((start, stop), []).append(record)

    for name, ranges in read.items():
        if name not in chunks:
            yield f"{manifest.path}: has no {name!a}, which step {_first(ranges).step} read"
            continue
        try:
            wrong = list(_wrong(manifest, chunks[name], ranges))
        except DataError as error:
            yield str(error)
            continue
        if wrong:
            first = min(wrong, key=lambda record: (record.step, record.attempt))
            steps = f"{counted(len(wrong), 'step')} {'was' if len(wrong) == 1 else 'were'}"
            yield (
                f"{manifest.folder / chunks[name].file}: {steps} fed other ids "
                f"than its rows hold, the first is step {first.step} (attempt {first.attempt}, "
                f"rows {first.rows[0]}-{first.rows[1] - 1}): it was another file while they ran, "
                "or it was read wrong"
            )


def _wrong(
    manifest: Manifest, info: ChunkInfo, ranges: dict[tuple[int, int], list[StepRecord]]
) -> Iterator[StepRecord]:
    for (start, stop), records in sorted(ranges.items()):
        here: dict[bool, str] = {}
        for record in records:
            masked = record.targets is not None
            if masked not in here:
                here[masked] = fingerprint_of_rows(manifest, info, range(start, stop), masked)
            if record.ids != here[masked]:
                yield record


def _first(ranges: dict[tuple[int, int], list[StepRecord]]) -> StepRecord:
    return min((record for found in ranges.values() for record in found), key=lambda r: r.step)
