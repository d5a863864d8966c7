"""The house rules, read off the source: who may import whom, and what no file may hold.

They are tests because a rule that is only in a document is broken by the third change. Every rule
lists the places it allows; loosening one means changing this file, in the open.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import k2train
from k2train.config.load import load_config
from k2train.config.schema import sections
from k2train.data.prepare.load_recipe import load_recipe
from k2train.evaluation.selection import read_yaml
from k2train.planner.cluster_file import load_cluster

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "k2train").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
SOURCE = [*PACKAGE, *TOOLS]

BASE = {
    "command_line",
    "commands",
    "early_signals",
    "errors",
    "expectation",
    "fault_injection",
    "files",
    "json_record",
    "processes",
    "retry",
    "safe_json",
    "state_digest",
    "text",
}
"""Modules at the root: what every room may use."""
THIRD_LAYER = {"model", "optim", "data", "checkpoint", "guard", "watchdog", "run_lock"}
"""Rooms that do not know each other, nor the config."""
ALLOWED = {
    **{name: set() for name in BASE},
    "command_line": {"commands", "errors"},
    "__main__": {"command_line", "commands"},
    "fault_injection": {"errors"},
    "retry": {"errors", "text"},
    "files": {"retry"},
    "safe_json": {"retry"},
    "config": {"errors", "expectation", "files", "safe_json"},
    "plan": {"errors"},
    "launch": {"command_line", "commands", "early_signals", "errors", "processes"},
    "record": {
        "commands",
        "errors",
        "expectation",
        "fault_injection",
        "files",
        "json_record",
        "retry",
        "safe_json",
        "text",
    },
    "parallel": {"errors", "launch", "plan", "safe_json", "state_digest"},
    "triton_kernels": {"errors"},
    **{name: {*BASE, "plan", "parallel"} for name in THIRD_LAYER},
    "model": {*BASE, "plan", "parallel", "triton_kernels"},
    "optim": {*BASE, "plan", "parallel", "triton_kernels"},
    "hf": {*BASE, "config", "plan", "parallel", "model", "data", "checkpoint"},
    "train": {*BASE, "config", "launch", "plan", "parallel", "record", "hf", *THIRD_LAYER},
    "planner": {*BASE, "config", "plan", "record", "data", "checkpoint", "guard", "train"},
    "calibrate": {
        *BASE,
        *("config", "launch", "plan", "planner", "record", "parallel", "model", "data", "train"),
    },
    "replay": {*BASE, "config", "launch", "plan", "parallel", "record", *THIRD_LAYER, "train"},
    "report": {*BASE, "config", "data", "checkpoint", "record", "evaluation"},
    "api": {*BASE, "config", "launch", "plan", "parallel", "record", "hf", *THIRD_LAYER, "train"},
    "inference": {*BASE, "config", "launch", "plan", "parallel", "model", "data", "checkpoint"},
    "chat": {*BASE, "config", "plan", "parallel", "model", "data", "checkpoint", "inference"},
    "merge": {*BASE, "plan", "model", "data", "checkpoint", "record", "run_lock", "hf"},
    "evaluation": {
        *BASE,
        *("config", "launch", "plan", "parallel", "record"),
        *("model", "data", "checkpoint", "inference"),
    },
    "gallery": {
        *BASE,
        *("record", "data", "checkpoint", "inference", "evaluation", "report"),
    },
    "release": {
        *BASE,
        *("config", "data", "checkpoint", "record", "hf", "report", "evaluation", "proofs"),
    },
    "proofs": {*BASE, "config", "data", "checkpoint", "record", "report", "evaluation"},
}
"""What each room may import besides itself."""
ALSO_ALLOWED = {
    # As strict as the config, and therefore with its text and its messages.
    "data/prepare/load_recipe.py": {"config"},
    "data/prepare/recipe.py": {"config"},
    "data/prepare/tokenizer_recipe.py": {"config"},
    # Refuses faults that a config does not permit, before it starts a process.
    "launch/__main__.py": {"config", "fault_injection"},
    # What a run did is read from its ledger, as events of `record`.
    **{
        name: {"record"}
        for name in (
            "data/order.py",
            "data/inspect/fed_steps.py",
            "data/inspect/run_progress.py",
            "data/inspect/run_usage.py",
            "data/trace/exposures.py",
            "guard/crash_loop.py",
            "guard/failure_history.py",
        )
    },
}
"""What single modules may import besides."""
PROGRAMS = ("k2train.train", "k2train.launch.__main__", "k2train.launch.supervisor")
"""Only their own room imports them, what plans a run or does its steps again, and the interface to
Python."""
INNER_ROOMS = {
    "data": ("", "verify", "inspect", "trace", "prepare"),
    "data/prepare": ("", "sources", "encode", "allocate", "write", "run", "k2_format"),
    "model": ("kernels", ""),
}
"""The rooms inside a room, lowest first; "" is the room's own modules.

