"""Markdown page of a GPU check: verdicts, aims, figures, and what is not there; for `docs/gpu.md`.

- Verdicts come first. What has failed or was left out is named before any figure.
- Standard library only.
"""

from benchmarks.gpu.aims import aims_text
from benchmarks.gpu.report import failures, tables
from gpu_checks.results import CheckResult
from k2train.text import clean, markdown_table

LONGEST_REASON = 200


def page(result: CheckResult) -> str:
    """The whole page."""
    name = clean(result.device.get("device", "an unknown device"))
    commit = clean(result.device.get("commit", "unknown"))
    held = sum(part.verdict == "held" for part in result.parts)

    lines = [f"## Check of {name}, commit {commit}", ""]
    if result.dry_run:
        lines += ["**A dry run on the CPU with tiny sizes: no figure means anything.**", ""]
    lines += [f"{held} of {len(result.parts)} parts ran and held, in {result.seconds:.0f} s.", ""]
    lines += verdict_lines(result)

    text = "\n".join(lines) + "\n"
    if result.aims:
        text += f"\n### Aims\n\n{aims_text(result.aims)}"
    text += device_text(result) + checks_text(result)
    # The facts are above; the tables below are of the timing parts.
    return text + tables(_without_facts(result)) + failures(list(result.rows))


def verdict_lines(result: CheckResult) -> list[str]:
    """Table with a line for each part."""
    rows = [
        [part.part, part.proves, f"**{part.verdict}**", str(part.checks), _short(part.why)]
        for part in result.parts
    ]
    return markdown_table(("part", "proves", "verdict", "results", "why"), rows)


def device_text(result: CheckResult) -> str:
    """Table of device and software."""
    lines = [[key, clean(value)] for key, value in result.device.items()]
    table = "\n".join(markdown_table(("device", ""), lines))
    return f"\n### Device and software\n\n{table}\n" if lines else ""


def checks_text(result: CheckResult) -> str:
    """Table of the figures of the checks that compare numbers."""
    keys = ("loss_distance", "gradient_distance", "states", "code", "backend", "ranks")
    lines = []
    for row in result.rows:
        found = [
            f"{key.replace('_', ' ')} {_figure(row[key])}"
            for key in keys
            if row["status"] == "ok" and row.get(key) is not None
        ]
        if found:
            lines.append([row["part"], clean(row["what"]), ", ".join(found)])
    table = "\n".join(markdown_table(("part", "check", "found"), lines))
    return f"\n### Numbers compared\n\n{table}\n" if lines else ""


def _without_facts(result: CheckResult) -> list[dict[str, object]]:
    return [row for row in result.rows if not row.get("facts")]


def _figure(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else clean(value)


def _short(text: str) -> str:
    flat = clean(text)
    return flat if len(flat) <= LONGEST_REASON else f"{flat[:LONGEST_REASON]}..."
