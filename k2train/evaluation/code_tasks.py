"""Code tasks: problems with tests, a model's completions as programs, and the results of both.

    {"task_id": "demo/1", "prompt": "def double(x):\n    ...", "entry_point": "double",
     "test": "def check(candidate):\n    assert candidate(2) == 4"}

- The format is HumanEval's: one object a line. `canonical_solution` is optional, and is never
  shown to the model.
- A program is prompt, completion, test and a call of `check`. It passes when it runs to its end.
- A completion ends where the function ends: at the first line that begins something new.

Source of format and stop sequences: Chen et al. 2021 (arXiv:2107.03374), section 2 and 3.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import DataError
from k2train.evaluation.code_sandbox import Outcome
from k2train.evaluation.pass_at_k import mean_and_error, pass_at_k
from k2train.evaluation.results import Item
from k2train.json_record import Record, Text
from k2train.retry import reason
from k2train.safe_json import parse_json, read_plain_file

MAX_FILE_BYTES = 2**28
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nimport", "\nfrom", "\nassert")
"""Beginnings of lines that are no longer of the function: HumanEval's five, and four more."""
TASK_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
SAMPLE_KEYS = 2**20
"""Numbers of draws that belong to one problem: those of a sample do not depend on their count."""


class Problem(Record):
    """A function to write, and the test of it."""

    task_id: Text
    prompt: str
    test: str
    entry_point: Text
    canonical_solution: str = ""

    def program(self, completion: str) -> str:
        """Return the program that passes if `completion` is right."""
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class ProblemSet:
    """Problems of a file, under the name of a task, and the hash of the file."""

    task: str
    problems: tuple[Problem, ...]
    sha256: str


def read_problems(path: Path, task: str | None = None) -> ProblemSet:
    """Read a file of problems; its name is the task's unless `task` is. Raises DataError."""
    name = task or path.name.split(".")[0]
    if not TASK_NAME.fullmatch(name):
        raise DataError(
            f"--task ({name}): is a folder's name, of letters, digits, dot, dash and underscore"
        )
    try:
        content = read_plain_file(path, MAX_FILE_BYTES)
    except OSError as error:
        raise DataError(f"--problems: {path} cannot be read ({reason(error, path)})") from None
    except ValueError as error:
        raise DataError(f"--problems: {path}: {error}") from None

    problems: dict[str, Problem] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            problem = _problem(f"--problems: {path}, line {number}", line)
            if problem.task_id in problems:
                raise DataError(
                    f"--problems: {path}, line {number}: task_id {problem.task_id} is there twice"
                )
            problems[problem.task_id] = problem
    if not problems:
        raise DataError(f"--problems: {path} has no problem; write one object a line")
    return ProblemSet(name, tuple(problems.values()), hashlib.sha256(content).hexdigest())


def _problem(where: str, line: bytes) -> Problem:
    try:
        problem = Problem.parse(parse_json(line))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if not problem.entry_point.isidentifier():
        raise DataError(f"{where}: entry_point {problem.entry_point!r} is no name of a function")
    if not problem.prompt.strip():
        raise DataError(f"{where}: prompt is empty; it must have the function's first line")
    return problem


def completion_of(text: str) -> str:
    """Cut a generated text where the function ends."""
    ends = [at for stop in STOPS if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def item_of(
    problem: Problem, completions: Sequence[str], outcomes: Sequence[Outcome], ks: Sequence[int]
) -> Item:
    """Return the result of one problem from its completions and how their programs ended."""
    correct = sum(outcome.passed for outcome in outcomes)
    samples = len(completions)
    kinds = Counter(outcome.kind for outcome in outcomes)
    return Item(
        item=problem.task_id,
        prompt_sha256=hashlib.sha256(problem.prompt.encode()).hexdigest(),
        prompt=problem.prompt,
        target=problem.canonical_solution,
        generated=tuple(completions),
        scores={
            **{f"pass@{k}": pass_at_k(samples, correct, k) for k in ks},
            "samples": samples,
            **{f"samples_{kind}": count for kind, count in sorted(kinds.items())},
        },
    )


def scores_of(
    items: Sequence[Item], ks: Sequence[int]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return each pass@k of the task, and their standard errors."""
    names = [f"pass@{k}" for k in ks]
    found = {name: mean_and_error([float(item.scores[name]) for item in items]) for name in names}
    scores = {name: mean for name, (mean, _) in found.items()}
    return scores, {name: error for name, (_, error) in found.items() if error is not None}