An import goes to a lower one.
"""

TORCHRUN = tuple(
    f"k2train/launch/{name}.py" for name in ("__main__", "rendezvous", "torchrun_close")
)
"""torchrun, with another end: these two start with torch."""
TORCH_FREE = [
    *(ROOT / "k2train" / f"{name}.py" for name in sorted(BASE)),
    *(
        ROOT / f"k2train/train/{name}.py"
        for name in (
            "__main__",
            "bundle_read",
            "checkpoints_ahead",
            "data_seen",
            "deferral",
            "followed",
            "held_out_sets",
            "ledger_check",
            "machine",
            "memory_check",
            "memory_report",
            "mirrors",
            "open_console",
            "preflight",
            "resume_check",
            "rounding",
            "schedule_change",
            "setup",
            "spike_names",
            "stage_transition",
            "start_notes",
            "start_point",
            "state",
        )
    ),
    *(
        path
        for name in (
            "chat",
            "config",
            "data",
            "gallery",
            "guard",
            "launch",
            "plan",
            "proofs",
            "planner",
            "record",
            "report",
            "run_lock",
            "watchdog",
        )
        for path in (ROOT / "k2train" / name).rglob("*.py")
        if path.relative_to(ROOT).as_posix() not in TORCHRUN
    ),
    *(
        ROOT / f"k2train/checkpoint/{name}.py"
        for name in (
            "disk_space",
            "file_digest",
            "likely_files",
            "manifest",
            "manifest_types",
            "moments",
            "piece_check",
            "retention",
            "scrub",
            "selection",
            "shards",
            "side_files",
            "verify",
        )
    ),
    *(
        ROOT / f"k2train/calibrate/{name}.py"
        for name in (
            "check",
            "check_file",
            "check_picture",
            "clock_names",
            "cluster_text",
            "engine_config",
            "fit",
            "machine",
            "pace",
            "processes",
            "speeds",
            "workload",
        )
    ),
    *(ROOT / f"k2train/replay/{name}.py" for name in ("begin", "recorded_run", "request")),
    *(
        ROOT / f"k2train/hf/{name}.py"
        for name in (
            "chat_template",
            "config_file",
            "folder",
            "import_folder",
            "json_tokenizer_files",
            "names",
            "nasty_strings",
            "shapes",
            "shard_writer",
            "tokenizer_files",
            "tokenizer_settings",
            "tokenizer_source",
        )
    ),
    *(
        ROOT / f"k2train/inference/{name}.py"
        for name in ("command", "options", "prompts", "source", "text_stream")
    ),
    ROOT / "k2train/merge/weights.py",
    *(
        path
        for path in (ROOT / "k2train/release").glob("*.py")
        if path.stem not in ("models", "release")
    ),
    *(
        ROOT / f"k2train/evaluation/{name}.py"
        for name in (
            "code_run",
            "code_sandbox",
            "code_sandbox_calls",
            "code_sandbox_child",
            "code_tasks",
            "contamination",
            "contamination_findings",
            "contamination_items",
            "contamination_report",
            "exposed_scores",
            "pass_at_k",
            "results",
            "scores",
            "selection",
        )
    ),
    ROOT / "k2train/model/architecture.py",
    ROOT / "k2train/optim/lr_schedule.py",
]
TORCH_ALLOWED = {"data/loader.py"}

INNER_IMPORTS = re.compile(
    r"k2train/(api|record/(wandb|tensorboard|device_counter)|model/kernels/\w+|triton_kernels/load|hf/(model|tokenizer)_check"
    r"|data/(prepare/[\w/]+|tokenizer|json_tokenizer|inspect/provenance|trace/build)"
    r"|proofs/(formats|keys|signature|time_stamp))\.py"
)
"""Optional packages may be imported where they are used. So may torch in `api`, whose tables need
none.
"""
ENVIRONMENT = re.compile(
    r"k2train/(train/host_memory|launch/environment(_defaults)?|record/\w+)\.py|tools/mutation_check\.py"
)
"""The last one only hands its environment on to the tests it starts."""
PRINTS = re.compile(
    r"(k2train/(((train|launch)/)?__main__|command_line)|tools/\w+)\.py|k2train/data/prepare/progress\.py"
)
"""Only command lines write to the terminal; `progress` is the stream of one of them."""


FUNCTION_LINES, CLASS_LINES, PARAMETERS = 60, 300, 6
"""Longest function and class, docstrings included, and most parameters of a constructor."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file: a dozen rules look at each of them."""
    return tuple(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever in the file.

    `from a import b` counts as `a` and as `a.b`.
    """
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            module = str(node.module)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT / "k2train").parts[0]
    return first.removesuffix(".py")


def wrong_direction(path: Path) -> list[str]:
    part = part_of(path)
    if part == "__init__":
        return [f"{name_of(path)}:{line}: imports {module}" for line, module in imports_of(path)]
    allowed = (
        ALLOWED[part]
        | {part}
        | ALSO_ALLOWED.get(path.relative_to(ROOT / "k2train").as_posix(), set())
    )
    found = []
    for line, module in imports_of(path):
        if module.split(".")[0] != "k2train" or module == "k2train":
            continue
        target = module.split(".")[1]
        if target not in allowed:
            found.append(f"{name_of(path)}:{line}: k2train.{part} must not import {module}")
    return found


LOOKS = {
    *("exists", "is_file", "is_dir", "is_symlink", "iterdir", "glob", "rglob"),
    *("lexists", "isfile", "isdir", "islink"),
}
"""Functions of pathlib, os.path and glob that take an error of the file system for "not there"."""
MAY_LOOK = {
    # The files of this machine, and of the interpreter.
    "commands.py",
    "launch/__main__.py",
    "launch/environment.py",
    "launch/status.py",
    "processes.py",
    "data/prepare/sources/stdlib.py",
    "evaluation/code_sandbox_child.py",
    # Taking a lock is tried again as a whole.
    "run_lock/lease.py",
    "run_lock/lock.py",
    # What is tidied, dropped from memory, or said of a full disk decides nothing.
    "retry.py",
    "train/start_record.py",
    "checkpoint/retention.py",
    "checkpoint/shards.py",
    "data/prepare/run/estimate.py",
    "data/prepare/run/slurm.py",
}


def test_nothing_is_missing_because_of_a_hiccup() -> None:
    """Catches a ledger, checkpoint or source that is "not there" while its server is away:
    `k2train.retry` asks again, and never answers an error with no.
    """
    found = {
        path.relative_to(ROOT / "k2train").as_posix()
        for path in PACKAGE
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LOOKS
    }
    assert found == MAY_LOOK


def test_every_part_is_known() -> None:
    """Catches a new folder or module that no rule speaks of."""
    assert {part_of(path) for path in PACKAGE} - {"__init__"} == set(ALLOWED)


def test_imports_run_one_way() -> None:
    """Catches an import that goes up a floor, to another room of the same floor, or to train."""
    assert [line for path in PACKAGE for line in wrong_direction(path)] == []


def inner_room_of(outer: str, dotted: str) -> str | None:
    """The room inside `outer` that holds a module or name; None when it is not in `outer`."""
    inside = f"k2train.{outer.replace('/', '.')}."
    if not dotted.startswith(inside):
        return None
    first = dotted.removeprefix(inside).split(".")[0]
    return first if first in INNER_ROOMS[outer] else ""


@pytest.mark.parametrize("outer", INNER_ROOMS)
def test_inner_rooms_import_downwards(outer: str) -> None:
    """Catches a circle between the rooms of a room, which the rule above cannot see."""
    order = INNER_ROOMS[outer]
    folders = {p.name for p in (ROOT / "k2train" / outer).iterdir() if (p / "__init__.py").exists()}
    assert folders == {name for name in order if name}, "a folder that the order does not name"
    found = []
    for path in sorted((ROOT / "k2train" / outer).rglob("*.py")):
        dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        own = inner_room_of(outer, dotted)
        for line, module in imports_of(path):
            target = inner_room_of(outer, module)
            if own is not None and target is not None and order.index(target) > order.index(own):
                found.append(f"{name_of(path)}:{line}: {module}")
    assert found == []


def test_nothing_imports_a_program() -> None:
    """Catches a room that imports the trainer or the launcher's supervisor, and all they import."""
    found = [
        f"{name_of(path)}:{line}: {module}"
        for path in PACKAGE
        for line, module in imports_of(path)
        for program in PROGRAMS
        if (module == program or module.startswith(f"{program}."))
        and part_of(path) not in (program.split(".")[1], "planner", "calibrate", "replay", "api")
    ]
    assert found == []


def test_nothing_imports_the_command_line() -> None:
    """Catches a tool that imports the command line, whose names would then have to stay."""
    found = [
        name_of(path)
        for path in SOURCE
        for _, module in imports_of(path)
        if module == "k2train.train.__main__"
    ]
    assert found == []


def test_the_planner_needs_the_standard_library_only() -> None:
    """Catches a planner that no longer runs on a login node."""
    found = [
        f"{name_of(path)}:{line}: {module}"
        for path in sorted((ROOT / "k2train/plan").glob("*.py"))
        for line, module in imports_of(path)
        if module.split(".")[0] not in {*sys.stdlib_module_names, "k2train"}
    ]
    assert found == []


def test_what_answers_before_the_devices_never_names_torch() -> None:
    """Catches a config mistake that costs the seconds of `import torch`, on every rank."""
    found = [
        f"{name_of(path)}:{line}: {module}"
        for path in TORCH_FREE
        if path.relative_to(ROOT / "k2train").as_posix() not in TORCH_ALLOWED
        for line, module in imports_of(path)
        if module.split(".")[0] == "torch"
    ]
    assert found == []


TORCH_LESS = [
    ROOT / "k2train/__main__.py",
    ROOT / "k2train/train/__main__.py",
    *(
        tool
        for tool in TOOLS
        if tool.name
        not in ("bench_data.py", "bench_checkpoint.py", "bench_watch.py", "convert_hf.py")
    ),
]
"""Commands that start without torch, and the modules of their own."""
IMPORTS = """
import json, os, runpy, sys, traceback
from pathlib import Path

def loads(path):
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="imported")
    except BaseException:
        return traceback.format_exc()
    return "it loads torch" if "torch" in sys.modules else ""

def in_a_child(path):
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(write_end, loads(path)[-4000:].encode() or b"ok")
        os._exit(0)
    os.close(write_end)
    answer = os.read(read_end, 4096).decode()
    os.close(read_end)
    os.waitpid(pid, 0)
    return answer

import k2train.config.load, k2train.record.events
assert "torch" not in sys.modules, "the config or the events of the ledger load it"
print(json.dumps({path: in_a_child(path) for path in json.loads(sys.argv[1])}))
"""
"""Runs each path in a child of one interpreter, which has what nearly all of them import."""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """For each of `TORCH_LESS`: "ok", or why not."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps([*map(str, TORCH_LESS)])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", TORCH_LESS, ids=name_of)
def test_the_command_line_and_the_tools_load_no_torch(path: Path, answers: dict[str, str]) -> None:
    """Catches torch that comes in through another package, which no single file shows."""
    assert answers[str(path)] == "ok"


PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
OBJECTS = re.compile(r"\w+_object(_list)?s?")
"""torch.distributed's collectives of objects, by any name they are called."""


def unpickled_in(tree: ast.AST) -> list[str]:
    """Collectives of objects and modules of pickles that a source names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and OBJECTS.fullmatch(node.attr):
            found.append(f"{node.lineno}: {node.attr}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            if module.startswith("torch.distributed"):
                found += [f"{node.lineno}: {name}" for name in names if OBJECTS.fullmatch(name)]
            roots = {name.split(".")[0] for name in (module, *names)}
            found += [f"{node.lineno}: {name}" for name in sorted(roots & PICKLES)]
    return found


def test_nothing_that_comes_over_the_network_is_unpickled() -> None:
    """Catches an exchange of objects between ranks: a pickle from a socket is a program."""
    found = [f"{name_of(path)}:{line}" for path in PACKAGE for line in unpickled_in(tree_of(path))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    (
        "dist.all_gather_object(parts, mine)",
        "dist.broadcast_object_list([1], src=0)",
        "from torch.distributed import gather_object as gather",
        "import torch.distributed as d\nsend = d.send_object_list",
        "import pickle",
        "from _pickle import loads",
        "from multiprocessing import reduction\nimport dill.session",
    ),
)
def test_each_way_to_unpickle_is_seen(source: str) -> None:
    """Catches a rule that sees nothing."""
    assert unpickled_in(ast.parse(source))


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_no_import_inside_a_function() -> None:
    """Catches a layering mistake that shows only when the function runs."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCE
        if not INNER_IMPORTS.fullmatch(name_of(path))
        for function in functions_of(path)
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert found == []


DEFERRED = {"import_module", "__import__"}
"""The last names of what is looked for: to write every call as text would take seconds."""


def test_the_deferred_import_is_one() -> None:
    """Catches `importlib` as the way around the rules.

    The command line defers the trainer, and nothing else is deferred.
    """
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in PACKAGE
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in DEFERRED
        and ast.unparse(node.func) in ("importlib.import_module", "__import__")
    ]
    assert len(found) == 1, found
    assert found[0].startswith("k2train/train/__main__.py:"), found


