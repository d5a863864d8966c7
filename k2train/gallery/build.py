"""A gallery of a run from what is on record: answers, evaluation results, spans in the data.

- Reads only, but for the pages and the spans that it keeps. Needs no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.commands import program_text
from k2train.errors import RunError
from k2train.gallery.answers import Asked, CheckpointAnswers, answered_checkpoints
from k2train.gallery.generation import collect
from k2train.gallery.page import About, pages
from k2train.gallery.prompt_data import Spans, answer_texts, prompt_files
from k2train.gallery.site import Written, write_site
from k2train.gallery.task_data import TaskView, current_results, read_task, task_files
from k2train.gallery.verbatim import Facts

FindSpans = Callable[[Iterable[str]], Mapping[str, Sequence[Facts]]]
"""Spans of texts in the training data."""


@dataclass(frozen=True)
class Content:
    """What a gallery shows of a run."""

    run: Path
    asked: Asked | None
    answers: Sequence[CheckpointAnswers]
    tasks: Sequence[TaskView]
    notes: Sequence[str]

    def texts(self) -> Iterator[str]:
        """Yield every text that a checkpoint said or chose among."""
        yield from answer_texts(self.answers)
        for task in self.tasks:
            yield from task.texts()

    @property
    def checkpoints(self) -> set[str]:
        """Names of the checkpoints that it shows."""
        evaluated = (result.checkpoint for task in self.tasks for result in task.results)
        return {*(one.name for one in self.answers), *evaluated}


def read_content(run: Path, asked: Asked | None, names: Sequence[str] | None) -> Content:
    """Read answers and evaluation results, with `names` only of these checkpoints.

    Raises RunError, also when there is nothing to show.
    """
    answers: list[CheckpointAnswers] = []
    notes: list[str] = []
    if asked is not None:
        answers, notes = collect(run, answered_checkpoints(run) if names is None else names, asked)
    results, stale = current_results(run, names)
    tasks = [read_task(run, results[task]) for task in sorted(results)]
    if not answers and not tasks:
        raise RunError(
            f"{run}: nothing to show yet; give --prompts FILE or --prompt TEXT, or evaluate tasks"
        )
    return Content(run, asked, answers, tasks, [*notes, *stale])


def write_gallery(
    folder: Path, content: Content, find_spans: FindSpans | None, notes: Sequence[str] = ()
) -> Written:
    """Write the pages of a gallery; without `find_spans` they say how to get spans.

    Raises RunError for a folder of something else, and OSError.
    """
    spans = None if find_spans is None else find_spans(content.texts())
    about = About(
        content.run.resolve().name,
        len(content.checkpoints),
        len(content.asked.prompts) if content.asked is not None and content.answers else 0,
        [task.results[-1].task for task in content.tasks],
        [*content.notes, *notes],
        f"{program_text('trace')} index {content.run}" if find_spans is None else None,
    )
    return write_site(folder, pages(about), _data(content, spans))


def _data(content: Content, spans: Spans | None) -> Iterator[tuple[str, Any]]:
    if content.asked is not None and content.answers:
        yield from prompt_files(content.asked, content.answers, spans)
    if content.tasks:
        yield from task_files(content.tasks, spans)
