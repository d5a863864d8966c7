"""Tasks of lm-eval: loaded, rendered, identified by hashes, and scored on a model, item by item.

- A local task is a YAML file with its data beside it: names of data files are relative to it.
- What a task asks is identified by the hash of its definition and that of all rendered requests.
  Other shots, data or templates are therefore another result.
- Shots are named by split and number, as the task's own sampler has drawn them.
- The harness's own evaluator scores. Only the names of its metrics are shortened.

Alternatives considered:
- The harness's result files: they name neither shots, step nor weights.
"""

import difflib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable

from k2train.errors import ConfigError, DataError
from k2train.evaluation.items import item_of
from k2train.evaluation.results import Item
from k2train.evaluation.selection import Wanted
from k2train.retry import is_file_retried
from k2train.text import safe

HARNESS = f"lm-eval {version('lm_eval')}"
BOOTSTRAP_ROUNDS = 1000
"""Draws for the standard error of a score that has no formula for it."""
SEED = 1234
"""Of the shots; the harness's own default."""
GET_DATA = (
    "run once with --download on a machine with a network, or copy its cache of data sets here "
    "(HF_HOME)"
)

REFUSED = {
    "UNSAFE_CODE": "its answers are programs to run, which needs a sandbox",
    "MULTIMODAL": "it has images or sounds, and the model reads text",
}
"""Flags of tasks that are not for this model, or not for this process."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# It says that a metric is unknown, and goes on without it; `LoadedTask` refuses such a task.
logging.getLogger("lm_eval.api.registry").setLevel(logging.CRITICAL)
logging.getLogger("datasets").setLevel(logging.ERROR)


@cache
def own_tasks() -> TaskManager:
    """Return the harness's own tasks; reading their 12,000 files takes about 10 s."""
    return TaskManager()


