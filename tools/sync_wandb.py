"""Write the record of a run to Weights & Biases, or as event files of TensorBoard, once more.

    python tools/sync_wandb.py RUN_DIRECTORY [--mode online] [--id ID]
    python tools/sync_wandb.py RUN_DIRECTORY --tensorboard FOLDER

- For a run that had no mirror, or whose mirror was off for a while: metrics, held-out losses,
  ledger and scores on tasks are complete, whatever a mirror has lost.
- The last start's branch is written: steps that were undone are left out.
- Without `--mode` an offline folder is made, for `wandb sync`. The id is that of the run; a run
  that W&B already has needs another one, since W&B only appends.
- No alert is sent.

Alternatives considered:
- Mending what W&B has: its rows cannot be replaced.

Exit codes: 0 done; 2 a mistake in usage or a damaged record; 1 W&B or TensorBoard failed.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from command_line import Parser, command

from k2train.config.load import Config, load_config, to_yaml
from k2train.errors import EXIT_DONE, EXIT_FAILED, RunError
from k2train.record.curves import Curves
from k2train.record.events import Started, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import last_attempt, last_record
from k2train.record.mirror import Mirror
from k2train.record.tensorboard import TensorBoardMirror
from k2train.record.wandb import WandbMirror, wandb_run_id
from k2train.report.evaluation import read_evaluations
from k2train.retry import exists_retried, is_folder_retried, list_retried
from k2train.text import counted
from k2train.train.mirror_rebuild import rebuild
from k2train.train.mirrors import chunk_facts, flops_of_rank, site_of, wandb_run

PATIENCE_SECONDS = 3600.0
"""How long W&B may take to write what is queued."""


class Once(Mirror):
    """A mirror without a run that it could slow down."""

    failure = "was not written"
    aftermath = "the record of the run is as it was"
    # The record of a long run is more than the queue of a mirror holds.
    waits = True


class OnceToWandb(Once, WandbMirror):
    """W&B, from a record."""


class OnceToTensorBoard(Once, TensorBoardMirror):
    """TensorBoard, from a record."""


def opened(directory: Path, config: Config, options: Namespace, problems: list[str]) -> Mirror:
    """The mirror to write to; `problems` gets what goes wrong there."""
    started = of_kind(read_ledger(directory / "ledger.jsonl"), Started)
    if not started:
        raise RunError(f"{directory}: the ledger has no started run")
    if last_record(directory / "metrics.jsonl") is None:
        raise RunError(f"{directory / 'metrics.jsonl'}: no step is on record, so nothing to write")
    flops = flops_of_rank(config, started[-1].world_size)
    curves = Curves(flops, site_of(config))
    if options.tensorboard is not None:
        folder = Path(options.tensorboard)
        if exists_retried(folder) and (not is_folder_retried(folder) or list_retried(folder)):
            raise RunError(f"{folder} is no empty folder: name a new one, or remove it")
        attempt = last_attempt(directory / "metrics.jsonl")
        return OnceToTensorBoard(
            folder, attempt, to_yaml(config), problems.append, curves, PATIENCE_SECONDS
        )
    id = options.id or wandb_run_id(started[0].run_id)
    run = replace(wandb_run(config, id), mode=options.mode)
    chunks = chunk_facts(config)
    return OnceToWandb(run, directory, problems.append, PATIENCE_SECONDS, curves, chunks)


@command
def main(arguments: Sequence[str]) -> int:
    """Rebuild the mirror of one run; the exit code."""
    parser = Parser(
        prog="sync_wandb",
        description="Write the record of a run to Weights & Biases or TensorBoard once more.",
    )
    parser.add_argument("directory", metavar="RUN_DIRECTORY", type=Path)
    parser.add_argument(
        "--mode",
        choices=("offline", "online"),
        default="offline",
        help="offline (default): a folder for `wandb sync`; online: send at once",
    )
    parser.add_argument("--id", help="id at W&B; default: that of the run")
    parser.add_argument(
        "--tensorboard", metavar="FOLDER", help="write event files there instead of to W&B"
    )
    options = parser.parse_args(arguments)

    directory, problems = options.directory, list[str]()
    if not (directory / "config.yaml").is_file():
        raise RunError(f"{directory}: no config.yaml there; give the directory of a run")
    config = load_config(str(directory / "config.yaml"))
    mirror = opened(directory, config, options, problems)
    steps, scores = rebuild(directory, mirror)
    notes: list[str] = []
    last = last_record(directory / "metrics.jsonl")
    for result in read_evaluations(directory, notes):
        # That of a checkpoint that a return has undone.
        if last is None or result.step > last.step:
            continue
        values = {f"evaluation/{result.task}/{name}": v for name, v in result.scores.items()}
        mirror.evaluation(result.step, values)
    mirror.close()
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if problems:
        online = options.mode == "online" and options.tensorboard is None
        hint = "; without --mode online a folder for `wandb sync` is made" if online else ""
        print("\n".join(problems) + hint, file=sys.stderr)
        return EXIT_FAILED
    place = options.tensorboard or (
        f"{directory / 'wandb'}; send it with: wandb sync {directory / 'wandb'}/offline-run-*"
        if options.mode == "offline"
        else f"project {config.wandb.project}"
    )
    print(f"{counted(steps, 'step')}, {counted(scores, 'held-out score')}: written to {place}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
