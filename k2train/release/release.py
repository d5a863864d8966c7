"""Release of runs: everything that others need, in one folder that is whole or says that it is not.

- Written as `OUT.unfinished`, with a file `NOT_WHOLE` in it until all is there. `SHA256SUMS` is
  written last, and then the folder gets its name.
- The same command goes on after a kill: what was finished is kept, after its hashes were compared.
- Paths, machines and users are redacted from the record (`private`, `sealed`).

Alternatives considered:
- A list of what was done: it can be wrong about the disk, hashes cannot.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from k2train.checkpoint.disk_space import free_bytes
from k2train.checkpoint.manifest import is_thinned
from k2train.errors import RunError, UnavailableError
from k2train.files import sync_directory
from k2train.record.events import of_kind
from k2train.record.rollback_events import RolledBack
from k2train.record.spike_events import Spike
from k2train.release.branches import branches_of, write_branches
from k2train.release.card import card
from k2train.release.data_copy import (
    CopiedData,
    copy_data,
    json_bytes,
    write_following,
    write_order,
)
from k2train.release.index import Index
from k2train.release.models import export_model, tell_place
from k2train.release.owner import MODEL, own
from k2train.release.places import (
    CARD,
    CONFIG,
    DATA,
    EVALUATION,
    FOLLOWING,
    GALLERY,
    INDEX,
    INDEX_PAGE,
    LEDGER,
    LICENCES,
    METRICS,
    NOT_WHOLE,
    ORDER,
    PROOFS,
    REPORT,
    ROW_LOSSES,
    RUN,
    SPIKES,
    copy_file,
    files_below,
    size_below,
    unfinished,
    write_bytes,
)
from k2train.release.private import Private
from k2train.release.run_copy import contamination_of, copy_run
from k2train.release.stage import Stage, require_folder
from k2train.release.sums import write_sums
from k2train.report.collect import read_run
from k2train.report.page import write_report
from k2train.retry import is_file_retried, is_folder_retried, reason
from k2train.safe_json import read_plain_file
from k2train.text import bytes_text, counted

SPARE_BYTES = 2**26
"""Room for everything but models, states and chunks."""


@dataclass(frozen=True)
class Options:
    """What a person asked for."""

    licences: Mapping[str, Path] = field(default_factory=dict)
    """By what they are for: code, weights, data."""
    chunks: bool = False
    tokenizer: str | None = None
    check: bool = True
    branches: bool = False
    """Whether a git repository with a branch for each checkpoint is written beside it."""


@dataclass(frozen=True)
class Released:
    """A release that was written."""

    folder: Path
    index: Index
    files: int
    bytes: int
    notes: Sequence[str]


def release(
    stages: Sequence[Stage],
    out: Path,
    options: Options,
    prove: Callable[[Path, Sequence[Path]], list[str]] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Released:
    """Write a release of runs, the first stage first, to the new folder `out`.

    `prove` writes the proofs of a finished folder, given the runs; None: left out.
    Raises UserError, UnavailableError.
    """
    require_folder(out)
    temporary = unfinished(out)
    try:
        with own(temporary, _asked(stages, options)):
            _check_room(stages, temporary, options)
            found = _fill(stages, temporary, out.name, options, prove is not None, log)
            notes = _finish(stages, temporary, prove)
            files = [path for path in files_below(temporary)]
            size = size_below(temporary)
            if options.branches:
                write_branches(temporary, stages, branches_of(out))
            os.rename(temporary, out)
            sync_directory(out.absolute().parent)
            return Released(out, found, len(files), size, notes)
    except OSError as error:
        raise UnavailableError(
            f"{temporary} could not be written ({reason(error, temporary.parent)}); start the same "
            "command again, it goes on"
        ) from None


def _asked(stages: Sequence[Stage], options: Options) -> set[str]:
    """Return what a command asks for, in words: a later start with less would leave it behind."""
    asked = {f"{stage.name}/{path.name}" for stage in stages for path in stage.checkpoints}
    asked |= {f"optimizer states of {stage.name}" for stage in stages if stage.states}
    asked |= {f"the licence of {what}" for what in options.licences}
    return asked | ({"the chunks (--chunks)"} if options.chunks else set())


def _check_room(stages: Sequence[Stage], temporary: Path, options: Options) -> None:
    wanted = sum(stage.bytes_to_write(options.chunks) for stage in stages)
    there = min(wanted, size_below(temporary))
    needed = wanted - there + SPARE_BYTES
    if options.branches:
        needed += sum(stage.model_bytes for stage in stages)
    free = free_bytes(temporary.absolute())
    if needed > free:
        raise RunError(
            f"{temporary} needs {bytes_text(needed)} more, {bytes_text(free)} are free: free "
            "space, release fewer checkpoints (--every, --checkpoints), or leave their states out "
            "(--no-states)"
        )


def _fill(
    stages: Sequence[Stage],
    folder: Path,
    name: str,
    options: Options,
    proven: bool,
    log: Callable[[str], None],
) -> Index:
    """Write everything but sums and proofs; returns the index."""
    index, hashes = Index(name), dict[str, str]()
    private = Private.of([stage.run for stage in stages])
    for stage in stages:
        _write_stage(stage, folder, options, private, hashes, index, log)
    index.values = private.count
    # A redacted manifest has another hash.
    index.checkpoints = {
        stage: [
            replace(o, manifest_sha256=hashes.get(o.manifest_sha256, o.manifest_sha256))
            for o in lines
        ]
        for stage, lines in index.checkpoints.items()
    }

    given = dict(options.licences)
    for what, place in LICENCES.items():
        if what in given:
            copy_file(given[what], folder / place)
        missing = "not beside the tools" if what == "code" else f"not given (--{what}-licence FILE)"
        index.add(f"licence of {what}", "", place if what in given else None, missing)
    beside = "in git repositories beside the release" if options.branches else "no --branches"
    index.add("branches ckpt_NNN", "", None, f"folders are released; {beside}")
    index.add(
        "proofs for other verifiers",
        "",
        PROOFS if proven else None,
        "left out (--no-proofs)",
    )
    index.add("model card", "", CARD)
    index.add("index", "", INDEX)
    # A gap's reason belongs to gaps alone.
    index.artefacts = [replace(a, reason="") if a.place else a for a in index.artefacts]
    write_bytes(folder / CARD, card(name, stages, index, given).encode())
    write_bytes(folder / INDEX, json_bytes(index.content()))
    write_bytes(folder / INDEX_PAGE, index.page().encode())
    return index


def _write_stage(
    stage: Stage,
    folder: Path,
    options: Options,
    private: Private,
    hashes: dict[str, str],
    index: Index,
    log: Callable[[str], None],
) -> None:
    """Write a stage, and add what it has and lacks to the index."""
    name, place = stage.name, folder / stage.name
    copied = CopiedData()
    if stage.data is not None:
        copied = copy_data(stage, place / DATA, options.chunks, private, hashes)
    sealed = copy_run(stage, place / RUN, private, hashes)
    for part, originals in ((DATA, copied.originals), (RUN, sealed.originals)):
        index.redacted |= {f"{name}/{part}/{file}": sha for file, sha in originals.items()}
    log(f"{name}: record of {counted(len(stage.entries), 'event')}")

    for path in stage.checkpoints:
        model = place / path.name
        export_model(stage, path, model, options.tokenizer, options.check, log)
        tell_place(model, name, path.name, hashes)
        index.add(f"{path.name}{MODEL}", name, f"{name}/{path.name}")
        log(f"{name}: {path.name} released")
    index.checkpoints[name] = stage.lines
    _add_checkpoints(stage, place, index)
    _add_data(stage, place, options, copied, index)
    _add_record(stage, place, index)


def _add_checkpoints(stage: Stage, place: Path, index: Index) -> None:
    for path in stage.checkpoints:
        left = "states left out (--no-states)" if not stage.states else "thinned by the run"
        kept = stage.states and not is_thinned(path)
        where = f"{stage.name}/{RUN}/checkpoints/{path.name}"
        index.add(f"optimizer states of {path.name}", stage.name, where if kept else None, left)
        why = write_following(stage, path, place / FOLLOWING)
        rows = f"{stage.name}/{FOLLOWING}/{path.name}.npy"
        index.add(
            f"rows of the two steps after {path.name}", stage.name, None if why else rows, why
        )


def _add_data(
    stage: Stage, place: Path, options: Options, copied: CopiedData, index: Index
) -> None:
    name, gone = stage.name, "the data folder of the run is not there (--data MANIFEST)"
    base, data = f"{name}/{DATA}", stage.data
    index.add("data manifest", name, None if data is None else f"{base}/manifest.json", gone)
    why = gone if data is None else write_order(stage, place / DATA)
    index.add("order of the chunks", name, None if why else f"{base}/{ORDER}", why)

    provenance = data is not None and any(info.provenance for info in data.all_chunks())
    why = gone if data is None else "" if provenance else "the data were made without"
    if copied.missing:
        why = f"{counted(len(copied.missing), 'file')} missing, the first is {copied.missing[0]}"
    index.add("provenance of the chunks", name, None if why else base, why)
    why = gone if data is None else "" if options.chunks else "not asked for (--chunks)"
    if options.chunks and copied.missing_chunks:
        lacking = counted(len(copied.missing_chunks), "file")
        why = f"{lacking} missing, the first is {copied.missing_chunks[0]}"
    index.add("chunks", name, None if why else base, why)


def _add_record(stage: Stage, place: Path, index: Index) -> None:
    """Add the files of the record, and write the report from the record as it is released."""
    name, run = stage.name, place / RUN
    for what, file in (("ledger", LEDGER), ("metrics", METRICS), ("config", CONFIG)):
        there = is_file_retried(run / file)
        index.add(what, name, f"{name}/{RUN}/{file}" if there else None, "the run has none")

    spiked = bool(of_kind(stage.entries, Spike)) or bool(of_kind(stage.entries, RolledBack))
    none = "the run has no bundle of its spikes" if spiked else "the run had no spike"
    parts = (
        ("spikes with bundles and twins", SPIKES, none),
        ("losses of each row", ROW_LOSSES, "not recorded (audit.row_losses)"),
        ("evaluation", EVALUATION, f"not evaluated (tools/evaluate.py {name})"),
        ("galleries", GALLERY, f"not made (tools/gallery.py {name})"),
    )
    for what, file, why in parts:
        there = is_folder_retried(run / file)
        index.add(what, name, f"{name}/{RUN}/{file}" if there else None, why)
    found = is_file_retried(contamination_of(stage))
    where = f"{name}/{RUN}/{EVALUATION}/{contamination_of(stage).name}"
    why = f"not looked for (tools/contamination.py {name})"
    index.add("contamination", name, where if found else None, why)

    view = read_run(run)
    if stage.data is not None and view.data is None:
        # Named by a path of another place; the hashes are those of the folder in the release.
        notes = [note for note in view.notes if not note.startswith("no hashes and mix")]
        view = replace(view, data=stage.data, notes=notes)
    write_report(run / REPORT, view)
    index.add("report", name, f"{name}/{RUN}/{REPORT}")


def _finish(
    stages: Sequence[Stage],
    folder: Path,
    prove: Callable[[Path, Sequence[Path]], list[str]] | None,
) -> list[str]:
    """Refuse what still holds a private folder, then write sums and proofs."""
    private = Private.of([stage.run for stage in stages])
    for path in files_below(folder):
        if path.suffix in (".safetensors", ".npy", ".parquet", ".model"):
            continue
        if root := private.left_in(read_plain_file(path, 2**36)):
            raise RunError(
                f"{path.relative_to(folder)} holds the path {root}; make that file again from "
                "inside that folder, with relative paths, then start this command again"
            )
    write_sums(folder)
    os.unlink(folder / NOT_WHOLE)
    sync_directory(folder)
    if prove is None:
        return []
    return prove(folder, [stage.run for stage in stages])
