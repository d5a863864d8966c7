"""GPU benchmark report: rows to Markdown, and to the planner's numbers.

- Shares of the matmul rate are computed here, from rows of the same call.
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

from benchmarks.gpu.aims import aims_of, aims_text
from benchmarks.gpu.rows import (
    FAIR,
    Row,
    against,
    data_sheet,
    fine,
    matmul_rate,
    peak_ratio,
    work_text,
)
from k2train.text import bytes_text, clean, markdown_table

Cell = Callable[[Row], str]
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
        "device": next((row["facts"].get("device") for row in fine(rows, "device", "facts")), None),
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
    return "-" if value is None or not of_what else f"{100 * value / of_what:.0f}%"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown table; the first column is left-aligned."""
    return "\n".join(markdown_table(header, lines, numbers=True)) + "\n"


def columns(rows: Sequence[Row], *given: tuple[str, Cell]) -> str:
    """Table with a line per row and these columns; empty without rows."""
    lines = [[cell(row) for _, cell in given] for row in rows]
    return table([heading for heading, _ in given], lines) if lines else ""


def words(key: str) -> Cell:
    """Column of a figure as it is."""
    return lambda row: str(row[key])


def scaled(key: str, scale: float, digits: int = 1) -> Cell:
    """Column of a scaled figure."""
    return lambda row: number(row.get(key), scale, digits)


def part_of(key: str, whole: float | None) -> Cell:
    """Column of a figure as a share of `whole`."""
    return lambda row: share(row[key], whole)


def failures(rows: Sequence[Row]) -> str:
    """What was not measured, and why."""
    keys = ("part", "what", "status", "why")
    bad = [row for row in rows if row["status"] != "ok"]
    text = columns(bad, *((key, words(key)) for key in keys))
    return f"\n### Not measured\n\n{text}" if text else ""


def device_text(rows: Sequence[Row]) -> str:
    """Table of the part `device`."""
    facts: dict[str, Any] = {}
    for row in fine(rows, "device", "facts"):
        facts |= (
            row["facts"]
            if not facts
            else {f"{key}, after": value for key, value in row["facts"].items()}
        )

    text = (
        table(("device", ""), [[key, str(value)] for key, value in facts.items()]) if facts else ""
    )

    products = columns(
        fine(rows, "device", "flops_per_second"),
        ("bf16 product", words("what")),
        ("TFLOP/s", scaled("flops_per_second", 1e-12)),
        ("spread", part_of("spread", 1.0)),
    )
    if products:
        best = number(matmul_rate(rows), 1e-12)
        text += f"\n{products}| **the matmul rate** | **{best}** |  |\n"

    copies = fine(rows, "device", "bytes_per_second")
    return text + "".join(
        f"\nCopy on the device: {bytes_text(row['bytes_per_second'])}/s.\n" for row in copies
    )


def layers_text(rows: Sequence[Row]) -> str:
    """Table of the part `layers`."""
    rate, sheet = matmul_rate(rows), data_sheet(rows)
    text = columns(
        fine(rows, "layers", "kernels"),
        ("K2's layers, bf16", words("what")),
        ("forward + backward ms", scaled("forward_backward_seconds", 1e3)),
        ("step ms", scaled("step_seconds", 1e3)),
        ("spread", part_of("spread", 1.0)),
        ("tokens/s", scaled("tokens_per_second", 1, 0)),
        ("TFLOP/s", scaled("flops_per_second", 1e-12)),
        ("of the matmul rate", part_of("flops_per_second", rate)),
        ("same, causal pairs only", part_of("flops_per_second_causal", rate)),
        ("whole step", part_of("step_flops_per_second", rate)),
        ("of the data sheet", part_of("flops_per_second", sheet)),
        ("peak GiB", scaled("peak_bytes", 2**-30, 2)),
        ("planned GiB", scaled("planned_bytes", 2**-30, 2)),
        ("measured / planned", lambda row: number(peak_ratio(row), 1, 3)),
    )
    note = (
        "\nTFLOP/s and shares are of forward and backward unless said; model FLOPs, attention "
        "counted full.\n"
    )
    return text + note if text else ""


