"""Pages of a gallery: an overview, the prompts, the evaluation; they load their data by script.

- A policy in each page allows the scripts and the style beside it, and nothing else: no network, no
  script or style inside a page, whatever a text holds.
- The overview needs no script.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from k2train.report.page import NO_ICON
from k2train.text import counted, safe

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
KEYS = (
    ("j k", "next and previous"),
    ("← →", "the last column's checkpoint back and on; with Shift the first one's"),
    ("d", "mark differences, or not"),
    ("/", "search"),
    ("Esc", "end the search"),
    ("?", "this list"),
)
PROMPT_FILTERS = (
    ("all", "all"),
    ("changed", "first and last column differ"),
    ("same", "they are the same"),
    ("missing", "an answer is missing"),
)
TASK_FILTERS = (
    ("all", "all"),
    ("right", "right in the last column"),
    ("wrong", "wrong in the last column"),
    ("changed", "answer changed from the first to the last"),
    ("better", "became right"),
    ("worse", "became wrong"),
)


@dataclass(frozen=True)
class About:
    """What the pages say of a gallery: name of the run, notes, and what there is."""

    run: str
    checkpoints: int
    prompts: int
    tasks: Sequence[str]
    notes: Sequence[str] = ()
    trace_command: str | None = None
    """How to get the spans in the training data, where they are not there."""


def pages(about: About) -> list[tuple[str, str]]:
    """Return name and HTML of each page, the overview first; `{files}` stands for a folder."""
    found = [("index.html", _overview(about))]
    if about.prompts:
        body = _workbench(about, "prompts", "Prompts", PROMPT_FILTERS, "")
        scripts = ["store", "text", "controls", "keys", "prompts"]
        found.append(("prompts.html", _page(f"{about.run}: prompts", body, scripts)))
    if about.tasks:
        task = '<label>Task <select id="task"></select></label>'
        body = _workbench(about, "evaluation", "Evaluation", TASK_FILTERS, task)
        scripts = ["store", "text", "controls", "keys", "chart", "evaluation"]
        found.append(("evaluation.html", _page(f"{about.run}: evaluation", body, scripts)))
    return found


def _page(title: str, body: str, scripts: Sequence[str]) -> str:
    loaded = "".join(f'<script src="{{files}}/{name}.js" defer></script>' for name in scripts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width"><meta name="referrer" '
        f'content="no-referrer">{NO_ICON}<title>{_text(title)}</title>'
        f'<link rel="stylesheet" href="{{files}}/gallery.css">{loaded}</head>'
        f"<body>{body}</body></html>\n"
    )


def _navigation(about: About, here: str) -> str:
    links = [("index.html", "overview", "Overview")]
    links += [("prompts.html", "prompts", "Prompts")] if about.prompts else []
    links += [("evaluation.html", "evaluation", "Evaluation")] if about.tasks else []
    parts = (
        f'<strong aria-current="page">{label}</strong>'
        if name == here
        else f'<a href="{file}">{label}</a>'
        for file, name, label in links
    )
    return f'<nav aria-label="Pages">{"".join(parts)}</nav>'


def _overview(about: About) -> str:
    tiles = [
        ("checkpoints", f"{about.checkpoints:,}"),
        ("prompts", f"{about.prompts:,}"),
        ("tasks", f"{len(about.tasks):,}"),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    notes = "".join(f'<p class="warning">{_text(note)}</p>' for note in about.notes)
    lines = []
    if about.prompts:
        count = counted(about.prompts, "prompt")
        lines.append(f'<li><a href="prompts.html">Prompts</a>: {count} down the checkpoints</li>')
    if about.tasks:
        names = _text(", ".join(about.tasks))
        lines.append(f'<li><a href="evaluation.html">Evaluation</a>: {names}</li>')
    return _page(
        f"{about.run}: gallery",
        f"<header><h1>{_text(about.run)}</h1>{_navigation(about, 'overview')}</header>{notes}"
        f'<dl class="tiles">{shown}</dl><ul>{"".join(lines)}</ul>{_trace(about)}',
        (),
    )


def _workbench(
    about: About, here: str, heading: str, filters: Sequence[tuple[str, str]], task: str
) -> str:
    options = "".join(f'<option value="{value}">{label}</option>' for value, label in filters)
    score = '<section id="scores" aria-label="Scores"></section>' if here == "evaluation" else ""
    return (
        f"<header><h1>{_text(about.run)}</h1>{_navigation(about, here)}"
        '<p class="status" id="how"></p></header>'
        '<noscript><p class="warning">This page shows its texts by script.</p></noscript>'
        f'<form role="search">{task}<label>Search <input type="search" id="search" '
        'autocomplete="off" spellcheck="false"></label>'
        f'<label>Show <select id="show">{options}</select></label><span id="columns"></span>'
        '<label><input type="checkbox" id="mark" checked> Mark differences</label>'
        '<button type="button" id="help" aria-haspopup="dialog">Keys</button></form>'
        f'<p class="status" id="status" role="status"></p>{_trace(about)}{score}<main>'
        f'<div id="list" role="listbox" tabindex="0" aria-label="{heading}"></div>'
        f'<div id="shown"></div></main>{_keys()}'
    )


def _trace(about: About) -> str:
    if about.trace_command is None:
        return ""
    return (
        '<p class="note" id="trace">Which answers are in the training data is shown once '
        f"they have an index: <code>{_text(about.trace_command)}</code>, then write the gallery "
        "again.</p>"
    )


def _keys() -> str:
    rows = "".join(
        f"<dt>{' '.join(f'<kbd>{key}</kbd>' for key in keys.split())}</dt><dd>{does}</dd>"
        for keys, does in KEYS
    )
    return (
        '<dialog id="keys" aria-labelledby="keys_title"><h2 id="keys_title">Keys</h2>'
        f'<dl class="facts">{rows}</dl><button type="button" id="close">Close</button></dialog>'
    )


def _text(value: str) -> str:
    # Braces would be taken for the folder's place.
    return escape(safe(value)).replace("{", "&#123;").encode(errors="replace").decode()