class LoadedTask:
    """A task that is ready, with its shots and the hash of all that it asks."""

    def __init__(self, task: Task, wanted: Wanted, limit: int | None):
        self.task, self.wanted, self.limit = task, wanted, limit
        self.name = str(task.task_name)
        for flag, why in REFUSED.items():
            if getattr(task, flag, False):
                raise ConfigError(f"--tasks {self.name}: {why}; leave it out")
        if wanted.shots is not None:
            task.set_config("num_fewshot", wanted.shots)
        self.num_shots = int(task.config.num_fewshot or 0)
        self.version = str(task.VERSION)
        self._drawn: list[tuple[str, ...]] = []
        self._check_metrics()
        self._watch_shots()
        self._watch_scoring()
        self._render()
        self._check_targets()
        self._check_scores()
        self.requests_sha256 = _digest(
            [[one.request_type, one.doc_id, one.arguments] for one in task.instances]
        )
        self.definition_sha256 = _definition(task)

    def _check_metrics(self) -> None:
        """Refuse a metric that the harness does not have: it would be left out without a word."""
        if getattr(self.task.config, "process_results", None) is not None:
            return
        found = getattr(self.task, "_metric_fn_list", {})
        if unknown := [str(name) for name, function in found.items() if function is None]:
            nearest = difflib.get_close_matches(unknown[0], [*map(str, METRIC_REGISTRY)])
            advice = f"nearest: {', '.join(nearest)}" if nearest else "name another"
            raise ConfigError(
                f"--tasks {self.name}: metric_list has the unknown metric {safe(unknown[0])}; "
                f"{advice}"
            )

    def _check_scores(self) -> None:
        """Refuse a metric that answers of this kind do not have: score a made-up answer."""
        first = self.task.instances[0] if self.task.instances else None
        made_up: dict[str, Any] = {
            "loglikelihood": (-1.0, False),
            "multiple_choice": (-1.0, False),
            "loglikelihood_rolling": -1.0,
        }
        kind, asked = self.task.OUTPUT_TYPE, set(getattr(self.task, "_metric_fn_list", {}))
        own = getattr(self.task.config, "process_results", None) is not None
        if first is None or kind not in made_up or own:
            return
        count = sum(one.doc_id == first.doc_id for one in self.task.instances)
        missing = asked - self.task.process_results(first.doc, [made_up[kind]] * count).keys()
        # Lists of the harness may name more than there is.
        if missing and (missing == asked or self.wanted.file is not None):
            raise ConfigError(
                f"--tasks {self.name}: output_type {kind} has no score under "
                f"{safe(', '.join(sorted(missing)))}; name another metric in metric_list"
            )

    def _watch_scoring(self) -> None:
        """Say in one line which task's own code could not score an answer."""
        score = self.task.process_results

        def watched(*args: Any, **options: Any) -> Any:
            try:
                return score(*args, **options)
            # Whatever a task's code raises: there is no list of it.
            except Exception as error:
                raise ConfigError(
                    f"--tasks {self.name}: an answer cannot be scored ({_first_line(error)}); see "
                    "its doc_to_target and metric_list"
                ) from error

        self.task.process_results = watched

    def _watch_shots(self) -> None:
        """Keep the ids of the worked examples of each item as the sampler draws them."""
        sampler = getattr(self.task, "sampler", None)
        if sampler is None or not self.num_shots:
            return
        split = str(self.task.fewshot_cfg.split or "samples")
        known = {_digest(doc): f"{split}/{n}" for n, doc in enumerate(sampler.df)}
        draw = sampler.sample

        def watched(*args: Any, **options: Any) -> Sequence[Any]:
            found: Sequence[Any] = draw(*args, **options)
            self._drawn.append(tuple(known.get(_digest(doc), "other") for doc in found))
            return found

        sampler.sample = watched

    def _render(self) -> None:
        """Render all requests as the evaluator will: from the same seed."""
        self._drawn.clear()
        self.task.set_fewshot_seed(SEED)
        try:
            self.task.build_all_requests(limit=self.limit)
        # Templates and functions of a task raise what they like.
        except Exception as error:
            raise ConfigError(
                f"--tasks {self.name}: its items cannot be rendered with {self.num_shots} shots "
                f"({_first_line(error)})"
            ) from None

    def _check_targets(self) -> None:
        """Refuse right answers of a local task that are no choice: each would count as wrong."""
        task = self.task
        if self.wanted.file is None or task.OUTPUT_TYPE != "multiple_choice":
            return
        if getattr(task, "multiple_input", 0) or task.config.process_results is not None:
            return
        for one in task.instances:
            choices, target = task.doc_to_choice(one.doc), task.doc_to_target(one.doc)
            for right in target if isinstance(target, list) else [target]:
                known = range(len(choices)) if isinstance(right, int) else choices
                if right not in known:
                    raise ConfigError(
                        f"--tasks {self.name}: item {one.doc_id}: its right answer "
                        f"{safe(repr(right))[:60]} is none of its {len(choices)} choices; see "
                        "doc_to_target and the data"
                    )

    @property
    def shots(self) -> tuple[str, ...]:
        """Ids of the shots, where they are the same in front of each item."""
        return self._drawn[0] if len(set(self._drawn)) == 1 else ()

    def shots_of(self, number: int) -> tuple[str, ...]:
        """Ids of the shots in front of an item."""
        return self._drawn[number] if number < len(self._drawn) else ()

    def evaluate(
        self, model: Any
    ) -> tuple[dict[str, float], dict[str, float], list[Item], Mapping[str, Any]]:
        """Return scores, standard errors, items, and the harness's own metrics; collective."""
        self._drawn.clear()
        self.task.set_fewshot_seed(SEED)
        found = evaluate(
            model,
            {"tasks": {self.name: self.task}, "groups": {}},
            limit=self.limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
        )
        assert found is not None, "the harness sees one process"
        metrics = found["results"][self.name]
        scores, errors = split_scores(metrics)
        samples: dict[int, list[Mapping[str, Any]]] = {}
        for sample in found["samples"][self.name]:
            samples.setdefault(sample["doc_id"], []).append(sample)
        items = [
            item_of(self.task, same, () if self.shots else self.shots_of(place))
            for place, (_, same) in enumerate(sorted(samples.items()))
        ]
        return scores, errors, items, metrics


