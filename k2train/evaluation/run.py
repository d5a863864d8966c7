"""Evaluation along a run: checkpoints by tasks, what exists left out, one result written at a time.

- A result is not made again where checkpoint, task, shots, limit and settings are the same.
- A task is rendered once for all checkpoints; a model is read once for all its tasks.
- Every rank scores all items of its replica's share; rank 0 alone writes. So a kill leaves whole
  results only.
- Tensor, pipeline and data parallelism change no setting of a result: only rounding differs.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group

from k2train.checkpoint.manifest import MANIFEST
from k2train.errors import RunError
from k2train.evaluation.harness import HARNESS, SEED, LoadedTask, load_tasks, split_scores
from k2train.evaluation.harness_model import HarnessModel
from k2train.evaluation.results import (
    FOLDER,
    FORMAT,
    Item,
    TaskResult,
    read_items,
    read_result,
    result_paths,
    write_result,
)
from k2train.evaluation.scores import MEMBERS, main_metric, score_text
from k2train.evaluation.selection import Wanted
from k2train.files import sha256_file
from k2train.inference.model import LanguageModel, check_layout
from k2train.inference.session import Ranks, joined, on_first
from k2train.inference.source import Source
from k2train.launch.environment import Launch
from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import TEXTS
from k2train.retry import exists_retried
from k2train.safe_json import parse_json
from k2train.text import counted, duration


@dataclass(frozen=True)
class Request:
    """What to evaluate, and how."""

    run: Path
    checkpoints: Sequence[Path]
    tasks: Sequence[Wanted]
    known_tasks: Sequence[str] = ()
    """Names of local tasks, for advice."""
    limit: int | None = None
    batch: int = 8
    tensor: int = 1
    pipeline: int = 1
    fp32: bool = False
    tokenizer: Path | None = None
    again: bool = False


def evaluate_run(request: Request, launch: Launch, say: Callable[[str], None]) -> list[TaskResult]:
    """Evaluate what is not there yet; returns all results that were asked for. Collective.

    Raises UserError for a task, checkpoint or layout that cannot be evaluated; results that were
    written before stay.
    """
    sources = [Source.find(path, request.tokenizer) for path in request.checkpoints]
    for source in sources:
        check_layout(source, request.tensor, request.pipeline)
    tasks, groups = load_tasks(request.tasks, request.limit, request.known_tasks)
    with joined(sources[0], launch, request.tensor, request.pipeline) as ranks:
        evaluation = _Evaluation(request, tasks, groups, ranks)
        return [result for source in sources for result in evaluation.checkpoint(source, say)]


class _Evaluation:
    """Tasks that are ready for every checkpoint."""

    def __init__(
        self,
        request: Request,
        tasks: Sequence[LoadedTask],
        groups: dict[str, Group],
        ranks: Ranks,
    ):
        self.request, self.tasks, self.groups = request, tasks, groups
        self.grid, self.device = ranks.grid, ranks.device
        self.rank = 0 if self.grid is None else self.grid.rank

    def checkpoint(self, source: Source, say: Callable[[str], None]) -> list[TaskResult]:
        """Evaluate a checkpoint; returns its results."""
        expected = {task.name: self._expected(source, task) for task in self.tasks}
        found = self._found(expected, say)
        missing = [name for name in expected if name not in found]
        if missing:
            say(f"{source.path.name}: {counted(len(missing), 'task')} to do, {len(found)} done")
            model = LanguageModel(source, self.grid, self.device, self.request.fp32)
            asked = HarnessModel(model, source.tokenizer, self.request.batch, SEED)
            for task in self.tasks:
                if task.name in missing:
                    found[task.name] = self._do(task, expected[task.name], asked, say)
            del model, asked
            gc.collect()
        results = [found[task.name] for task in self.tasks]
        return results + self._group_results(results)

    def _found(
        self, expected: Mapping[str, TaskResult], say: Callable[[str], None]
    ) -> dict[str, TaskResult]:
        """Return the results by task that rank 0 finds; collective.

        Another rank may see the disk a moment later.
        """
        found: list[TaskResult] = []
        if self.rank == 0:
            known = [self._known(one, say) for one in expected.values()]
            found = [one for one in known if one is not None]
        if self.grid is not None:
            texts = [json.dumps(one.model_dump()) for one in found]
            texts = Agreement(self.grid).from_first(texts, TEXTS)
            found = [TaskResult.parse(parse_json(text)) for text in texts]
        return {one.task: one for one in found}

    def _expected(self, source: Source, task: LoadedTask) -> TaskResult:
        """Return a result without scores: what it would be made from."""
        wide = self.device.type == "cpu" or self.request.fp32 or source.precision == "fp32"
        return TaskResult(
            format=FORMAT,
            task=task.name,
            version=task.version,
            style=task.wanted.style,
            checkpoint=source.path.name,
            step=source.manifest.step,
            manifest_sha256=sha256_file(source.path / MANIFEST),
            harness=HARNESS,
            shots=task.shots,
            num_shots=task.num_shots,
            limit=self.request.limit,
            items=0,
            items_sha256="-",
            scores={},
            settings={
                "precision": "fp32" if wide else "bf16",
                "weights": "master" if self.request.fp32 else "model",
                "context_tokens": source.context_tokens,
                "seed": SEED,
                "task_sha256": task.definition_sha256,
                "requests_sha256": task.requests_sha256,
            },
            label=task.wanted.label,
        )

    def _known(self, expected: TaskResult, say: Callable[[str], None]) -> TaskResult | None:
        """Return the result that is there, if it was made from the same."""
        path, _ = result_paths(self.request.run, expected.task, expected.checkpoint)
        if self.request.again or not exists_retried(path):
            return None
        try:
            known = read_result(path)
            if not known.members:
                read_items(self.request.run, known)
        except RunError as error:
            say(f"made again: {error}")
            return None
        if differs := _difference(known, expected):
            say(f"{expected.checkpoint} {expected.task}: made again, {differs} changed")
            return None
        return known

    def _do(
        self,
        task: LoadedTask,
        expected: TaskResult,
        model: HarnessModel,
        say: Callable[[str], None],
    ) -> TaskResult:
        began = time.monotonic()
        scores, errors, items, _ = task.evaluate(model)
        facts = {"scores": scores, "errors": errors, "items": len(items)}
        result = self._write(expected.model_copy(update=facts), items)
        say(
            f"{result.checkpoint} {result.task}: {main_metric(result) or 'no score'} "
            f"{score_text(result)}, {counted(len(items), 'item')}, "
            f"{duration(time.monotonic() - began)}"
        )
        return result

    def _write(self, result: TaskResult, items: Sequence[Item]) -> TaskResult:
        """Write a result on rank 0; every rank raises what is wrong. Collective."""
        run = self.request.run

        def write() -> TaskResult:
            known = self._written_group(result)
            return known or read_result(write_result(run, result, items))

        written = on_first(self.grid, write, run / FOLDER)
        return result if written is None else written

    def _written_group(self, result: TaskResult) -> TaskResult | None:
        """Return the result of a group that is there already and says the same."""
        path, _ = result_paths(self.request.run, result.task, result.checkpoint)
        if not result.members or self.request.again or not exists_retried(path):
            return None
        try:
            known = read_result(path)
            read_items(self.request.run, known)
        except RunError:
            return None
        # It has no items of its own: what it was made of is in its settings.
        own = {"items": known.items, "items_sha256": known.items_sha256}
        return known if known == result.model_copy(update=own) else None

    def _group_results(self, results: Sequence[TaskResult]) -> list[TaskResult]:
        """Combine the results of groups of tasks, as the harness does, and write them."""
        metrics = {one.task: _as_metrics(one) for one in results}
        labels = {wanted.task: wanted.label for wanted in self.request.tasks}
        made = []
        for name, group in self.groups.items():
            members = tuple(task.task_name for task in group.get_all_tasks())
            combined = {"sample_len": 0, **group.aggregate(metrics)}
            scores, errors = split_scores(combined)
            if not scores:
                continue
            own = [one for one in results if one.task in members]
            facts = {
                "task": name,
                "version": str(group.version),
                "members": members,
                "shots": (),
                "scores": scores,
                "errors": errors,
                "settings": {MEMBERS: {one.task: one.items_sha256 for one in own}},
                "label": labels.get(name, ""),
            }
            made.append(self._write(own[0].model_copy(update=facts), []))
        return made


def _difference(known: TaskResult, expected: TaskResult) -> str:
    """Return what two results were not made from alike; "" for nothing."""
    names = (
        *("manifest_sha256", "harness", "version", "style", "num_shots", "limit", "shots"),
        "settings",
    )
    for name in names:
        mine, theirs = getattr(known, name), getattr(expected, name)
        if mine != theirs and name == "settings":
            keys = [key for key in theirs if mine.get(key) != theirs[key]]
            return keys[0] if keys else name
        if mine != theirs:
            return name
    return ""


def _as_metrics(result: TaskResult) -> dict[str, Any]:
    """Return a result's scores under the harness's names."""
    found: dict[str, Any] = {"sample_len": result.items, "name": result.task}
    for values, suffix in ((result.scores, ""), (result.errors, "_stderr")):
        for key, value in values.items():
            name, _, way = key.partition(",")
            found[f"{name}{suffix},{way or 'none'}"] = value
    return found
