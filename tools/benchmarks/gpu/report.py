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

from k2train.text import bytes_text, markdown_table

Row = dict[str, Any]
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
    return "-" if value is None or not of_what else f"{100 * value / of_what:.0f} %"


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


def peak_ratio(row: Row) -> float | None:
    """Measured over planned peak of a row; None if either is unknown."""
    return ratio(row["peak_bytes"], row["planned_bytes"])


def ratio(mine: float | None, theirs: float | None) -> float | None:
    """Quotient of two numbers; None if either is unknown."""
    return None if mine is None or not theirs else mine / theirs


def models_text(rows: Sequence[Row]) -> str:
    """Table of the part `models`."""
    measured = fine(rows, "models", "step_seconds")

    def beside(name: str) -> tuple[str, Cell]:
        return f"/ {name}", lambda row: number(against(row, measured, name), 1, 2)

    return columns(
        measured,
        ("whole model, bf16", lambda row: f"{row['model']}, {row['batch']}"),
        ("contender", words("contender")),
        ("step ms", scaled("step_seconds", 1e3)),
        ("spread", part_of("spread", 1.0)),
        ("tokens/s", scaled("tokens_per_second", 1, 0)),
        ("of the matmul rate", part_of("step_flops_per_second", matmul_rate(rows))),
        beside("transformers compiled"),
        beside("reference compiled"),
        ("GiB above states", scaled("above_held_bytes", 2**-30, 2)),
        ("loss, step 1 and 3", lambda row: f"{row['losses'][0]:.2f} {row['losses'][-1]:.2f}"),
        ("timed", lambda row: "in turns" if row["in_turns"] > 1 else "alone"),
    )


def against(row: Row, rows: Sequence[Row], name: str) -> float | None:
    """Tokens per second of a row over those of a contender at the same model and batch."""
    wanted = (row["model"], row["batch"], name)
    found = (r for r in rows if (r["model"], r["batch"], r["contender"]) == wanted)
    other = next(found, None)
    return None if other is None else row["tokens_per_second"] / other["tokens_per_second"]


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

    return columns(
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
            what, found = f"K2's layers, {row['what']}", ratio(row["flops_per_second"], rate)
            add(f"{what}: share of the matmul rate", found, ">= 0.75", lambda x: x >= 0.75)
        for row in same:
            what, near = f"K2's layers, {row['what']}", "0.97 to 1.03"
            add(f"{what}: peak / plan", peak_ratio(row), near, lambda x: 0.97 <= x <= 1.03)

    measured = fine(rows, "models", "step_seconds")
    for row in measured:
        if row["contender"].startswith("k2train"):
            found = against(row, measured, "transformers compiled")
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