def split_scores(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return scores and standard errors of the harness's metrics, such as `acc,none`."""
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in metrics.items():
        name, comma, way = key.partition(",")
        if not comma or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        short = name.removesuffix("_stderr") + ("" if way == "none" else f",{way}")
        (errors if name.endswith("_stderr") else scores)[short] = float(value)
    return scores, errors


def load_tasks(
    wanted: Sequence[Wanted], limit: int | None, known: Sequence[str]
) -> tuple[list[LoadedTask], dict[str, Group]]:
    """Load tasks, and the groups of tasks among them by name.

    `known` are the names of local tasks, for advice. Raises ConfigError for a task that is not
    there or is wrong, DataError for one whose data are not here.
    """
    tasks: list[LoadedTask] = []
    groups: dict[str, Group] = {}
    for one in wanted:
        found, own = _load(one, known)
        groups |= own
        # Members of a group go by their own names.
        own_name = replace(one, label="") if own else one
        tasks += [LoadedTask(task, own_name, limit) for task in found]
    return tasks, groups


def _load(wanted: Wanted, known: Sequence[str]) -> tuple[Iterable[Task], dict[str, Group]]:
    manager, spec = _spec(wanted, known)
    try:
        found = manager.load([spec])
    # Whatever a task's code and its data set's reader raise: there is no list of it.
    except Exception as error:
        why = _first_line(error)
        if wanted.file is not None and isinstance(error.__cause__, Exception):
            # The reader of data files says first only that it failed.
            why = f"{why}: {_first_line(error.__cause__)}"
        away = OSError if wanted.file is not None else (OSError, ValueError, LookupError)
        if isinstance(error, away):
            raise DataError(
                f"--tasks {wanted.task}: its data are not on this machine ({why}): {GET_DATA}"
            ) from None
        raise ConfigError(f"--tasks {wanted.file or wanted.task}: {why}") from None
    return found["tasks"].values(), dict(found.get("groups", {}))


def _spec(wanted: Wanted, known: Sequence[str]) -> tuple[TaskManager, Any]:
    """Return who loads a task, and what to load: a name, or the content of a local file."""
    if wanted.file is None:
        manager = own_tasks()
        if wanted.task not in manager.all_tasks:
            raise ConfigError(
                f"--tasks {safe(wanted.task)}: neither a local task ({', '.join(known)}) nor one "
                f"of {HARNESS}, nor a file NAME.yaml"
            )
        return manager, wanted.task

    try:
        content = load_yaml(wanted.file, resolve_func=True)
    except Exception as error:
        raise ConfigError(f"--tasks {wanted.file}: {_first_line(error)}") from None
    content["task"] = wanted.task
    options = content.get("dataset_kwargs") or {}
    files = options.get("data_files")
    if isinstance(files, dict):
        places = {split: _beside(wanted.file, name) for split, name in files.items()}
        content["dataset_kwargs"] = {**options, "data_files": places}
    return TaskManager(include_defaults=False), content


def _beside(file: Path, name: object) -> str:
    place = file.resolve().parent / str(name)
    if not is_file_retried(place):
        raise DataError(
            f"--tasks {file}: its data file {place} is not there; dataset_kwargs.data_files names "
            "files beside the task"
        )
    return str(place)


def _definition(task: Task) -> str:
    """Hash of a task's definition, wherever its data lie: what they hold is in the requests."""
    content = dict(task.dump_config())
    options = content.get("dataset_kwargs")
    if isinstance(options, dict) and isinstance(options.get("data_files"), dict):
        content["dataset_kwargs"] = {**options, "data_files": sorted(options["data_files"])}
    return _digest(content)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=handle_non_serializable)
    # A function without source is shown with its address, which is another in each process.
    text = ADDRESS.sub("", text)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return safe(lines[0])[:300]