def test_no_global_statement() -> None:
    """Catches a grid, a config or a counter that is looked up instead of passed."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCE
        for node in nodes_of(path)
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_the_environment_is_read_in_one_place() -> None:
    """Catches behaviour that depends on a variable no config and no ledger shows."""
    found = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCE
        if not ENVIRONMENT.fullmatch(name_of(path))
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv", "putenv")
        and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
    ]
    assert found == []


def test_only_command_lines_print() -> None:
    """Catches a line printed once a rank."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCE
        if not PRINTS.fullmatch(name_of(path))
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert found == []


def too_large(path: Path) -> Iterator[str]:
    for node in nodes_of(path):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        where = f"{name_of(path)}:{node.lineno}"
        lines = int(node.end_lineno or 0) - node.lineno + 1
        most = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        if lines > most:
            yield f"{where}: {node.name} has {lines} lines, at most {most}"
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
            if count > PARAMETERS:
                yield f"{where}: the constructor has {count} parameters, at most {PARAMETERS}"


def test_functions_and_classes_are_small() -> None:
    """Catches a function, class or constructor that grows by one more case at a time."""
    every = [*PACKAGE, *sorted((ROOT / "tools").rglob("*.py"))]
    assert [line for path in every for line in too_large(path)] == []


def test_every_module_says_what_it_is() -> None:
    """Catches a module without a docstring, and an `__init__` that does something."""
    assert [name_of(path) for path in SOURCE if not ast.get_docstring(tree_of(path))] == []
    empty = [path for path in PACKAGE if path.name == "__init__.py"]
    more = [(name_of(path), *map(ast.unparse, tree_of(path).body[1:])) for path in empty]
    version = ("k2train/__init__.py", f"__version__ = {k2train.__version__!r}")
    assert [one for one in more if len(one) > 1] == [version]


