"""Commands of `k2train`: one line for each, where its program is, and how a user calls it here.

- `python tools/NAME.py` in a checkout and `k2train NAME` after `pip install` are the same file. A
  wheel holds `tools/` as the package `k2train_tools`, whose files run as scripts, as in a checkout.
- A message names a program the way that works here: `program_text("prepare_data")`.

Alternatives considered:
- The tools as modules of `k2train`: every tool would be there twice, as a module and as a script.
- Finding commands by listing the folder: a helper module or a benchmark would become a command.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

INSTALLED_TOOLS = "k2train_tools"
"""Package of a wheel that holds the files of `tools/`, and `configs/`."""


class Command(NamedTuple):
    """A program, and what it does in a few words."""

    program: str
    """A module with a dot in its name, or a file of `tools/` without `.py`."""
    summary: str


GROUPS: Mapping[str, Mapping[str, Command]] = {
    "begin": {
        "init": Command("init", "write example configs and recipes into a folder"),
        "doctor": Command("doctor", "say what works on this machine, and what to install"),
    },
    "data": {
        "prepare-data": Command("prepare_data", "documents to chunks, from a recipe"),
        "train-tokenizer": Command("train_tokenizer", "a tokenizer from text files"),
        "inspect": Command("inspect_data", "rows, documents and steps, as text"),
        "prepare-chat": Command("prepare_chat", "conversations to chunks with loss masks"),
        "verify-data": Command("verify_data", "check every byte of a data folder"),
        "trace": Command("trace", "find a text in the data, and the steps that read it"),
    },
    "train": {
        "plan": Command("plan", "memory, schedule and picture of a config; needs no device"),
        "calibrate": Command(
            "calibrate", "speed of this machine, for plans; plans beside real steps"
        ),
        "dry-run": Command("dry_run", "memory, FLOPs and traffic of one rank of any world"),
        "train": Command("k2train.train", "train a config, or resume its run"),
        "launch": Command("k2train.launch", "start a program on several processes"),
        "show": Command("show_run", "checkpoints and losses of a run"),
        "report": Command("report", "a run on one HTML page"),
        "sync-wandb": Command("sync_wandb", "a run's record into W&B or TensorBoard, anew"),
        "energy": Command("energy", "energy and emissions of runs"),
        "plot-loss": Command("plot_loss", "loss curves as SVG"),
        "who-is-stuck": Command("who_is_stuck", "the rank that blocks a run"),
        "defer-chunk": Command("defer_chunk", "move a chunk to a later position of a run"),
    },
    "check": {
        "verify": Command("verify_run", "check every file of a run"),
        "verify-checkpoint": Command("verify_checkpoint", "check every byte of checkpoints"),
        "compare": Command("compare_runs", "the first step or tensor where two runs differ"),
        "replay": Command("replay", "do recorded steps again and compare"),
        "find-spikes": Command("find_spikes", "spikes and restarts that lie in a series"),
        "spike": Command("spike", "what a spike was made of"),
        "mend-ledger": Command("mend_ledger", "go on from what is intact of a ledger"),
    },
    "use": {
        "generate": Command("generate", "continue a text with a checkpoint"),
        "chat": Command("chat", "talk with a checkpoint"),
        "merge": Command("merge", "several checkpoints as one"),
        "gallery": Command("gallery", "prompts and evaluations down the checkpoints, as pages"),
        "score": Command("score", "held-out loss of checkpoints"),
        "contamination": Command("contamination", "test items that a run has read, and scores"),
        "code-eval": Command("code_eval", "pass@k of checkpoints, programs in a sandbox"),
        "evaluate": Command("evaluate", "checkpoints of a run on tasks of lm-eval"),
        "convert-hf": Command("convert_hf", "to and from Hugging Face folders"),
        "attest": Command("attest", "proofs of a release, for other people's verifiers"),
    },
    "publish": {
        "release": Command("release", "runs as one folder for others"),
        "verify-release": Command("verify_release", "check a release with itself alone"),
    },
}
"""Commands by what they are for, in a reader's order."""
COMMANDS: Mapping[str, Command] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}
_started: list[str] = []
"""Name of the command that this process was started as; empty for a program of its own."""


def start_as(name: str) -> None:
    """Let messages of this process name commands as `k2train NAME`."""
    _started[:] = [name]


def started_as() -> str:
    """Return `k2train NAME` where this process was started so, else an empty text."""
    return f"k2train {_started[0]}" if _started else ""


def tools_folder() -> Path:
    """Return the folder of the tools: that of the wheel, else that of this checkout."""
    beside = Path(__file__).resolve().parents[1]
    installed = beside / INSTALLED_TOOLS
    return installed if installed.is_dir() else beside / "tools"


def program_text(program: str) -> str:
    """Return the command line that starts a program here.

    `python tools/plan.py` in a checkout; `k2train plan` after an installation, and where this
    process was itself started as a `k2train` command.
    """
    if _started or tools_folder().name == INSTALLED_TOOLS:
        name = next(name for name, command in COMMANDS.items() if command.program == program)
        return f"k2train {name}"
    return f"python -m {program}" if "." in program else f"python tools/{program}.py"
