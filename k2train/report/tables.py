"""Tables of the report: key figures, chunks with their checkpoints, time, energy and scores.

- Cells are plain text; the page escapes them.
"""

from statistics import median

from k2train.checkpoint.manifest import read_manifest as read_checkpoint
from k2train.config.schema import Config
from k2train.errors import UserError
from k2train.evaluation.scores import score_table
from k2train.record.energy import Site, energy_text
from k2train.record.events import (
    CheckpointFollowed,
    CheckpointSaved,
    Resumed,
    ResumeDrilled,
    RolledBack,
    Spike,
    Started,
    of_kind,
)
from k2train.record.exposure import exposures
from k2train.report.collect import RunView
from k2train.report.energy import energy_of, site_of
from k2train.report.energy import summed as summed_energy
from k2train.report.history_tables import changes_table, events_table, starts_table
from k2train.report.table import Table
from k2train.report.time_account import KINDS, Spent, summed
from k2train.text import brief, duration, number, span_text, tokens_text


def tables(run: RunView) -> list[Table]:
    """All tables of a run; empty ones are left out by the page."""
    return [
        chunk_table(run),
        evaluation_table(run),
        starts_table(run),
        time_table(run),
        energy_table(run),
        events_table(run),
        changes_table(run),
        Table(
            "Held-out loss",
            ("step", "set", "loss", "rows", "targets", "by subset"),
            _scores(run),
        ),
    ]


def tiles(run: RunView) -> list[tuple[str, str]]:
    """Key figures of a run: name and value."""
    spent, last = summed(run.times), run.kept[-1] if run.kept else None
    found = [("steps", _of_total(run))]
    if last is not None:
        found += [("tokens", tokens_text(last.consumed_tokens)), ("loss", f"{last.loss:.4f}")]
    if run.kept_scores:
        found.append(("held-out loss", f"{run.kept_scores[-1].loss:.4f}"))
    speeds = [r.tokens_per_second for r in run.kept if r.tokens_per_second > 0]
    if speeds:
        found.append(("tokens/s, median", number(median(speeds), 0)))
    shares = [r.mfu for r in run.kept if r.mfu is not None]
    if shares:
        found.append(("MFU, median", f"{100 * median(shares):.1f}%"))
    started = of_kind(run.entries, Started)
    if started:
        found.append(("parameters", tokens_text(started[0].parameters)))
        found.append(("processes", number(_world_size(run))))
    spikes = [e for e in of_kind(run.entries, Spike) if e.kind in ("opened", "restart")]
    site = site_of(run)
    joules = summed_energy(energy_of(run, site)).total
    return [
        *found,
        ("time since it began", duration(spent.total)),
        ("effective training time", f"{100 * spent.effective_share:.1f}%"),
        *([("energy", energy_text(site, joules))] if joules else []),
        ("starts", str(len(run.times))),
        ("spikes", str(len(spikes))),
        ("returns", str(len(of_kind(run.entries, RolledBack)))),
    ]


def chunk_table(run: RunView) -> Table:
    """Chunks as they were read: hash, mix, tokens, loss; the checkpoint behind each, its state."""
    saved = {event.chunks_consumed: event for event in run.checkpoints}
    seen = {one.chunk: one for one in exposures(run.kept) if one.subset == "all"}
    infos = {} if run.data is None else {info.name: info for info in run.data.chunks}
    rows = []
    read = _steps_by_chunk(run)
    for event in run.chunks:
        info = infos.get(event.chunk)
        mix = {} if info is None else info.tokens_per_subset
        whole = sum(mix.values()) or 1
        one, after = seen.get(event.chunk), saved.get(event.order_index + 1)
        rows.append(
            (
                str(event.order_index),
                event.chunk,
                brief(info.sha256) if info else "-",
                ", ".join(f"{name} {100 * n / whole:.0f}%" for name, n in mix.items()) or "-",
                span_text(*read[event.chunk]) if event.chunk in read else "-",
                tokens_text(one.tokens) if one else "-",
                f"{one.loss:.4f}" if one else "-",
                after.checkpoint if after else "-",
                _held_out(after),
                _root(run, after),
                _replay_state(run, after),
            )
        )
    headings = (
        "position", "chunk", "sha256", "mix", "steps", "tokens", "mean loss",
        "checkpoint", "held-out", "state root", "replay",
    )  # fmt: skip
    note = (
        "Replay: whether the first steps from this checkpoint were done again by a later start "
        "and gave the same, or are on record, so that it can be compared."
    )
    return Table("Chunks and checkpoints", headings, rows, note)


def evaluation_table(run: RunView) -> Table:
    """Scores on tasks: a row for each checkpoint, a column for each task; with standard errors."""
    headings, rows = score_table(run.evaluations)
    return Table("Scores on tasks", headings, rows, "With one standard error.")


