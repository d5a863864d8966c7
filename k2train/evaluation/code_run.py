"""Evaluation of a checkpoint on code tasks: prompts of all samples, result, resume.

- A result that is there for the same weights and the same settings is not made again.
- The draws of a sample are keyed by problem and sample: more samples do not change the first ones.
- No torch here: the model is the caller's.
"""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import MANIFEST
from k2train.errors import DataError, RunError, UserError
from k2train.evaluation.code_sandbox import Sandbox
from k2train.evaluation.code_tasks import (
    SAMPLE_KEYS,
    ProblemSet,
    completion_of,
    item_of,
    scores_of,
)
from k2train.evaluation.pass_at_k import check_k
from k2train.evaluation.results import (
    FORMAT,
    TaskResult,
    read_items,
    read_result,
    result_paths,
    write_result,
)
from k2train.files import sha256_file
from k2train.inference.options import Sampling
from k2train.inference.prompts import Prompt
from k2train.inference.source import Source
from k2train.retry import exists_retried

HARNESS = "k2train code 1"
"""Counted up when the same completions would get another score."""


@dataclass(frozen=True)
class CodeRun:
    """Problems, how their samples are drawn, and where the programs run."""

    problems: ProblemSet
    samples: int
    ks: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    fp32: bool

    def __post_init__(self) -> None:
        check_k(self.samples, self.ks)
        if self.samples >= SAMPLE_KEYS:
            raise UserError(f"--samples ({self.samples}) must be below {SAMPLE_KEYS}")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"--samples ({self.samples}) at --temperature 0 are all the same: set it above 0, "
                "or take one sample"
            )

    def prompts(self, source: Source) -> list[Prompt]:
        """Return the prompts of all samples of all problems. Raises DataError."""
        found = []
        for number, problem in enumerate(self.problems.problems):
            ids = tuple(source.tokenizer.encode(problem.prompt))
            if len(ids) >= source.context_tokens:
                raise DataError(
                    f"{problem.task_id} has a prompt of {len(ids)} tokens, the context of "
                    f"{source.path.name} {source.context_tokens}: leave it out of the problems"
                )
            first = number * SAMPLE_KEYS
            found += [Prompt(first + at, problem.prompt, ids) for at in range(self.samples)]
        return found

    def settings(self, source: Source, sandbox: Sandbox) -> dict[str, Any]:
        """Return all that decides the result beside the weights."""
        limits = asdict(sandbox.limits)
        return {
            "problems_sha256": self.problems.sha256,
            "problems": len(self.problems.problems),
            "samples": self.samples,
            "k": list(self.ks),
            **asdict(self.sampling),
            "max_tokens": self.max_tokens,
            "context_tokens": source.context_tokens,
            "weights": "fp32 master weights" if self.fp32 else source.precision,
            "python": platform.python_version(),
            "sandbox": sandbox.protection,
            "limits": limits,
        }

    def done(self, run: Path, source: Source, sandbox: Sandbox) -> TaskResult | None:
        """Return the result that is there for these weights and settings, if it is whole."""
        place, _ = result_paths(run, self.problems.task, source.path.name)
        if not exists_retried(place):
            return None
        try:
            result = read_result(place)
            read_items(run, result)
        except RunError:
            # Half a result is made again.
            return None
        same = result.harness == HARNESS and result.settings == self.settings(source, sandbox)
        return result if same and result.manifest_sha256 == _manifest_sha256(source) else None

    def score(
        self, run: Path, source: Source, texts: Sequence[str], sandbox: Sandbox, workers: int
    ) -> TaskResult:
        """Run the completions of all samples, in the order of `prompts`; write the result.

        Raises OSError when it cannot be written.
        """
        problems = self.problems.problems
        completions = [completion_of(text) for text in texts]
        per_problem = [
            completions[at : at + self.samples] for at in range(0, len(texts), self.samples)
        ]
        programs = [
            problem.program(completion)
            for problem, own in zip(problems, per_problem, strict=True)
            for completion in own
        ]
        outcomes = sandbox.run_all(programs, workers)
        items = [
            item_of(problem, own, outcomes[at * self.samples : (at + 1) * self.samples], self.ks)
            for at, (problem, own) in enumerate(zip(problems, per_problem, strict=True))
        ]

        scores, errors = scores_of(items, self.ks)
        result = TaskResult(
            format=FORMAT,
            task=self.problems.task,
            version=self.problems.sha256[:12],
            style="default",
            checkpoint=source.path.name,
            step=source.manifest.step,
            manifest_sha256=_manifest_sha256(source),
            harness=HARNESS,
            items=len(items),
            items_sha256="0" * 64,
            scores=scores,
            errors=errors,
            settings=self.settings(source, sandbox),
        )
        return read_result(write_result(run, result, items))


def _manifest_sha256(source: Source) -> str:
    return sha256_file(source.path / MANIFEST)
