"""Code evaluation: pass@k of a run's checkpoints on problems with tests, programs in a sandbox.

    python tools/code_eval.py RUN --problems FILE --run-code [--samples N] [--temperature T]
        [--k 1,10] [--checkpoints all|newest|every:N|0,2,5] [--limit N] [--task NAME]

- FILE has a problem a line, in HumanEval's format: task_id, prompt, test, entry_point.
- It runs programs that a model wrote: nothing is run without --run-code. Each runs in a process
  without network, files or privileges (docs/code_tasks.md).
- Results are in RUN/evaluation; one that is there for the same weights and settings is kept.

Exit codes: 0 done; 1 the disk refused; 2 a mistake in usage, problems or checkpoint, one line.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from command_line import Parser, command, positive

from k2train.checkpoint.selection import chosen
from k2train.errors import UserError
from k2train.evaluation.code_run import CodeRun
from k2train.evaluation.code_sandbox import WALL_TO_CPU, Limits, Sandbox
from k2train.evaluation.code_tasks import read_problems
from k2train.evaluation.results import FOLDER, TaskResult
from k2train.inference.command import (
    add_options,
    check_ranks,
    note,
    sampling_of,
    with_one_voice,
)
from k2train.inference.options import Limits as AnswerLimits
from k2train.inference.source import Source
from k2train.launch.environment import Launch, read_launch
from k2train.text import counted, number, table


def _parser() -> Parser:
    parser = Parser(prog="code_eval", description="Measure pass@k of a run's checkpoints.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE", help="a jsonl file")
    parser.add_argument("--task", metavar="NAME", help="name of the results (that of the file)")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N problems alone")
    parser.add_argument("--samples", type=positive, default=1, help="answers to each problem (1)")
    parser.add_argument("--k", default="1", help="which pass@k, as 1,10 (1)")
    parser.add_argument(
        "--checkpoints", default="newest", help="all, newest (default), every:N, or 0,2,5"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="yes, run programs that the model wrote"
    )
    parser.add_argument(
        "--weak-sandbox", action="store_true", help="also where the kernel cannot shut them off"
    )
    parser.add_argument("--cpu-seconds", type=positive, default=5, help="of each program (5)")
    parser.add_argument("--workers", type=positive, default=4, help="programs at a time (4)")
    parser.add_argument("--batch", type=positive, default=8, help="answers at a time (8)")
    parser.add_argument("--tokenizer", type=Path, help="if it is no longer beside the data")
    add_options(parser, 256, "result")
    return parser


@command
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    launch = read_launch()
    return with_one_voice(lambda: _evaluate(options, launch), launch)


def _evaluate(options: argparse.Namespace, launch: Launch) -> int:
    if not options.run_code:
        raise UserError(
            "this runs programs that a model wrote, and they may do anything: say --run-code "
            "(docs/code_tasks.md has what they are kept from)"
        )
    check_ranks(options, launch)
    code = _code_run(options)
    paths = chosen(options.run, options.checkpoints)
    sources = [Source.find(path, options.tokenizer) for path in paths]
    for source in sources:
        # A problem that is too long is told before anything is computed.
        code.prompts(source)
    seconds = options.cpu_seconds
    limits = Limits(cpu_seconds=seconds, wall_seconds=float(WALL_TO_CPU * seconds))
    sandbox = Sandbox.open(limits, options.weak_sandbox)
    say = note(launch)
    if not sandbox.namespaces:
        say(f"warning: programs are held by {sandbox.protection} alone ({sandbox.reason})")

    results = {source.path: code.done(options.run, source, sandbox) for source in sources}
    missing = [source for source in sources if results[source.path] is None]

    def score(source: Source, texts: Sequence[str]) -> TaskResult:
        say(f"{source.path.name}: {counted(len(texts), 'program')}")
        return code.score(options.run, source, texts, sandbox, options.workers)

    if missing:
        results |= _scored(code, missing, options, launch, score)
    if launch.rank == 0:
        _show([one for one in results.values() if one is not None], options.json)
    return 0


def _code_run(options: argparse.Namespace) -> CodeRun:
    parts = options.k.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--k ({options.k}): must be whole numbers with commas, as 1,10")
    problems = read_problems(options.problems, options.task)
    if options.limit:
        problems = replace(problems, problems=problems.problems[: options.limit])
    ks = tuple(sorted(set(map(int, parts))))
    sampling = sampling_of(options)
    return CodeRun(problems, options.samples, ks, sampling, options.max_tokens, options.fp32)


def _scored(
    code: CodeRun,
    sources: Sequence[Source],
    options: argparse.Namespace,
    launch: Launch,
    score: Callable[[Source, Sequence[str]], TaskResult],
) -> dict[Path, TaskResult | None]:
    """Let each checkpoint answer, and rank 0 score its samples; collective."""
    found: dict[Path, TaskResult | None] = {}
    session = importlib.import_module("k2train.inference.session")
    language_model: Callable[..., Any] = importlib.import_module(
        "k2train.inference.model"
    ).LanguageModel
    first, *others = sources
    layout = (options.tensor, options.pipeline)
    with session.opened(first, launch, *layout, options.fp32, note(launch)) as model:
        for source in (first, *others):
            if source is not first:
                # The weights before go first.
                grid, device = model.grid, model.device
                del model
                model = language_model(source, grid, device, options.fp32)
            tokenizer = source.tokenizer
            stops = frozenset({tokenizer.eos_id})
            limits = AnswerLimits(options.max_tokens, stops, tokenizer.vocab_size, options.batch)
            answers = session.generate(model, code.prompts(source), limits, code.sampling)
            texts = [tokenizer.decode(answer.ids) for answer in answers]
            found[source.path] = session.on_first(
                model.grid, partial(score, source, texts), options.run / FOLDER
            )
    return found


def _show(results: Sequence[TaskResult], as_json: bool) -> None:
    if as_json:
        for result in results:
            print(json.dumps(result.model_dump(), ensure_ascii=False))
        return
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    rows = []
    for result in results:
        cells = [result.checkpoint, number(result.step), number(result.items)]
        for name in names:
            error = result.errors.get(name)
            more = "" if error is None else f" +- {number(error, 3)}"
            cells.append(f"{number(result.scores.get(name), 3)}{more}")
        rows.append(cells)
    print("\n".join(table(["checkpoint", "step", "problems", *names], rows, ("checkpoint",))))


if __name__ == "__main__":
    sys.exit(main())
