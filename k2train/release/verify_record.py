"""Verification of the record in a release: ledger, metrics, order, data and evaluation agree.

- Each finding is a line. A file that cannot be read ends only its own check.
- The order of the data is computed again from config, manifest and ledger, and every step of the
  metrics is compared with it.

Alternatives considered:
- Hashes alone: they cannot see a release that was put together of two runs.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from k2train.checkpoint.manifest import checkpoint_name
from k2train.config.load import load_config
from k2train.config.schema import Config
from k2train.data.fed_ids import fingerprint_of_step, with_labels
from k2train.data.inspect.account import find_tokenizer
from k2train.data.manifest import Manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.npy import check_size, read_header
from k2train.data.tokenizer import MODEL_NAME
from k2train.errors import UserError
from k2train.evaluation.results import ITEMS, read_items, read_results
from k2train.files import sha256_file
from k2train.record.events import (
    CheckpointSaved,
    CheckpointsMerged,
    Entry,
    Resumed,
    Started,
    of_kind,
)
from k2train.record.ledger import read_chain
from k2train.record.ledger_head import LedgerHead, head_problems, read_head
from k2train.record.metrics import damaged_rows
from k2train.record.rollback_events import SpikeCheckpoint
from k2train.record.score_files import file_differences
from k2train.record.step_gaps import KnownScore, score_problems, step_problems
from k2train.release.data_copy import LEARNED, followed, json_bytes, order_json, order_of
from k2train.release.places import (
    CONFIG,
    DATA,
    EVALUATION,
    FOLLOWING,
    HEAD,
    LEDGER,
    MANIFESTS,
    METRICS,
    ORDER,
    ROOTS,
    RUN,
    SCORES,
    SPIKES,
)
from k2train.release.verify_models import Found, check_checkpoint, check_model, released_manifest
from k2train.report.collect import read_run
from k2train.retry import is_file_retried, is_folder_retried, list_retried
from k2train.safe_json import read_plain_file
from k2train.text import counted

_FACTS = ("step", "consumed_tokens", "loss", "held_out_loss")
"""What a line of the index repeats of the ledger."""


def verify_stage(stage: Path, lines: Sequence[Any], found: Found) -> None:
    """Check everything of a stage of a release; `lines` are those of the index."""
    run = stage / RUN
    try:
        entries, hashes = read_chain(run / LEDGER)
    except (OSError, UserError) as error:
        found.problems.append(f"{run / LEDGER}: {error}")
        return
    manifests = _manifests(run)
    for problems in (
        _chain_problems(run, entries, hashes, manifests),
        _manifest_problems(run, entries, manifests),
        _index_problems(run, entries, lines),
        _line_problems(run, entries, manifests),
        _evaluation_problems(run, entries),
    ):
        # Generators: each begins where it is added.
        found.check(str(run), partial(iter, problems))
    for path in manifests:
        if path.name == "manifest.json":
            check_checkpoint(path.parent, found)
    for folder in list_retried(stage):
        if folder.name.startswith("ckpt_"):
            check_model(folder, run, found)
    _verify_data(stage, entries, found)


def _manifests(run: Path) -> list[Path]:
    """Manifests of a released run: of whole checkpoints, those beside spikes, and single ones."""
    found = []
    for folder in (run / "checkpoints", *_spike_folders(run)):
        for path in list_retried(folder) if is_folder_retried(folder) else ():
            if is_file_retried(path / "manifest.json"):
                found.append(path / "manifest.json")
    single = run / MANIFESTS
    return found + (list_retried(single) if is_folder_retried(single) else [])


def _spike_folders(run: Path) -> Iterator[Path]:
    spikes = run / "spikes"
    for spike in list_retried(spikes) if is_folder_retried(spikes) else ():
        yield spike
        for path in list_retried(spike) if is_folder_retried(spike) else ():
            if is_folder_retried(path) and not is_file_retried(path / "manifest.json"):
                yield path


def _chain_problems(
    run: Path, entries: Sequence[Entry], hashes: Sequence[str], manifests: Sequence[Path]
) -> Iterator[str]:
    """Compare the ledger with the heads kept of it, and the config with the last start."""
    heads: dict[str, LedgerHead] = {}
    if (head := read_head(run / LEDGER)) is None:
        yield f"{run / HEAD}: is missing or damaged"
    else:
        heads[HEAD] = head
        if head.events != len(hashes):
            yield f"{run / LEDGER}: has {len(hashes)} events, {HEAD} says {head.events}"
    for path in manifests:
        try:
            ledger = released_manifest(path).ledger
        except UserError:
            continue
        if ledger is not None:
            name = path.relative_to(run).as_posix()
            heads[name] = LedgerHead(ledger.events, ledger.sha256)
    yield from head_problems(run / LEDGER, entries, hashes, heads)

    starts = [e for e in (entry.event for entry in entries) if isinstance(e, Started | Resumed)]
    recorded = [start.config_sha256 for start in starts if start.config_sha256]
    if recorded and is_file_retried(run / CONFIG) and sha256_file(run / CONFIG) != recorded[-1]:
        yield f"{run / CONFIG}: is not the config of the last start in {LEDGER}"


def _manifest_problems(
    run: Path, entries: Sequence[Entry], manifests: Sequence[Path]
) -> Iterator[str]:
    """Compare manifests with the hashes that the ledger has of them."""
    known = {event.manifest_sha256 for event in of_kind(entries, CheckpointSaved)}
    known |= {event.manifest_sha256 for event in of_kind(entries, SpikeCheckpoint)}
    for path in manifests:
        if sha256_file(path) not in known:
            yield f"{path}: is not a manifest that {LEDGER} records"


def _index_problems(run: Path, entries: Sequence[Entry], lines: Sequence[Any]) -> Iterator[str]:
    """Say which checkpoints of the ledger have no line in the index, and the reverse."""
    listed = {
        (str(line.get("checkpoint")), str(line.get("manifest_sha256")))
        for line in lines
        if isinstance(line, dict)
    }
    saved: list[CheckpointSaved | SpikeCheckpoint | CheckpointsMerged] = [
        *of_kind(entries, CheckpointSaved),
        *of_kind(entries, SpikeCheckpoint),
        *of_kind(entries, CheckpointsMerged),
    ]
    known = {(event.checkpoint, event.manifest_sha256) for event in saved}
    for name, _ in sorted(known - listed):
        yield f"{run / LEDGER}: records {name}, which the index does not list"
    for other, _ in sorted(listed - known, key=str):
        yield f"index.json: lists {other!a:.60}, which {run / LEDGER} does not record"

    facts = {
        (event.checkpoint, event.manifest_sha256): [getattr(event, name) for name in _FACTS]
        for event in of_kind(entries, CheckpointSaved)
    }
    for line in lines:
        if not isinstance(line, dict):
            continue
        key = str(line.get("checkpoint")), str(line.get("manifest_sha256"))
        if key in facts and [line.get(name) for name in _FACTS] != facts[key]:
            yield f"index.json: step, tokens or losses of {key[0]} are not those of {run / LEDGER}"


def _line_problems(run: Path, entries: Sequence[Entry], manifests: Sequence[Path]) -> Iterator[str]:
    """Find damaged lines, steps and held-out scores without one, and losses that differ."""
    damaged = False
    for name in (METRICS, SCORES, ROOTS):
        if is_file_retried(run / name) and (lines := damaged_rows(run / name)):
            damaged = True
            yield f"{run / name}: {counted(len(lines), 'damaged line')}"
    if not damaged:
        saved = [event.step for event in of_kind(entries, CheckpointSaved)]
        yield from step_problems(run / METRICS, run / ROOTS, max(saved, default=0))
        yield from score_problems(run / SCORES, _scores(run, manifests))
        differences = file_differences(run / METRICS, run / SCORES)
        yield from (text for text, mended in differences if not mended)


def _scores(run: Path, manifests: Sequence[Path]) -> Iterator[KnownScore]:
    """Yield the held-out scores that manifests prove."""
    for path in manifests:
        manifest = released_manifest(path)
        # One inside a chunk, or beside a spike, has the scores of the checkpoint before it.
        beside = path.is_relative_to(run / SPIKES)
        if not beside and manifest.name == checkpoint_name(manifest.chunks.consumed):
            for one in manifest.held_out or ():
                yield KnownScore(manifest.name, manifest.step, one.name, one.loss, one.rows)


def _evaluation_problems(run: Path, entries: Sequence[Entry]) -> Iterator[str]:
    """Check that results name their items, and checkpoints of this ledger."""
    known = {event.manifest_sha256 for event in of_kind(entries, CheckpointSaved)}
    tasks = run / EVALUATION
    for task in list_retried(tasks) if is_folder_retried(tasks) else ():
        names = {path.name for path in list_retried(task)} if is_folder_retried(task) else set()
        for name in sorted(names):
            whole = name.removesuffix(ITEMS) + ".json"
            if name.endswith(ITEMS) and whole not in names:
                yield f"{task / whole}: is missing, its items are there"
    for result in read_results(run):
        read_items(run, result)
        if result.manifest_sha256 not in known:
            yield (
                f"{run}/evaluation/{result.task}/{result.checkpoint}.json: is of a checkpoint "
                f"that {LEDGER} does not record"
            )


def _verify_data(stage: Path, entries: Sequence[Entry], found: Found) -> None:
    """Check the data folder, the order, the metrics against it, and the rows of recorded steps."""
    place = stage / DATA / "manifest.json"
    if not is_file_retried(place):
        return

    def problems() -> Iterator[str]:
        manifest = read_data_manifest(place)
        config = load_config(str(stage / RUN / CONFIG))
        yield from _data_problems(stage / DATA, manifest, entries)
        yield from _tokenizer_problems(stage / DATA, manifest)
        yield from _order_problems(stage, config, manifest, entries)
        yield from _row_problems(stage, config, manifest, entries, found)

    found.check(str(stage / DATA), problems)


def _tokenizer_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Compare a sentencepiece model with the manifest; other kinds need a package."""
    place = folder / MODEL_NAME
    if not is_file_retried(place) or not re.fullmatch("[0-9a-f]{64}", manifest.tokenizer_sha256):
        return
    try:
        same = find_tokenizer(manifest, None) is not None
    except UserError:
        same = False
    if not same:
        yield f"{place}: is not the tokenizer that manifest.json names"


