"""GPU benchmark report: rows to Markdown, and to the planner's numbers.

- A row is a dictionary: `part`, `what`, `status` (ok, skipped, failed, out of memory, no device),
  `why`, and its figures.
- Shares of the matmul rate and targets are computed here, from rows of the same call.
- Standard library only.

`planner.json`, seconds of one micro-batch on one rank, local work without exchanges:

    {"format": 1, "device": NAME, "matmul_flops_per_second": F, "copy_bytes_per_second": B,
     "rank": {"degree", "hidden_size", "ffn_hidden_size", "num_heads", "vocab_rows", "batch":
     {...}}, "pieces": {NAME: {"forward_seconds", "input_gradient_seconds",
     "weight_gradient_seconds" or null}}, "layer": {"forward_seconds", "input_gradient_seconds",
     "weight_gradient_seconds"}, "head":  {"forward_backward_seconds"}}
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from k2train.text import bytes_text

Row = dict[str, Any]
FORMAT = 1

# Pieces of one layer, with how often each runs in it.
LAYER = {
    "norm, its part of the sequence": 2,
    "qkv product": 1,
    "split and rotary": 1,
    "attention": 1,
    "output product": 1,
    "gate and up product": 1,
    "SwiGLU": 1,
    "down product": 1,
    "residual addition": 2,
}
HEAD = "head and loss, all gradients"


def of(rows: Sequence[Row], part: str) -> list[Row]:
    """Rows of a part."""
    return [row for row in rows if row["part"] == part]


def fine(rows: Sequence[Row], part: str, key: str) -> list[Row]:
    """Rows of a part that have a figure."""
    return [row for row in of(rows, part) if row["status"] == "ok" and row.get(key) is not None]


def matmul_rate(rows: Sequence[Row]) -> float | None:
    """Best sustained rate of this call, FLOP/s."""
    return max(
        (row["flops_per_second"] for row in fine(rows, "device", "flops_per_second")), default=None
    )


def data_sheet(rows: Sequence[Row]) -> float | None:
    """FLOP/s of the device's data sheet; None if unknown."""
    return next((row["data_sheet_flops"] for row in fine(rows, "device", "data_sheet_flops")), None)


