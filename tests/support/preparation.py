"""A toy preparation for the executors: three phases of tasks that write small files.

The tasks count how often they were started. Run as a program it is a driver that a test can kill:
`preparation.py FOLDER [executor.key=value ...]`. What tasks do beside their work is in the folder's
`orders.json`, so that tasks on any machine read it.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import ExecutorRecipe, Recipe
from k2train.data.prepare.run.executor import run_phases
from k2train.data.prepare.run.tasks import Phase
from k2train.data.prepare.workspace import EncodeTask, Workspace, write_json
from k2train.errors import DataError, UserError


def toy_workspace(folder: Path, **orders: Any) -> Workspace:
    """`orders`: `seconds` a task takes, `fail`: {"phase/number": line}, `crash`, `kill`, `full`,
    `deny`: "phase/number".
    """
    recipe = Recipe.model_validate(
        {
            "name": "toy data",
            "output": str(folder / "out"),
            "seed": 1,
            "sequence_length": 8,
            "chunks": 1,
            "tokenizer": {"model": str(folder / "t.model")},
            "subsets": {"a": {"kind": "stdlib_code"}},
        }
    )

    tasks: list[EncodeTask] = []
    workspace = Workspace.create(
        folder / "work",
        folder / "out",
        recipe,
        SimpleNamespace(files={"tokenizer.model": b""}),
        tasks,  # type: ignore[arg-type]
    )

    (workspace.folder / "orders.json").write_text(json.dumps(orders))
    (workspace.folder / "begun").mkdir(exist_ok=True)
    return workspace


def _work(phase: str, workspace: Workspace, number: int) -> None:
    orders, name = json.loads((workspace.folder / "orders.json").read_text()), f"{phase}/{number}"
    with (workspace.folder / "begun" / f"{phase}_{number}").open("a") as stream:
        before = len(list(workspace.target.iterdir()))
        stream.write(f"{os.environ.get('SLURMD_NODENAME', '-')} {before}\n")

    if name in orders.get("fail", {}):
        raise DataError(orders["fail"][name])
    if name == orders.get("crash"):
        raise KeyError("a bug of ours")
    if name == orders.get("full"):
        raise OSError(28, "No space left on device")
    if name == orders.get("kill"):
        os.kill(os.getpid(), 9)
    time.sleep(orders.get("seconds", 0.0))
    content = hashlib.sha256(name.encode()).hexdigest() * 10
    made = workspace.target / f"{phase}_{number}.txt"
    made.write_text(content)
    listed = [{"base": "target", "path": made.name, "bytes": len(content)}]
    if name != orders.get("deny"):
        write_json(_record(phase, workspace, number), {"files": listed})
    with (workspace.folder / "begun" / f"{phase}_{number}").open("a") as stream:
        stream.write("done\n")


def _record(phase: str, workspace: Workspace, number: int) -> Path:
    return workspace.folder / "chunks" / f"{phase}_{number}.json"


def work_one(workspace: Workspace, number: int) -> None:
    _work("one", workspace, number)


def work_two(workspace: Workspace, number: int) -> None:
    _work("two", workspace, number)


def work_three(workspace: Workspace, number: int) -> None:
    _work("three", workspace, number)


def record_one(workspace: Workspace, number: int) -> Path:
    return _record("one", workspace, number)


def record_two(workspace: Workspace, number: int) -> Path:
    return _record("two", workspace, number)


def record_three(workspace: Workspace, number: int) -> Path:
    return _record("three", workspace, number)


def toy_phases(first: int = 6, last: int = 4) -> list[Phase]:
    return [
        Phase("one", first, work_one, record_one),
        Phase("two", 1, work_two, record_two),
        Phase("three", last, work_three, record_three),
    ]


def start_counts(workspace: Workspace) -> dict[str, int]:
    """How often each task was started."""
    return {
        path.name: sum("done" not in line for line in path.open())
        for path in (workspace.folder / "begun").iterdir()
    }


def finished(workspace: Workspace) -> dict[str, int]:
    """How often each task finished."""
    return {
        path.name: sum("done" in line for line in path.open())
        for path in (workspace.folder / "begun").iterdir()
    }


def in_order(workspace: Workspace, phases: list[Phase]) -> bool:
    """Whether each task started after all earlier phases had written their files."""
    needed = 0
    for phase in phases:
        for number in range(phase.tasks):
            first = (workspace.folder / "begun" / f"{phase.name}_{number}").read_text().split()
            if int(first[1]) < needed:
                return False
        needed += phase.tasks
    return True


def all_files_complete(workspace: Workspace, phases: list[Phase]) -> bool:
    """Whether every task's file exists with its content."""
    for phase in phases:
        for number in range(phase.tasks):
            path = workspace.target / f"{phase.name}_{number}.txt"
            name = f"{phase.name}/{number}"
            if (
                not path.is_file()
                or path.read_text() != hashlib.sha256(name.encode()).hexdigest() * 10
            ):
                return False
    return True


def main(arguments: list[str]) -> int:
    workspace = Workspace.open(Path(arguments[0]))
    choices = dict(argument.split("=", 1) for argument in arguments[1:])
    phases = toy_phases(int(choices.pop("first", 6)), int(choices.pop("last", 4)))
    executor = ExecutorRecipe.model_validate(
        {key: json.loads(value) for key, value in choices.items()}
    )
    try:
        run_phases(workspace, executor, Progress(), phases)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # The tasks' processes import the phases by the name of the module, not as `__main__`.
    from tests.support import preparation

    sys.exit(preparation.main(sys.argv[1:]))