def _data_problems(folder: Path, manifest: Manifest, entries: Sequence[Entry]) -> Iterator[str]:
    starts = of_kind(entries, Started)
    if starts and manifest.sha256 not in {start.data_manifest_sha256 for start in starts}:
        yield f"{manifest.path}: is not the data that {LEDGER} records"
    for info in manifest.all_chunks():
        pairs = (
            (info.file, info.sha256),
            (info.provenance, info.provenance_sha256),
            (info.borders, info.borders_sha256),
            (info.loss_mask, info.loss_mask_sha256),
        )
        for name, digest in pairs:
            there = name is not None and is_file_retried(folder / name)
            if name is not None and there and sha256_file(folder / name) != digest:
                yield f"{folder / name}: is not the file that manifest.json names"


def _order_problems(
    stage: Path, config: Config, manifest: Manifest, entries: Sequence[Entry]
) -> Iterator[str]:
    order = order_of(config, manifest, entries, str(stage / RUN / LEDGER))
    place = stage / DATA / ORDER
    if is_file_retried(place) and read_plain_file(place) != json_bytes(
        order_json(order, manifest, entries)
    ):
        yield f"{place}: is not the order of config and ledger"
    wrong = [
        row.step
        for row in read_run(stage / RUN).kept
        if row.step > order.total_steps
        or row.chunk != order.position(row.step).name
        or (row.rows and range(*row.rows) != order.rows_of(row.step))
    ]
    if wrong:
        yield (
            f"{stage / RUN / METRICS}: {counted(len(wrong), 'step')} read other rows than the "
            f"order has, the first is step {wrong[0]}"
        )