def planner_facts(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Contents of `planner.json`; None when no piece was measured."""
    pieces = {
        row["what"]: {
            f"{key}_seconds": row.get(f"{key}_seconds")
            for key in ("forward", "input_gradient", "weight_gradient")
        }
        for row in fine(rows, "tp8", "forward_seconds")
    }

    if not pieces:
        return None
    layer = {
        key: sum(count * (pieces[name][key] or 0.0) for name, count in LAYER.items())
        for key in ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds")
        if all(name in pieces for name in LAYER)
    }
    head = pieces.get(HEAD)
    both = (
        None
        if head is None
        else (head["forward_seconds"] or 0.0) + (head["input_gradient_seconds"] or 0.0)
    )

    return {
        "format": FORMAT,
        "device": next((row["facts"]["device"] for row in fine(rows, "device", "facts")), None),
        "matmul_flops_per_second": matmul_rate(rows),
        "copy_bytes_per_second": next(
            (row["bytes_per_second"] for row in fine(rows, "device", "bytes_per_second")), None
        ),
        "rank": next((row["rank"] for row in fine(rows, "tp8", "rank")), None),
        "pieces": pieces,
        "layer": layer or None,
        "head": None if both is None else {"forward_backward_seconds": both},
    }


def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    """Format a scaled number; `-` for None."""
    return "-" if value is None else f"{value * scale:.{digits}f}"


def share(value: float | None, of_what: float | None) -> str:
    """Format a share in percent; `-` if either is unknown."""
    return "-" if value is None or not of_what else f"{100 * value / of_what:.0f} %"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown table; the first column is left-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def failures(rows: Sequence[Row]) -> str:
    """What was not measured, and why."""
    lines = [
        [row["part"], row["what"], row["status"], row["why"]]
        for row in rows
        if row["status"] != "ok"
    ]
    return (
        "\n### Not measured\n\n" + table(("part", "what", "status", "why"), lines) if lines else ""
    )


def device_text(rows: Sequence[Row]) -> str:
    """Table of the part `device`."""
    facts: dict[str, Any] = {}
    for row in fine(rows, "device", "facts"):
        facts |= (
            row["facts"]
            if not facts
            else {f"{key}, after": value for key, value in row["facts"].items()}
        )

    products = fine(rows, "device", "flops_per_second")
    lines = [
        [row["what"], number(row["flops_per_second"], 1e-12), share(row["spread"], 1.0)]
        for row in products
    ]
    text = (
        table(("device", ""), [[key, str(value)] for key, value in facts.items()]) if facts else ""
    )

    if lines:
        best = number(matmul_rate(rows), 1e-12)
        text += "\n" + table(
            ("bf16 product", "TFLOP/s", "spread"),
            [*lines, ["**the matmul rate**", f"**{best}**", ""]],
        )

    copies = fine(rows, "device", "bytes_per_second")
    return text + "".join(
        f"\nCopy on the device: {bytes_text(row['bytes_per_second'])}/s.\n" for row in copies
    )


def layers_text(rows: Sequence[Row]) -> str:
    """Table of the part `layers`."""
    rate, sheet = matmul_rate(rows), data_sheet(rows)
    lines = [
        [
            row["what"],
            number(row["forward_backward_seconds"], 1e3),
            number(row["step_seconds"], 1e3),
            share(row["spread"], 1.0),
            number(row["tokens_per_second"], 1, 0),
            number(row["flops_per_second"], 1e-12),
            share(row["flops_per_second"], rate),
            share(row["flops_per_second_causal"], rate),
            share(row["step_flops_per_second"], rate),
            share(row["flops_per_second"], sheet),
            number(row["peak_bytes"], 2**-30, 2),
            number(row["planned_bytes"], 2**-30, 2),
            number(ratio(row["peak_bytes"], row["planned_bytes"]), 1, 3),
        ]
        for row in fine(rows, "layers", "kernels")
    ]

    header = (
        "K2's layers, bf16", "forward + backward ms", "step ms", "spread", "tokens/s", "TFLOP/s",
        "of the matmul rate", "same, causal pairs only", "whole step", "of the data sheet",
        "peak GiB", "planned GiB", "measured / planned",
    )  # fmt: skip
    note = (
        "\nTFLOP/s and shares are of forward and backward unless said; model FLOPs, attention "
        "counted full.\n"
    )
    return table(header, lines) + note if lines else ""


def ratio(mine: float | None, theirs: float | None) -> float | None:
    """Quotient of two numbers; None if either is unknown."""
    return None if mine is None or not theirs else mine / theirs


def models_text(rows: Sequence[Row]) -> str:
    """Table of the part `models`."""
    measured = fine(rows, "models", "step_seconds")
    lines = []

    for row in measured:
        same = [
            other
            for other in measured
            if (other["model"], other["batch"]) == (row["model"], row["batch"])
        ]
        lines.append(
            [
                f"{row['model']}, {row['batch']}",
                row["contender"],
                number(row["step_seconds"], 1e3),
                share(row["spread"], 1.0),
                number(row["tokens_per_second"], 1, 0),
                share(row["step_flops_per_second"], matmul_rate(rows)),
                *(
                    number(against(row, same, name), 1, 2)
                    for name in ("transformers compiled", "reference compiled")
                ),
                number(row["above_held_bytes"], 2**-30, 2),
                " ".join(f"{loss:.2f}" for loss in (row["losses"][0], row["losses"][-1])),
                "in turns" if row["in_turns"] > 1 else "alone",
            ]
        )

    header = (
        "whole model, bf16", "contender", "step ms", "spread", "tokens/s", "of the matmul rate",
        "/ transformers compiled", "/ reference compiled", "GiB above states", "loss, step 1 and 3",
        "timed",
    )  # fmt: skip
    return table(header, lines) if lines else ""


def against(row: Row, same: Sequence[Row], name: str) -> float | None:
    """Tokens per second of a row over those of a contender at the same work."""
    other = next((r for r in same if r["contender"] == name), None)
    return None if other is None else row["tokens_per_second"] / other["tokens_per_second"]


def tp8_text(rows: Sequence[Row]) -> str:
    """Table of the part `tp8`."""
    lines = []
    for row in fine(rows, "tp8", "forward_seconds"):
        line = [row["what"]]
        for key in ("forward", "input_gradient", "weight_gradient"):
            line += [
                number(row.get(f"{key}_seconds"), 1e6, 0),
                number(row.get(f"{key}_flops_per_second"), 1e-12),
            ]
        lines.append([*line, "graph" if row["graph"] else "eager"])

    header = (
        "a rank of eight, us (TFLOP/s)",
        "forward",
        "",
        "input gradient",
        "",
        "weight gradient",
        "",
        "launched",
    )

    return table(header, lines) if lines else ""


def host_text(rows: Sequence[Row]) -> str:
    """Table of the part `host`."""
    measured = fine(rows, "host", "profiled_seconds")
    categories = list(measured[0]["seconds"]) if measured else []

    lines = [
        [
            row["what"],
            number(row["plain_seconds"], 1e3),
            share(row["busy_share"], 1.0),
            str(row["kernels"]),
            str(row["synchronisations"]),
            str(row["to_host"]),
            *(share(row["seconds"][name], row["profiled_seconds"]) for name in categories),
            share(row["rest_seconds"], row["profiled_seconds"]),
        ]
        for row in measured
    ]

    header = (
        "a step",
        "ms",
        "busy",
        "launches",
        "synchronisations",
        "copies to host",
        *categories,
        "rest",
    )

    return table(header, lines) if lines else ""


def aims_text(rows: Sequence[Row]) -> str:
    """Table of the targets."""
    lines: list[list[str]] = []

    def add(what: str, found: float | None, aim: str, met: Callable[[float], bool]) -> None:
        if found is not None:
            lines.append([what, f"{found:.3f}", aim, "met" if met(found) else "missed"])

    rate, layers = matmul_rate(rows), fine(rows, "layers", "kernels")

    for batch in dict.fromkeys(row["batch"] for row in layers):
        same = [row for row in layers if row["batch"] == batch]
        best = max(same, key=lambda row: row["flops_per_second"] or 0.0)
        for row in [same[0], *([best] if best is not same[0] else [])]:
            found = ratio(row["flops_per_second"], rate)
            add(
                f"K2's layers, {row['what']}: share of the matmul rate",
                found,
                ">= 0.75",
                lambda x: x >= 0.75,
            )
        for row in same:
            found = ratio(row["peak_bytes"], row["planned_bytes"])
            add(
                f"K2's layers, {row['what']}: peak / plan",
                found,
                "0.97 to 1.03",
                lambda x: 0.97 <= x <= 1.03,
            )

    measured = fine(rows, "models", "step_seconds")
    for row in measured:
        same = [
            other
            for other in measured
            if (other["model"], other["batch"]) == (row["model"], row["batch"])
        ]
        if row["contender"].startswith("k2train"):
            found = against(row, same, "transformers compiled")
            add(f"{row['what']} / transformers compiled", found, ">= 1.15", lambda x: x >= 1.15)

    return table(("aim", "found", "wanted", ""), lines) if lines else ""


TEXTS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "Device": device_text,
    "K2's layers": layers_text,
    "Whole models": models_text,
    "A tensor-parallel rank's pieces": tp8_text,
    "Host": host_text,
    "Aims": aims_text,
}


def markdown(rows: Sequence[Row], dry_run: bool, seconds: float) -> str:
    """The whole report: failures first, then the tables, the targets last."""
    head = (
        f"## One GPU, {seconds:.0f} s\n"
        if not dry_run
        else f"## Dry run on the CPU, {seconds:.0f} s: no figure means anything\n"
    )
    parts = [head, failures(rows)]
    parts += [f"\n### {title}\n\n{text}" for title, make in TEXTS.items() if (text := make(rows))]
    return "".join(parts)