def _steps_by_chunk(run: RunView) -> dict[str, tuple[int, int]]:
    """Return the first and the last step that read each chunk."""
    found: dict[str, tuple[int, int]] = {}
    for record in run.kept:
        first, _ = found.get(record.chunk, (record.step, 0))
        found[record.chunk] = first, record.step
    return found


def time_table(run: RunView) -> Table:
    """Seconds of every attempt by what they were spent on, and of the run as a whole."""
    rows = [
        (
            str(one.attempt),
            one.began.strftime("%Y-%m-%d %H:%M:%S"),
            f"{one.first_step:,} to {one.last_step:,}" if one.steps else "-",
            *_seconds(one.spent),
        )
        for one in run.times
    ]
    whole = summed(run.times)
    if len(rows) > 1:
        rows.append(("all", "", "", *_seconds(whole)))
    headings = ("start", "began (UTC)", "steps", *KINDS, "in all")
    return Table("Time", headings, rows)


def energy_table(run: RunView) -> Table:
    """Energy of every attempt and how it is known; empty where nothing is known of it."""
    site = site_of(run)
    found = energy_of(run, site)
    rows: list[tuple[str, ...]] = [
        (
            str(one.attempt),
            number(one.devices),
            one.how,
            *_energies(site, one.joules),
        )
        for one in found
    ]
    if len(rows) > 1:
        rows.append(("all", "", "", *_energies(site, summed_energy(found))))
    headings = ("start", "devices", "how", "energy", "useful", "redone or skipped")
    return Table("Energy", headings, rows, f"With a PUE of {site.pue:g}.")


def _energies(site: Site, joules: Spent) -> list[str]:
    parts = (joules.total, joules.useful, joules.redone + joules.skipped)
    return [energy_text(site, part) if part else "-" for part in parts]


def facts(run: RunView) -> list[tuple[str, str]]:
    """What the run is: identity, data, code and machine."""
    started = of_kind(run.entries, Started)
    if not started:
        return []
    first, environment = started[0], started[0].environment
    code = environment.get("code") or {}
    packages = environment.get("packages") or {}
    shape = _shape(run.config)
    return [
        ("run id", first.run_id),
        *([("model", shape)] if shape else []),
        ("parameters", number(first.parameters)),
        ("layout", first.layout),
        ("kernels", first.kernels),
        ("precision", first.precision or "-"),
        ("data manifest", brief(first.data_manifest_sha256)),
        ("code", f"{str(code.get('commit'))[:12]}{' with changes' if code.get('dirty') else ''}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("platform", str(environment.get("platform", "-"))),
    ]


def _shape(config: Config | None) -> str:
    if config is None:
        return ""
    m = config.model
    return (
        f"{m.num_layers} layers of {m.hidden_size}, MLP {m.ffn_hidden_size}, {m.num_heads} heads "
        f"({m.num_kv_heads} of keys and values), vocabulary {m.vocab_size:,}"
    )


def _scores(run: RunView) -> list[tuple[str, ...]]:
    return [
        (
            number(one.step),
            one.set,
            f"{one.loss:.4f}",
            number(one.rows),
            number(one.targets),
            ", ".join(f"{name} {loss:.4f}" for name, loss in one.subsets.items()),
        )
        for one in run.kept_scores
    ]


def _seconds(spent: Spent) -> list[str]:
    values = [getattr(spent, name) for name in KINDS]
    shown = [duration(value) if value >= 1 else "-" if not value else "<1s" for value in values]
    return [*shown, duration(spent.total)]


def _held_out(saved: CheckpointSaved | None) -> str:
    return "-" if saved is None or saved.held_out_loss is None else f"{saved.held_out_loss:.4f}"


def _root(run: RunView, saved: CheckpointSaved | None) -> str:
    if saved is None:
        return "-"
    try:
        state = read_checkpoint(run.directory / "checkpoints" / saved.checkpoint).state
    except UserError:
        return "not on the disk"
    return "-" if state is None else brief(state.root)


def _replay_state(run: RunView, saved: CheckpointSaved | None) -> str:
    if saved is None:
        return "-"
    drills = [e for e in of_kind(run.entries, ResumeDrilled) if e.checkpoint == saved.checkpoint]
    if drills:
        last = drills[-1]
        if not last.same:
            return f"done again, differs: {last.difference}"
        return "done again, to the bit" if last.bits else "done again, within rounding"
    followed = of_kind(run.entries, CheckpointFollowed)
    return "on record" if any(e.checkpoint == saved.checkpoint for e in followed) else "-"


def _of_total(run: RunView) -> str:
    total = run.total_steps
    return f"{run.last_step:,}" if total is None else f"{run.last_step:,} of {total:,}"


def _world_size(run: RunView) -> int:
    sizes = [e.world_size for e in run.events if isinstance(e, Started | Resumed)]
    return sizes[-1]
