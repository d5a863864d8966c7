"""Example configs, data recipes and a SLURM script, written into a folder to start from.

    python tools/init.py FOLDER

- Writes FOLDER/configs: a demo that trains on any machine, the layouts of K2-65B, and presets of
  usual sizes. The demo's text is Python's own library, so it needs no download.
- Writes FOLDER/scripts/pretrain.sbatch, for runs on SLURM.
- The configs appear whole or not at all, and nothing that is there is replaced.

Exit codes: 0 done; 1 a folder that cannot be written; 2 a folder that has configs already.
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from command_line import Parser, command

from k2train.commands import tools_folder
from k2train.errors import EXIT_DONE, RunError, UnavailableError
from k2train.text import counted

CONFIGS = "configs"
SCRIPT = Path("scripts", "pretrain.sbatch")


def shipped(path: str | Path) -> Path:
    """Return the configs or the script: beside the installed tools, or in this checkout."""
    installed = tools_folder() / path
    return installed if installed.exists() else tools_folder().parent / path


def write_configs(folder: Path) -> list[Path]:
    """Write FOLDER/configs and the script, and return the files, relative to the folder.

    Raises RunError when one is there, and UnavailableError when it cannot be written.
    """
    target, script = folder / CONFIGS, folder / SCRIPT
    for path in (target, script):
        if path.exists() or path.is_symlink():
            raise RunError(f"{path} is there already and is not replaced; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".configs-", dir=folder) as scratch:
            copy = Path(scratch) / CONFIGS
            skipped = shutil.ignore_patterns("*.py", "__pycache__")
            shutil.copytree(shipped(CONFIGS), copy, ignore=skipped, copy_function=shutil.copyfile)
            unfinished = Path(scratch) / SCRIPT.name
            shutil.copyfile(shipped(SCRIPT), unfinished)
            script.parent.mkdir(exist_ok=True)
            unfinished.rename(script)
            copy.rename(target)
    except OSError as problem:
        # copytree collects the errors of all files in one: (source, target, text) of each.
        every = problem.args[0] if isinstance(problem, shutil.Error) else ()
        why = every[0][2] if every else problem.strerror or problem
        raise UnavailableError(f"{target} cannot be written: {why}") from None
    return [*sorted(path.relative_to(folder) for path in target.rglob("*.*")), SCRIPT]


def next_steps(folder: Path) -> list[str]:
    """Return the commands that follow, each with what it does."""
    demo = f"{CONFIGS}/demo"
    steps = [(f"cd {shlex.quote(str(folder))}", "")] if folder.resolve() != Path.cwd() else []
    if find_spec("pyarrow") is None:
        steps.append(("pip install 'k2train[data]'", "what preparing data needs"))
    steps += [
        ("k2train doctor", "what works on this machine"),
        (f"k2train prepare-data {demo}/data_stage1.yaml", "text to chunks"),
        (f"k2train train {demo}/stage1.yaml", "train on one process"),
        ("k2train show runs/demo-stage1", "its checkpoints and losses"),
        (f"k2train plan {CONFIGS}/presets/llama_8b.yaml --world 64", "a larger one"),
    ]
    width = max(len(line) for line, _ in steps)
    return [f"  {line:<{width}}  {f'# {what}' if what else ''}".rstrip() for line, what in steps]


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="init", description="Write example configs, recipes and a SLURM script into a folder."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made if it is not there")
    folder = parser.parse_args(arguments).folder
    files = write_configs(folder)
    print(f"{folder}: {counted(len(files), 'file')}")
    print("\n".join(f"  {path}" for path in files))
    print("\nnext:\n" + "\n".join(next_steps(folder)))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
