"""Evaluation of a run's checkpoints with lm-eval's tasks, without an export.

    python tools/evaluate.py RUN --tasks demo                        the newest checkpoint
    python tools/evaluate.py RUN --tasks A,B,mine.yaml --checkpoints all
    python tools/evaluate.py RUN --tasks k2_table2 --checkpoints every:20 --download
    python -m k2train.launch --nproc-per-node 4 tools/evaluate.py RUN --tasks A --tensor 2
        [--pipeline 2]

- Tasks: those of `configs/tasks`, YAML files, those of lm-eval, and lists of tasks with shots.
- Results are RUN/evaluation/TASK/ckpt_NNN.json and, item by item, ckpt_NNN.items.jsonl. What exists
  for the same weights, task, shots and settings is not made again.
- No network: a task whose data are not on this machine is one line. --download permits it.
- With several processes, items are divided over the replicas that tensor and pipeline parallelism
  leave.

Exit codes: 0 done; 1 the disk refused; 2 a mistake, in one line. Results written before it stay.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from command_line import Parser, command, positive

from k2train.checkpoint.selection import chosen
from k2train.commands import tools_folder
from k2train.errors import EXIT_DONE, ConfigError, UserError
from k2train.evaluation.scores import table_lines
from k2train.evaluation.selection import local_names, select_tasks
from k2train.inference.command import note, with_one_voice
from k2train.launch.environment import Launch, read_launch
from k2train.launch.environment_defaults import (
    set_environment_defaults,
    set_harness_environment,
)
from k2train.retry import is_folder_retried

TASKS = "tasks"
"""Folder of the local tasks in that of the configs."""


def _parser() -> Parser:
    parser = Parser(prog="evaluate", description="Score checkpoints of a run on tasks.")
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--tasks", required=True, help="names, YAML files or lists, with commas")
    parser.add_argument(
        "--checkpoints", default="newest", metavar="WHICH", help="newest | all | every:N | 0,2,5"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only N items of each task")
    parser.add_argument(
        "--shots", type=shots, metavar="N", help="worked examples, where no list says"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="inputs a pass (8)")
    parser.add_argument("--tensor", type=positive, default=1, help="tensor-parallel processes")
    parser.add_argument("--pipeline", type=positive, default=1, help="pipeline-parallel processes")
    parser.add_argument("--fp32", action="store_true", help="the fp32 master weights")
    parser.add_argument("--tokenizer", type=Path, help="if it is no longer beside the data")
    parser.add_argument("--task-folder", type=Path, metavar="DIR", help="more tasks, before ours")
    parser.add_argument("--again", action="store_true", help="make results again that exist")
    parser.add_argument("--download", action="store_true", help="data of tasks may be downloaded")
    return parser


def shots(text: str) -> int:
    """Argument type: a whole number from 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, not {text!r}")
    return int(text)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    launch = read_launch()
    return with_one_voice(lambda: _evaluate(options, launch), launch)


def _evaluate(options: argparse.Namespace, launch: Launch) -> int:
    ranks = options.tensor * options.pipeline
    if launch.world_size % ranks:
        raise ConfigError(
            f"--tensor ({options.tensor}) x --pipeline ({options.pipeline}) = {ranks} must divide "
            f"the {launch.world_size} processes that were started: start a multiple of {ranks}, or "
            "lower them"
        )
    checkpoints = chosen(options.run, options.checkpoints)
    if options.task_folder is not None and not is_folder_retried(options.task_folder):
        raise ConfigError(f"--task-folder: {options.task_folder} is not a folder; name one")
    folders = [*([options.task_folder] if options.task_folder else []), tasks_folder()]
    tasks, code = select_tasks(options.tasks, options.shots, folders)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation needs the package lm-eval: pip install 'k2train[eval]'")

    say = note(launch)
    if code:
        say(f"left out, their answers are programs to run: {', '.join(code)}")
    # Before torch and lm-eval, which read them once.
    set_environment_defaults(launch.world_size, deterministic=False)
    set_harness_environment(offline=not options.download)
    with own_folder_hidden():
        evaluation = importlib.import_module("k2train.evaluation.run")
        request = evaluation.Request(
            options.run,
            checkpoints,
            tasks,
            local_names(folders),
            options.limit,
            options.batch,
            options.tensor,
            options.pipeline,
            options.fp32,
            options.tokenizer,
            options.again,
        )
        results = evaluation.evaluate_run(request, launch, say)
    if launch.rank == 0:
        for line in table_lines(results):
            print(line)
    return EXIT_DONE


@contextmanager
def own_folder_hidden() -> Iterator[None]:
    """Keep this file's folder off the import path: tasks of lm-eval import a package `evaluate`."""
    own = Path(__file__).resolve().parent
    before = list(sys.path)
    sys.path[:] = [place for place in before if Path(place).resolve() != own]
    try:
        yield
    finally:
        sys.path[:] = before


def tasks_folder() -> Path:
    """Return the folder of the local tasks: beside the installed tools, or in this checkout."""
    installed = tools_folder() / "configs"
    return (installed if installed.is_dir() else tools_folder().parent / "configs") / TASKS


if __name__ == "__main__":
    sys.exit(main())
