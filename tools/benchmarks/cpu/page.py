"""Markdown tables of CPU benchmark records for a page: one table for each kind of processor.

- A table has the pairs of a layout and its fastest peer. Ratios are of the same rounds of one
  record, so both sides of a pair must be in one group of one record.
- A kind of processor may be measured piece by piece. Where two records have a pair, the one that is
  named last counts.
- Ratios of two kinds of processors are never in one table.

Alternatives considered:
- Speeds relative to one reference in all tables: a product over several groups adds up their noise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu.contenders import CONTENDERS, OUR_PIPELINES, PRECISIONS, REFERENCE
from benchmarks.cpu.processor import details_text, kind_of, kind_text
from benchmarks.cpu.results import ESTABLISHED, ratio
from benchmarks.cpu.table import FORMAT, MIB, ratio_text
from benchmarks.cpu.work import Work
from k2train.errors import RunError
from k2train.text import markdown_table

Record = Mapping[str, Any]
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A line of the table: the fastest of `ours` against the fastest of `theirs`."""

    title: str
    ours: tuple[str, ...]
    peer: str
    theirs: tuple[str, ...]


def _of(*starts: str) -> tuple[str, ...]:
    return tuple(c.name for c in CONTENDERS if c.name.startswith(starts))


PAIRS = (
    Pair("one process", ("k2train",), "transformers", ("transformers",)),
    Pair("", ("k2train",), "hand-written reference", (REFERENCE,)),
    Pair(
        "one process, compiled",
        ("k2train-compiled",),
        "hand-written reference, compiled",
        ("reference-compiled",),
    ),
    Pair("data parallel 2, optimizer sharded", ("k2train-dp2",), "DDP, FSDP2", ("ddp2", "fsdp2")),
    Pair(
        "tensor 2, sequence parallel",
        ("k2train-tp2-sp",),
        "Megatron-core tensor 2 (it has no sequence parallelism on a CPU)",
        ("megatron-tp2",),
    ),
    Pair("", ("k2train-tp2-sp",), "DTensor tensor 2", _of("dtensor-tp2")),
    Pair("", ("k2train-tp2-sp",), "hand-written reference, one process", (REFERENCE,)),
    Pair("pipeline 2", OUR_PIPELINES, "torch's pipelining", _of("pipelining-")),
    Pair("", OUR_PIPELINES, "Megatron-core pipeline 2", ("megatron-pp2",)),
    Pair(
        "tensor 2 x pipeline 2, 4 processes",
        ("k2train-tp2-pp2",),
        "Megatron-core, torch",
        ("megatron-tp2-pp2", "torch-tp2-pp2"),
    ),
    Pair("", ("k2train-tp2-pp2",), "hand-written reference, one process", (REFERENCE,)),
)
HEAD = ("k2train", "against", "fp32", "bf16", "MiB fp32", "MiB bf16")


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read records that `--json` wrote. Raises RunError with one line for anything else."""
    records: list[Record] = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise RunError(f"{path} cannot be read: {problem.strerror}") from None
        except ValueError as problem:
            raise RunError(f"{path} is no JSON: {problem}") from None

        if not isinstance(record, dict) or record.get("format") != FORMAT or "rows" not in record:
            raise RunError(f"{path} is no record of `bench.py cpu`; give files that --json wrote")
        _check(path, record)
        records.append(record)
    return records


def _check(path: Path, record: Record) -> None:
    """Make the page of one record alone. Raises RunError, with the file's name, where none is."""
    try:
        if kind_of(record["machine"].get("cpu")) is None:
            raise RunError(
                f"{path} does not name its processor by family and model, so its ratios belong to "
                "no table; measure again with this version"
            )
        wrong = [s for row in record["rows"] for s in _seconds(row) if not 0 < s < math.inf]
        if wrong:
            raise RunError(f"{path} is damaged: a step of {wrong[0]} seconds; measure again")
        int(record["rounds"])
        pages([record])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as problem:
        # A record is whole or it was changed by hand: which key it was is all there is to say.
        raise RunError(
            f"{path} is damaged: {type(problem).__name__} {problem}; measure again"
        ) from None


def pages(records: Sequence[Record]) -> str:
    """A section for each kind of processor, in the order of the records."""
    kinds: dict[Any, list[Record]] = {}
    for record in records:
        kinds.setdefault(kind_of(record["machine"]["cpu"]), []).append(record)
    return "\n\n".join("\n".join(_section(of_kind)) for of_kind in kinds.values())


