"""Page of the report: one self-contained HTML file of figures, tables and facts of a run.

- No address is in it, so nothing is asked for over the network.
- Names from data, configs and ledgers are escaped.
- The file is replaced at once, so that a browser that loads it again sees a whole page.
"""

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from k2train.files import AtomicFile
from k2train.report.axes import axis_tables
from k2train.report.collect import RunView
from k2train.report.curves import figures
from k2train.report.figure import render
from k2train.report.script import SCRIPT
from k2train.report.style import CSS
from k2train.report.table import Table
from k2train.report.tables import facts, tables, tiles
from k2train.report.time_account import KINDS, Spent, summed
from k2train.text import duration, safe

DOCTYPE = b"<!doctype html>"
"""Begin of every page."""
NO_ICON = '<link rel="icon" href="data:,">'
"""A browser would ask for an icon otherwise."""
AXES = {"step": "steps", "tokens": "tokens", "time": "time"}
"""Axis of the figures, by its name in the table -> what its switch says."""


def write_report(
    path: Path, run: RunView, other: RunView | None = None, refresh_seconds: int | None = None
) -> int:
    """Write the page of a run, and return its size in bytes. Raises OSError.

    `other` is drawn beside it. `refresh_seconds` has the browser load the page again.
    """
    content = page(run, other, refresh_seconds).encode()
    # A watch and a single report may write the page at once.
    with AtomicFile(path, f".{os.getpid()}") as stream:
        stream.write(content)
    return len(content)


def page(run: RunView, other: RunView | None = None, refresh_seconds: int | None = None) -> str:
    """Return the page as HTML."""
    title = run.name if other is None else f"{run.name} and {other.name}"
    shown = [part for part in (render(figure) for figure in figures(run, other)) if part]
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{refresh}'
        f"{NO_ICON}<title>{_text(title)}</title><style>{CSS}</style>"
    )
    body = [_header(run, title)]
    if other is not None:
        body.append(_side_by_side(run, other))
    runs = [run] if other is None else [run, other]
    curves = [_switch(), *shown] if shown else ["<p>No step is on record yet.</p>"]
    body += ["<h2>Curves</h2><section>", *curves, "</section>"]
    spent = summed(run.times)
    for table in tables(run):
        if table.rows:
            body.append(f"<h2>{_text(table.title)}</h2>")
            body += [_bar(spent)] if table.title == "Time" else []
            body.append(_table(table))
    body.append(_facts(run))
    return (
        f'{DOCTYPE.decode()}<html lang="en"><head>{head}</head><body>{"".join(body)}'
        f'<script type="application/json" id="axes">{_json(axis_tables(runs))}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _header(run: RunView, title: str) -> str:
    notes = "".join(f'<p class="warning">{_text(note)}</p>' for note in run.notes)
    parts = "".join(f"<div><dt>{_text(n)}</dt><dd>{_text(v)}</dd></div>" for n, v in tiles(run))
    as_of = run.entries[-1].time[:19].replace("T", " ")
    return (
        f'<header><h1>{_text(title)}</h1><p class="status">{_text(run.status)}; last event '
        f'{_text(as_of)} UTC</p>{notes}<dl class="tiles">{parts}</dl></header>'
    )


def _switch() -> str:
    """The choice of the axis; the script shows it."""
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{name}">{said}</label>'
        for name, said in AXES.items()
    )
    return f'<fieldset class="switch" hidden><legend>over</legend>{choices}</fieldset>'


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _side_by_side(run: RunView, other: RunView) -> str:
    mine, theirs = dict(tiles(run)), dict(tiles(other))
    rows = [
        (name, mine.get(name, "-"), theirs.get(name, "-"))
        for name in dict.fromkeys([*mine, *theirs])
    ]
    return "<h2>Side by side</h2>" + _table(Table("", ("", run.name, other.name), rows))


def _bar(spent: Spent) -> str:
    """Where the time of the run went, as a bar with its legend."""
    whole = spent.total
    if not whole:
        return ""
    shares = [(name, getattr(spent, name)) for name in KINDS if getattr(spent, name) > 0]
    parts = "".join(
        f'<span class="s-{name}" style="flex:{seconds / whole:.6f}" '
        f'title="{name}: {duration(seconds)}"></span>'
        for name, seconds in shares
    )
    legend = "".join(
        f'<li><span class="key s-{name}"></span>{name} {100 * seconds / whole:.1f}%</li>'
        for name, seconds in shares
    )
    return (
        f'<div class="bar" role="img" aria-label="where the time went">{parts}</div>'
        f'<ul class="legend">{legend}</ul>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in table.headings)
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{note}"
    )


def _cells(row: Sequence[str]) -> str:
    return "".join(f"<td>{_text(cell)}</td>" for cell in row)


def _facts(run: RunView) -> str:
    parts = "".join(f"<dt>{_text(n)}</dt><dd>{_text(v)}</dd>" for n, v in facts(run))
    config = (
        f"<details><summary>config.yaml</summary><pre>{_text(run.config_text)}</pre></details>"
        if run.config_text
        else ""
    )
    return f'<h2>Run</h2><dl class="facts">{parts}</dl>{config}'


def _text(value: str) -> str:
    return escape(safe(value))
