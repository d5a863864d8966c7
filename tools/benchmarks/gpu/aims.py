"""Aims of a GPU: what is measured against what is wanted, from rows of one call.

- K2's layers: shares of the matmul rate that the same call measured, since no device sustains its
  data sheet. Whole models: MFU, which is of the data sheet, to compare with published figures.
- An aim without a figure is not judged, and says why. It never counts as met.
- Standard library only.

Alternatives considered:
- Judging only what was measured: a part that died would leave no missed aim behind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.rows import (
    FAIR,
    Row,
    against,
    data_sheet,
    fine,
    matmul_rate,
    of,
    peak_ratio,
    ratio,
    work_text,
)
from k2train.text import markdown_table

State = Literal["met", "missed", "not judged", "not possible here"]
LAYERS = {"auto": 0.85, "without attention": 0.90}
"""Share of the matmul rate by case of the part `layers`."""
MFU = {"LLaMA 1.3B": 0.48, "LLaMA 2.7B": 0.53, "LLaMA 6.7B": 0.58}
"""Model FLOPs utilisation at 2048 tokens and several micro-batches."""
MFU_WORK = "4 x 2048 x 4"
BUSY = 0.97
NEAR = 0.03
"""Distance of the peak from the plan, as a share of the plan."""
PRICE = 0.03
"""Time that determinism may cost."""


@dataclass(frozen=True)
class Aim:
    """One figure beside what is wanted; `found` is None where there is none."""

    part: str
    what: str
    found: float | None
    wanted: str
    state: State
    why: str = ""


def aims_of(rows: Sequence[Row], parts: Sequence[str] | None = None) -> list[Aim]:
    """All aims of the parts that have rows, or of `parts`."""
    chosen = dict.fromkeys(row["part"] for row in rows) if parts is None else parts
    makers = {"layers": _layers, "models": _models, "host": _host, "price": _price}
    return [aim for part in chosen if part in makers for aim in makers[part](rows)]


def aims_text(aims: Sequence[Aim]) -> str:
    """Markdown table of aims."""
    lines = [
        [aim.what, "-" if aim.found is None else f"{aim.found:.3f}", aim.wanted, _state(aim)]
        for aim in aims
    ]
    return "\n".join(markdown_table(("aim", "found", "wanted", ""), lines)) + "\n"


def _state(aim: Aim) -> str:
    return f"{aim.state}: {aim.why}" if aim.why else aim.state


def _at_least(part: str, what: str, found: float | None, wanted: float, why: str = "") -> Aim:
    text = f">= {wanted:.2f}"
    if found is None:
        return Aim(part, what, None, text, "not judged", why or "no figure")
    return Aim(part, what, found, text, "met" if found >= wanted else "missed")


def _layers(rows: Sequence[Row]) -> Iterator[Aim]:
    measured, rate = fine(rows, "layers", "flops_per_second"), matmul_rate(rows)
    for case, wanted in LAYERS.items():
        found = [row for row in measured if row["what"].endswith(f": {case}")]
        for row in found:
            what = f"K2's layers, {row['what']}: share of the matmul rate"
            share = ratio(row["flops_per_second"], rate)
            why = "the part device has measured no matmul rate"
            yield _at_least("layers", what, share, wanted, why)
        if not found:
            what = f"K2's layers, {case}: share of the matmul rate"
            yield _at_least("layers", what, None, wanted, reason(rows, "layers", case))

    for row in measured:
        found_ratio = peak_ratio(row)
        if found_ratio is not None:
            met = abs(found_ratio - 1) <= NEAR
            what = f"K2's layers, {row['what']}: peak / plan"
            state: State = "met" if met else "missed"
            yield Aim("layers", what, found_ratio, f"{1 - NEAR:.2f} to {1 + NEAR:.2f}", state)


def _models(rows: Sequence[Row]) -> Iterator[Aim]:
    timed, sheet = fine(rows, "models", "step_seconds"), data_sheet(rows)
    ours = [row for row in timed if row["contender"].startswith("k2train")]

    for model, wanted in MFU.items():
        what = f"{model}, {MFU_WORK}: MFU"
        found = [row for row in ours if row["model"] == model and work_text(row) == MFU_WORK]
        if not found and (why := _too_large(rows, model)):
            yield Aim("models", what, None, f">= {wanted:.2f}", "not possible here", why)
            continue
        best = max((row["step_flops_per_second"] for row in found), default=None)
        why = reason(rows, "models", model) if best is None else "no data sheet of this device"
        yield _at_least("models", what, ratio(best, sheet), wanted, why)

    for row in ours:
        beside = against(row, timed, FAIR)
        if row["microbatches"] > 1 and beside is not None:
            yield _at_least("models", f"{row['what']} / {FAIR}", beside, 1.0)


def _too_large(rows: Sequence[Row], model: str) -> str:
    """Why the states of a model do not fit here; "" where they do or nobody tried."""
    return next(
        (
            row["why"]
            for row in of(rows, "models")
            if row["status"] == "unavailable"
            and row.get("model") == model
            and row["why"].startswith("k2train: states alone")
        ),
        "",
    )


def _host(rows: Sequence[Row]) -> Iterator[Aim]:
    measured = fine(rows, "host", "busy_share")
    for row in measured:
        yield _at_least("host", f"{row['what']}: device busy", row["busy_share"], BUSY)
    if not measured:
        yield _at_least("host", "device busy", None, BUSY, reason(rows, "host", ""))


def _price(rows: Sequence[Row]) -> Iterator[Aim]:
    wanted, measured = f"<= {PRICE:.2f}", fine(rows, "price", "price")
    for row in measured:
        state: State = "met" if row["price"] <= PRICE else "missed"
        yield Aim("price", f"{row['what']}: price of determinism", row["price"], wanted, state)
    if not measured:
        why = reason(rows, "price", "")
        yield Aim("price", "price of determinism", None, wanted, "not judged", why)


def reason(rows: Sequence[Row], part: str, word: str) -> str:
    """Why a part has no figure whose row names `word`."""
    bad = [row for row in of(rows, part) if row["status"] != "ok"]
    named = [row for row in bad if word in row["what"]] or bad
    return f"{named[0]['status']}: {named[0]['why']}" if named else "no figure"