def models_text(rows: Sequence[Row]) -> str:
    """Table of the part `models`."""
    measured = fine(rows, "models", "step_seconds")

    def beside(name: str) -> tuple[str, Cell]:
        return f"/ {name}", lambda row: number(against(row, measured, name), 1, 2)

    return columns(
        measured,
        ("whole model, bf16", lambda row: f"{row['model']}, {work_text(row)}"),
        ("contender", words("contender")),
        ("step ms", scaled("step_seconds", 1e3)),
        ("spread", part_of("spread", 1.0)),
        ("tokens/s", scaled("tokens_per_second", 1, 0)),
        ("MFU", part_of("step_flops_per_second", data_sheet(rows))),
        ("of the matmul rate", part_of("step_flops_per_second", matmul_rate(rows))),
        beside(FAIR),
        beside("transformers compiled"),
        beside("reference compiled"),
        ("GiB above states", scaled("above_held_bytes", 2**-30, 2)),
        ("loss, step 1 and 3", lambda row: f"{row['losses'][0]:.2f} {row['losses'][-1]:.2f}"),
        ("timed", lambda row: "in turns" if row["in_turns"] > 1 else "alone"),
    )


def tp8_text(rows: Sequence[Row]) -> str:
    """Table of the part `tp8`."""
    timed: list[tuple[str, Cell]] = []
    for key in ("forward", "input_gradient", "weight_gradient"):
        timed.append((key.replace("_", " "), scaled(f"{key}_seconds", 1e6, 0)))
        timed.append(("", scaled(f"{key}_flops_per_second", 1e-12)))
    return columns(
        fine(rows, "tp8", "forward_seconds"),
        ("a rank of eight, us (TFLOP/s)", words("what")),
        *timed,
        ("launched", lambda row: "graph" if row["graph"] else "eager"),
    )


def host_text(rows: Sequence[Row]) -> str:
    """Table of the part `host`."""
    measured = fine(rows, "host", "profiled_seconds")

    def category(name: str) -> tuple[str, Cell]:
        return name, lambda row: share(row["seconds"][name], row["profiled_seconds"])

    text = columns(
        measured,
        ("a step", words("what")),
        ("ms", scaled("plain_seconds", 1e3)),
        ("busy", part_of("busy_share", 1.0)),
        ("launches", words("kernels")),
        ("synchronisations", words("synchronisations")),
        ("copies to host", words("to_host")),
        *map(category, measured[0]["seconds"] if measured else ()),
        ("rest", lambda row: share(row["rest_seconds"], row["profiled_seconds"])),
    )
    return text + "".join(map(top_text, measured))


def top_text(row: Row) -> str:
    """Table of the kernels that took most of a profiled step."""
    lines = [
        [clean(name)[:100], number(seconds, 1e3, 2), number(count), share(seconds, whole)]
        for name, seconds, count in row["top"]
        if (whole := row["profiled_seconds"])
    ]
    heading = f"\nKernels by time, {row['what']}:\n\n"
    return heading + table(("kernel", "ms a step", "calls", "of the step"), lines) if lines else ""


TEXTS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "Device": device_text,
    "K2's layers": layers_text,
    "Whole models": models_text,
    "A tensor-parallel rank's pieces": tp8_text,
    "Host": host_text,
}


def markdown(rows: Sequence[Row], dry_run: bool, seconds: float) -> str:
    """The whole report: failures first, then the tables, the aims last."""
    head = (
        f"## One GPU, {seconds:.0f} s\n"
        if not dry_run
        else f"## Dry run on the CPU, {seconds:.0f} s: no figure means anything\n"
    )
    parts = [head, failures(rows)]
    parts.append(tables(rows))
    aims = [] if dry_run else aims_of(rows)
    if aims:
        parts.append(f"\n### Aims\n\n{aims_text(aims)}")
    return "".join(parts)


def tables(rows: Sequence[Row]) -> str:
    """The tables of all parts that have figures, each with its heading."""
    found = ((title, make(rows)) for title, make in TEXTS.items())
    return "".join(f"\n### {title}\n\n{text}" for title, text in found if text)