def _section(records: Sequence[Record]) -> Iterator[str]:
    cpu = records[0]["machine"]["cpu"]
    yield f"### {kind_text(cpu)}"
    yield ""
    yield from _basis(records)
    yield ""
    yield from markdown_table(HEAD, _lines(records))


def _basis(records: Sequence[Record]) -> Iterator[str]:
    """Processor, libraries and work; records that differ in the last are not for one table."""
    works = {json.dumps([record["work"], record["cores"]], sort_keys=True) for record in records}
    if len(works) > 1:
        raise RunError(
            f"{len(works)} sizes of work on {kind_text(records[0]['machine']['cpu'])}; give "
            "records of one size"
        )

    machine, work = records[0]["machine"], Work(**records[0]["work"])
    cores = records[0]["cores"]
    known = (row["runtime"] for record in records for row in record["rows"])
    runtime = next((found for found in known if found), None)
    versions = {name: found for record in records for name, found in _versions(record).items()}
    yield f"{details_text(machine['cpu'])}."
    yield (
        f"{cores} cores, shared by the processes; {_text(runtime)}; "
        f"{', '.join(f'{name} {found}' for name, found in versions.items())}."
    )
    yield (
        f"{work.num_layers} layers of {work.hidden_size}, vocabulary {work.vocab_size:,}, "
        f"{work.global_sequences} sequences of {work.sequence_length}, AdamW; median of "
        f"{min(record['rounds'] for record in records)} rounds in turns, with the range. "
        f"Below {ESTABLISHED:.0%} nothing is established. MiB: resident peak of all processes, "
        "k2train's and the peer's."
    )


def _versions(record: Record) -> dict[str, str]:
    return {name: found for name, found in record["machine"]["versions"].items() if found}


def _text(runtime: Mapping[str, Any] | None) -> str:
    if runtime is None:
        return "libraries not known"
    return f"{runtime['capability']}, MKL {runtime['mkl']}, oneDNN {runtime['onednn']}"


def _lines(records: Sequence[Record]) -> Iterator[Sequence[str]]:
    for pair in PAIRS:
        found = {precision: _found(records, pair, precision) for precision in PRECISIONS}
        known = [one for one in found.values() if one]
        if not known:
            continue
        # Which of several it was may depend on the precision.
        title = pair.title and f"{pair.title}{_which(pair.ours, known, 'ours')}"
        peer = f"{pair.peer}{_which(pair.theirs, known, 'theirs')}"
        ratios = [ratio_text(one["ratio"]) if one else "-" for one in found.values()]
        memory = [one["memory"] if one else "-" for one in found.values()]
        yield (title, peer, *ratios, *memory)


def _which(names: Sequence[str], known: Sequence[Found], side: str) -> str:
    """The fastest of several names, for fp32 and bf16 if they differ, and of how many."""
    if len(names) == 1:
        return ""
    fastest = dict.fromkeys(found[side]["name"] for found in known)
    measured = max(found[f"{side}_measured"] for found in known)
    return f": `{'`, `'.join(fastest)}`, of {measured} measured"


def _found(records: Sequence[Record], pair: Pair, precision: str) -> dict[str, Any] | None:
    for record in reversed(records):
        rows = [
            row
            for row in record["rows"]
            if row["precision"] == precision and not row["problem"] and not row["base"]
        ]
        candidates = [row for row in rows if row["name"] in pair.ours]
        ours = _fastest(candidates)
        if ours is None:
            continue
        beside = [row for row in rows if row["group"] == ours["group"]]
        peers = [row for row in beside if row["name"] in pair.theirs]
        theirs = _fastest(peers)
        measured = ratio(ours["seconds"], theirs["seconds"]) if theirs else None
        if theirs and measured:
            memory = " / ".join(
                f"{row['peak_resident_bytes'] / MIB:,.0f}" for row in (ours, theirs)
            )
            return {
                "ours": ours,
                "ours_measured": len(candidates),
                "theirs": theirs,
                "theirs_measured": len(peers),
                "ratio": measured,
                "memory": memory,
            }
    return None


def _fastest(rows: Sequence[Found]) -> Found | None:
    known = [(statistics.median(s), row) for row in rows if (s := _seconds(row))]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def _seconds(row: Found) -> list[float]:
    return [seconds for seconds in row["seconds"] if seconds is not None]
