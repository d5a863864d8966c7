"""The model card of a release: numbers of manifest, ledger, metrics and results, nothing typed.

- What the record does not say has no line. Notes of the record (faults made on purpose, bits that
  do not repeat) are quoted.

Alternatives considered:
- A template that a person fills in: its numbers are those of the last release.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import checkpoint_order, read_manifest
from k2train.errors import UserError
from k2train.evaluation.results import TaskResult
from k2train.evaluation.scores import main_metric, shown
from k2train.record.energy import energy_text
from k2train.record.events import Resumed, Started, of_kind
from k2train.record.ledger import run_notes
from k2train.record.spike_events import Spike
from k2train.release.index import Index
from k2train.release.places import LICENCES
from k2train.release.stage import Stage
from k2train.report.energy import energy_of, site_of
from k2train.text import clean, counted, duration, markdown_table, number, tokens_text

VERIFY = "python tools/verify_release.py FOLDER"


def card(name: str, stages: Sequence[Stage], index: Index, given: Mapping[str, Path]) -> str:
    """Return the card as Markdown with the head that Hugging Face reads.

    `given` are the licences that the release has.
    """
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if "weights" in given:
        link = LICENCES["weights"]
        head += ["license: other", f"license_name: {name}", f"license_link: {link}"]
    lines = [*head, "---", "", f"# {clean(name)}", ""]
    lines += [_lead(stages), ""]
    for stage in stages:
        lines += [f"## {clean(stage.name)}", "", *_stage_part(stage), ""]
    lines += ["## What is here, and what is not", ""]
    lines += [
        f"`INDEX.md` lists every checkpoint that was ever saved and every artefact: "
        f"{counted(len(index.artefacts), 'artefact')}, "
        f"{counted(len(index.gaps), 'gap')}.",
        "",
        f"Check every byte with nothing but this folder: `{VERIFY}`, or `sha256sum --check "
        "SHA256SUMS`.",
        "",
        "## Licences",
        "",
        *_licences(given),
    ]
    return "\n".join([*lines, ""])


def _lead(stages: Sequence[Stage]) -> str:
    newest = stages[-1].checkpoints[-1]
    model = read_manifest(newest).config["model"]
    parameters = next(e.parameters for e in of_kind(stages[-1].entries, Started))
    return (
        f"A LLaMA-style model of {parameters:,} parameters: {model['num_layers']} layers, hidden "
        f"size {model['hidden_size']:,}, feed-forward {model['ffn_hidden_size']:,}, "
        f"{model['num_heads']} heads ({model['num_kv_heads']} of keys and values), vocabulary "
        f"{model['vocab_size']:,}. Newest checkpoint: `{stages[-1].name}/{newest.name}`."
    )


def _stage_part(stage: Stage) -> list[str]:
    lines = markdown_table(("", ""), _facts(stage))
    if stage.data is not None:
        lines += ["", "Tokens in the data by subset:", "", *_mix(stage)]
    lines += ["", "Released checkpoints:", "", *_checkpoints(stage)]
    # Of other weights under a checkpoint's name there are none among these.
    if results := shown(stage.view.evaluations):
        lines += ["", "Evaluation (standard error in brackets):", "", *_scores(results)]
    notes = run_notes(stage.entries)
    if notes:
        lines += ["", "Notes of the record:", "", *(f"- {clean(note)}" for note in notes)]
    return lines


def _facts(stage: Stage) -> Iterator[tuple[str, str]]:
    manifest = read_manifest(stage.checkpoints[-1])
    config, view = manifest.config, stage.view
    first = of_kind(stage.entries, Started)[0]
    yield "status", view.status
    yield "steps", number(view.last_step)
    # The run may have gone on after its newest checkpoint.
    last = view.kept[-1].consumed_tokens if view.kept else 0
    yield "tokens", tokens_text(last or manifest.consumed_tokens)
    yield "sequence length", number(config["data"]["sequence_length"])
    yield "batch", f"{number(config['batch']['global_sequences'])} sequences"
    rate = config["lr"]
    final = rate.get("final")
    yield (
        "learning rate",
        f"{rate['kind']}, {rate['peak']:g}" + ("" if final is None else f" to {final:g}"),
    )
    yield "precision", str(config["precision"])
    yield "seed", str(config["run"]["seed"])
    yield "layout", clean(first.layout)
    yield "processes", number(first.world_size)
    if view.kept:
        yield "loss of the last step", number(view.kept[-1].loss, 4)
    if manifest.held_out_loss is not None:
        yield "held-out loss", number(manifest.held_out_loss, 4)
    yield (
        "starts",
        number(len(of_kind(stage.entries, Started)) + len(of_kind(stage.entries, Resumed))),
    )
    opened = [one for one in of_kind(stage.entries, Spike) if one.kind in ("opened", "restart")]
    yield "loss spikes", number(len(opened))
    trained = sum(row.seconds for row in view.records if row.seconds == row.seconds)
    yield "time in steps", duration(trained)
    if energy := _energy(stage):
        yield "energy", energy
    yield from _software(first.environment)


def _software(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    code = environment.get("code")
    if isinstance(code, dict) and code.get("commit"):
        yield "code", f"commit {code['commit']}" + (", with changes" if code.get("dirty") else "")
    packages = environment.get("packages")
    if isinstance(packages, dict):
        yield "packages", ", ".join(f"{name} {packages[name]}" for name in sorted(packages))


def _energy(stage: Stage) -> str:
    try:
        site = site_of(stage.view)
        attempts = energy_of(stage.view, site)
    except UserError:
        return ""
    if not attempts:
        return ""
    how = ", ".join(sorted({one.how for one in attempts}))
    return f"{energy_text(site, sum(one.total for one in attempts))} ({how})"


def _mix(stage: Stage) -> list[str]:
    assert stage.data is not None, "a mix is that of data"
    totals: dict[str, int] = {}
    for info in stage.data.chunks:
        for subset, tokens in info.tokens_per_subset.items():
            totals[subset] = totals.get(subset, 0) + tokens
    rows = [(clean(subset), number(tokens)) for subset, tokens in sorted(totals.items())]
    return markdown_table(("subset", "tokens"), rows, numbers=True)


def _checkpoints(stage: Stage) -> list[str]:
    rows = []
    for path in stage.checkpoints:
        manifest = read_manifest(path)
        root = "-" if manifest.state is None else manifest.state.root[:16]
        rows.append(
            (
                f"`{path.name}`",
                number(manifest.step),
                number(manifest.consumed_tokens),
                number(manifest.loss, 4),
                number(manifest.held_out_loss, 4),
                f"`{root}`",
            )
        )
    return markdown_table(("checkpoint", "step", "tokens", "loss", "held-out", "state root"), rows)


def _scores(results: Sequence[TaskResult]) -> list[str]:
    """Table of checkpoints by tasks, with the main metric of each."""
    tasks = list(dict.fromkeys((one.task, one.style) for one in results))
    names = sorted({one.checkpoint for one in results}, key=checkpoint_order)
    found = {(one.task, one.style, one.checkpoint): one for one in results}
    rows = [
        (f"`{name}`", *(_score(found.get((task, style, name))) for task, style in tasks))
        for name in names
    ]
    heads = [task if style == "default" else f"{task} ({style})" for task, style in tasks]
    return markdown_table(("checkpoint", *map(clean, heads)), rows, numbers=True)


def _score(result: TaskResult | None) -> str:
    metric = None if result is None else main_metric(result)
    if result is None or metric is None:
        return "-"
    error = result.errors.get(metric)
    return f"{metric} {result.scores[metric]:.4f}" + ("" if error is None else f" ({error:.4f})")


def _licences(given: Mapping[str, Path]) -> list[str]:
    return [
        f"- {what}: " + (f"`{place}`" if what in given else "not given; ask before use")
        for what, place in LICENCES.items()
    ]
