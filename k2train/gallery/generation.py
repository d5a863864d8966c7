"""Missing answers of the checkpoints of a run, generated batch by batch and kept as they come.

- What is missing is decided once, before the first model is read: every rank decides alike.
- The same call as `tools/generate.py`, so an answer is the one that a reader gets there.
- Nothing here imports torch: the caller hands over the session that does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import manifest_sha256, read_manifest
from k2train.errors import RunError
from k2train.gallery.answers import (
    AnswerRecord,
    Asked,
    CheckpointAnswers,
    append_answers,
    matching,
    read_answers,
)
from k2train.inference.options import Limits
from k2train.inference.prompts import Prompt, encode_prompts
from k2train.inference.source import Source
from k2train.retry import exists_retried, is_folder_retried
from k2train.text import counted

Generate = Callable[[Sequence[Prompt], Limits], Sequence[Any]]
"""Answers of the opened model to a batch, as `k2train.inference.generate.Answer`."""

Keep = Callable[[Callable[[], None]], object]
"""Runs what writes, on the rank that does, and says on all ranks what went wrong there."""


def _here(write: Callable[[], None]) -> None:
    write()


@dataclass(frozen=True)
class Work:
    """A checkpoint and the prompts that it has still to answer."""

    source: Source
    manifest_sha256: str
    prompts: list[Prompt]


def checkpoints_of_run(run: Path, paths: Sequence[Path]) -> list[Path]:
    """Return checkpoints in the order of training. Raises RunError for one of another run."""
    folder = run / "checkpoints"
    for path in paths:
        if path.resolve().parent != folder.resolve():
            raise RunError(f"--checkpoints: {path} is not of {run}; a gallery shows one run")
    return sorted(paths, key=lambda path: read_manifest(path).step)


def missing(run: Path, paths: Sequence[Path], asked: Asked, tokenizer: Path | None) -> list[Work]:
    """Return what each checkpoint has still to answer, oldest first, and check every prompt.

    Raises what `Source.find` and `encode_prompts` raise.
    """
    found = []
    for path in paths:
        sha256 = manifest_sha256(path)
        there = matching(read_answers(run, path.name)[0], asked, sha256)
        if None not in there:
            continue
        source = Source.find(path, tokenizer)
        prompts = encode_prompts(source.tokenizer, asked.prompts, source.context_tokens)
        lacking = [one for one, answer in zip(prompts, there, strict=True) if answer is None]
        found.append(Work(source, sha256, lacking))
    return found


def fill(
    run: Path, work: Work, asked: Asked, batch: int, generate: Generate, keep: Keep = _here
) -> int:
    """Let a checkpoint answer, and keep each batch. Returns the number of answers.

    `keep` does the writing where it is to be done: of several ranks on the first. Raises OSError.
    """
    source = work.source
    limits = Limits(
        asked.settings.max_tokens,
        frozenset({source.tokenizer.eos_id}),
        source.tokenizer.vocab_size,
        batch,
    )
    for start in range(0, len(work.prompts), batch):
        answers = generate(work.prompts[start : start + batch], limits)
        records = [_record(work, asked, answer) for answer in answers]
        keep(partial(append_answers, run, source.path.name, records))
    return len(work.prompts)


def _record(work: Work, asked: Asked, answer: Any) -> AnswerRecord:
    return AnswerRecord(
        manifest_sha256=work.manifest_sha256,
        step=work.source.manifest.step,
        index=answer.prompt.index,
        prompt=answer.prompt.text,
        settings=asked.settings,
        text=work.source.tokenizer.decode(answer.ids),
        tokens=len(answer.ids),
        finish=str(answer.finish),
    )


def collect(
    run: Path, names: Sequence[str], asked: Asked
) -> tuple[list[CheckpointAnswers], list[str]]:
    """Return the answers that are there, by checkpoint, and notes of what was left out.

    A checkpoint that the run no longer has keeps its answers. One that was made anew has only those
    of its weights of today.
    """
    found: list[CheckpointAnswers] = []
    notes: list[str] = []
    for name in names:
        records, damaged = read_answers(run, name)
        path = run / "checkpoints" / name
        if is_folder_retried(path) and exists_retried(path / "manifest.json"):
            sha256, step = manifest_sha256(path), read_manifest(path).step
        elif records:
            sha256, step = records[-1].manifest_sha256, records[-1].step
        else:
            continue
        if damaged:
            notes.append(f"{name}: {counted(damaged, 'damaged line')} of answers left out")
        answers = matching(records, asked, sha256)
        if any(answers):
            found.append(CheckpointAnswers(name, step, sha256, answers))
    return sorted(found, key=lambda one: one.step), notes