def _row_problems(
    stage: Path, config: Config, manifest: Manifest, entries: Sequence[Entry], found: Found
) -> Iterator[str]:
    """Compare the rows of recorded steps with the hashes of ids that the ledger has."""
    folder = stage / FOLLOWING
    for path in list_retried(folder) if is_folder_retried(folder) else ():
        if path.name.endswith(LEARNED):
            continue
        checkpoint = path.name.removesuffix(".npy")
        sums = [sha256_file(one) for one in _manifests(stage / RUN) if checkpoint in one.as_posix()]
        events = [one for one in (followed(entries, checkpoint, sha) for sha in sums) if one]
        if not events:
            yield f"{path}: {LEDGER} has no step after {checkpoint}"
            continue
        try:
            rows = _array(path)
            masks = path.with_name(f"{checkpoint}{LEARNED}")
            use = manifest.has_masks and config.data.loss_mask == "use"
            if use:
                learned = _array(masks)
                rows = np.stack([with_labels(*pair) for pair in zip(rows, learned, strict=True)])
            hashes = [fingerprint_of_step(step) for step in rows]
        except (OSError, ValueError) as error:
            yield f"{path}: cannot be read ({str(error).splitlines()[:1]})"
            continue
        if hashes != [step.ids for step in events[0].steps]:
            yield f"{path}: are not the rows that the steps after {checkpoint} were fed"
        found.steps += len(hashes)


def _array(path: Path) -> Any:
    """Read rows `[steps, sequences, sequence length]`. Raises ValueError, DataError, OSError."""
    # A hostile header makes NumPy raise many kinds of errors, or claims more than memory holds.
    header = read_header(path, str(path))
    wanted = header.offset + prod(header.shape) * header.dtype.itemsize
    check_size(header, wanted, str(path))
    values = np.load(path, allow_pickle=False)
    if values.ndim != 3:
        raise ValueError(f"it has {values.ndim} dimensions, not 3")
    return values