def test_every_assert_says_what_broke() -> None:
    """Catches an AssertionError with nothing to go by, at step 200,000."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCE
        for node in nodes_of(path)
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    assert found == []


def text_files() -> list[Path]:
    folders = ("k2train", "tools", "tests", "scripts", "configs", "constraints", "docs", ".ci")
    found = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.parent.name != "__pycache__" and path.is_file()
    ]
    found += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml")]
    return sorted(path for path in found if path.suffix not in (".png", ".safetensors"))


def test_nothing_is_left_for_later_and_no_machine_is_named() -> None:
    """Catches notes to oneself, and paths that exist on one machine only."""
    later = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
    machine = re.compile(r"(?<![\w.])/(home|Users|root|work|mnt|data)/\w")
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if later.search(line) or machine.search(line)
    ]
    assert found == []


def config_keys() -> list[str]:
    keys = []
    for section, kind in sections().items():
        keys += [section] if kind is None else [f"{section}.{name}" for name in kind.model_fields]
    return keys


@cache
def attributes_read() -> frozenset[str]:
    """The last one and two names of every attribute access outside the config's own modules.

    A section taken into a short name first (`m = config.model`; `m.num_layers`) is followed
    within its function.
    """
    found = set()
    for path in PACKAGE:
        if part_of(path) == "config":
            continue
        for scope in functions_of(path):
            short = {}
            for node in ast.walk(scope):
                if isinstance(node, ast.Assign) and len(node.targets) == 1:
                    pairs = [(node.targets[0], node.value)]
                    if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                        # A starred one takes several, or none.
                        pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
                    for target, value in pairs:
                        if isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
                            short[target.id] = value.attr
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute):
                    owner = node.value
                    before = owner.attr if isinstance(owner, ast.Attribute) else None
                    if isinstance(owner, ast.Name):
                        before = short.get(owner.id)
                    found |= {f"{before}.{node.attr}"} if before else {node.attr}
                    found.add(f".{node.attr}")
    return frozenset(found)


@pytest.mark.parametrize("key", config_keys())
def test_every_config_key_is_read(key: str) -> None:
    """Catches a knob that does nothing."""
    wanted = key if "." in key else f".{key}"
    assert wanted in attributes_read(), f"no module reads config.{key}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=name_of)
def test_every_shipped_yaml_loads(path: Path) -> None:
    """Catches a key renamed in the code and not in the files."""
    if path.parent.name == "tasks":
        # `tests/evaluation/test_selection.py` has what is in them.
        assert {"task", "tasks"} & read_yaml(path).keys()
        return
    if path.parent.name == "clusters":
        load_cluster(str(path))
        return
    load = load_recipe if path.name.startswith("data_") else load_config
    load(str(path), [])
