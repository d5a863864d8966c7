"""CPU benchmark report: machine, work, contenders and targets as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu.contenders import PRECISIONS
from benchmarks.cpu.processor import details_text, kind_text
from benchmarks.cpu.results import ESTABLISHED, Ratio, Row, Verdict, joining_ratio
from benchmarks.cpu.rounds import Plan
from benchmarks.cpu.work import Work
from k2train.text import bytes_text, markdown_table, number

FORMAT = 1
HEAD = (
    "contender",
    "precision",
    "processes x threads",
    "tokens/s",
    "min .. max",
    "x reference",
    "x fp32 reference",
    "loss",
    "resident MiB",
    "step MiB",
    "aims and remarks",
)
MIB = 2**20


def to_json(
    work: Work,
    plan: Plan,
    machine: Mapping[str, Any],
    commit: tuple[str | None, bool],
    seconds: float,
) -> dict[str, Any]:
    """Facts of a run besides its rows; `rows`, `aims` and `against` are added to them."""
    return {
        "format": FORMAT,
        "kind": "cpu",
        "commit": commit[0],
        "uncommitted_changes": commit[1],
        "machine": dict(machine),
        "work": dataclasses.asdict(work),
        "rounds": plan.rounds,
        "steps_a_round": plan.steps,
        "cores": plan.cores,
        "seconds": round(seconds, 1),
    }


def rows_json(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Rows and targets in JSON form."""
    aims = [{**dataclasses.asdict(v), "met": v.met} for v in verdicts]
    return {"rows": [dataclasses.asdict(row) for row in rows], "aims": aims}


def report(facts: Mapping[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict]) -> str:
    """The whole report, the table last."""
    table = markdown_table(HEAD, (_cells(row, rows, verdicts) for row in rows))
    return "\n".join([*_preamble(facts, rows), "", *table])


def _preamble(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    machine, work = facts["machine"], Work(**facts["work"])
    versions = ", ".join(
        f"{name} {found or 'not installed'}" for name, found in machine["versions"].items()
    )
    changes = " with uncommitted changes" if facts["uncommitted_changes"] else ""
    commit = f"{facts['commit'] or 'unknown'}{changes}"

    return [
        f"Machine: {machine['processor']}, {facts['cores']} of {machine['cores']} cores, "
        f"{bytes_text(machine['memory_bytes'])}, {machine['system']}, load {machine['load']} "
        "at the start",
        f"Processor: {kind_text(machine['cpu'])}; {details_text(machine['cpu'])}",
        *_libraries(rows),
        "Ratios hold for this kind of processor only.",
        f"Versions: Python {machine['python']}, {versions}; k2train commit {commit}",
        f"Work: {work.num_layers} layers, hidden {work.hidden_size}, ffn {work.ffn_hidden_size}, "
        f"{work.num_heads} heads, vocabulary {work.vocab_size}: {work.parameters:,} parameters; "
        f"sequence {work.sequence_length}, micro-batch {work.micro_sequences}, global batch "
        f"{work.global_sequences}, AdamW",
        f"Measured: {facts['rounds']} rounds of {facts['steps_a_round']} step(s) in turns, "
        f"{facts['seconds']:.0f} s in all; tokens/s is the median round, a ratio the median of the "
        f"rounds' ratios within its group. Differences under {ESTABLISHED:.0%} are not "
        "established.",
        "Memory: resident is the sum of the processes' peaks; step is the largest peak that one "
        "process allocates during a step (activations, temporaries, new gradients).",
    ]


def _libraries(rows: Sequence[Row]) -> list[str]:
    """The line on the libraries of the contenders, if any of them started."""
    runtime = next((row.runtime for row in rows if row.runtime), None)
    if runtime is None:
        return []
    versions = ", ".join(
        f"{title} {runtime[name] or 'not in this build'}"
        for name, title in (("mkl", "MKL"), ("onednn", "oneDNN"))
    )
    return [f"Libraries: torch's own kernels for {runtime['capability']}, {versions}"]


def _cells(row: Row, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[str]:
    joining = joining_ratio(rows, row.precision) if row.precision != PRECISIONS[0] else None
    wide = row.to_reference.median * joining if joining and row.to_reference else None
    spread = "-" if row.low is None else f"{row.low:,.0f} .. {row.high:,.0f}"
    loss = (
        "-"
        if row.first_loss is None
        else f"{row.first_loss:.3f} -> {row.last_loss:.3f} in {row.steps}"
    )

    return [
        row.name,
        row.precision,
        f"{row.world} x {row.threads}",
        number(row.tokens_per_second, 0),
        spread,
        number(row.to_reference and row.to_reference.median, 2),
        number(wide, 2),
        loss,
        _mebibytes(row.peak_resident_bytes),
        _mebibytes(row.peak_step_bytes),
        "; ".join(_remarks(row, verdicts)) or "-",
    ]


def _remarks(row: Row, verdicts: Sequence[Verdict]) -> list[str]:
    if row.problem:
        return [f"{row.kind}: {row.problem}"]
    return [_aim(v) for v in verdicts if (v.ours, v.precision) == (row.name, row.precision)]


def _aim(verdict: Verdict) -> str:
    measured = ratio_text(verdict.measured)
    word = "met" if verdict.met else "missed"
    return f"{measured} of {verdict.theirs}, aim {verdict.wanted:g}: {word}"


def ratio_text(ratio: Ratio) -> str:
    """Format a ratio as `1.12 (1.08..1.15)`."""
    return f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"


def _mebibytes(count: int | None) -> str:
    return number(None if count is None else count / MIB, 0)
