"""The README against the project: the file tree, every command in it, and the quickstart itself, made small.

A stranger has nothing but the README, so what it says is tested like code: the tree must be the tree, and each line of
each ```bash block is run here, in a clone, after a quickstart whose stages are one chunk long.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from k2train.config.schema import sections
from k2train.data.prepare.recipe import ExecutorRecipe, Recipe, SubsetRecipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["data.order=[0]", "model.num_layers=2", "data.held_out_batches=1"]

FAST = {
    "python -m k2train.train configs/demo/stage1.yaml lr.peak=1e-3 --explain": "lr.peak",
    "python tools/plan.py configs/demo/stage1.yaml --world 4 parallel.pipeline=4": "world 4 = pipeline 4",
    "python tools/plan.py configs/k2_65b/stage1.yaml --world 480": "65,286,184,960 parameters",
    "python tools/fault_run.py --list": "save.renamed",
    "python tools/bench_checkpoint.py --megabytes 50": "save",
    "python tools/bench_watch.py --steps 5": "no monitoring",
    "python tools/prepare_data.py configs/k2_65b/data_stage1.yaml --estimate": "k2-65b-stage1: 1,295.7B tokens to encode",
}
"""Commands that need no data: run here as they stand, with a word of what they print."""

ON_THE_ROAD = [
    ("python tools/show_run.py runs/demo-stage1 runs/demo-stage2", 0, "demo-stage2: finished"),
    ("python tools/verify_checkpoint.py runs/demo-stage2", 0, "ckpt_001"),
    ("python tools/verify_checkpoint.py --root runs/demo-stage2", 0, ", root "),
    ("python tools/verify_run.py runs/demo-stage1", 0, "demo-stage1"),
    (
        "python -m k2train.train configs/demo/stage1.yaml run.name=alone run.stop_after_steps=5",
        75,
        "stopped on request (run.stop_after_steps) at step 5",
    ),
    (
        "python -m k2train.launch --nproc-per-node 4 -m k2train.train configs/demo/stage1.yaml run.name=grid "
        "run.stop_after_steps=5 parallel.tensor=2",
        75,
        "stopped on request (run.stop_after_steps) at step 5",
    ),
    ("python tools/compare_runs.py runs/alone runs/grid", 1, ""),
    ("python tools/who_is_stuck.py runs/demo-stage1", 0, ""),
    (
        "python tools/prepare_data.py configs/demo/data_stage1.yaml",
        0,
        "already prepared, all hashes checked",
    ),
    ("python tools/inspect_data.py data/demo/stage1", 0, "samples in a chunk"),
    ("python tools/inspect_data.py data/demo/stage1 --chunk 0 --row 3", 0, "chunk_000 row 3"),
    ("python tools/inspect_data.py --run runs/demo-stage1 --step 5", 0, "chunk_000"),
    ("python tools/inspect_data.py data/demo/stage1 --document topics/lambda", 0, "lambda"),
    ("python tools/verify_data.py data/demo/stage1", 0, "ok: 9 chunks, one held out"),
]
"""(command, exit code, a word of what it prints), in the README's order, after the quickstart."""

TWO_NODES = (
    'python -m k2train.launch --nnodes 60 --nproc-per-node 8 --rdzv-id k2 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" '
    "-m k2train.train configs/k2_65b/stage1.yaml"
)
ELSEWHERE = {
    "bash scripts/quickstart.sh": "the fixture `road`, and test_scripts",
    "bash scripts/test.sh": "test_scripts; it is what runs this file",
    TWO_NODES: "test_two_nodes_meet, with two nodes",
    "sbatch --nodes=60 --gpus-per-node=8 scripts/pretrain.sbatch configs/k2_65b/stage1.yaml": "test_slurm_train, on two nodes",
    "python tools/bench.py cpu --quick": "test_bench, at tiny sizes",
    "python tools/bench.py cpu --json base.json": "test_bench, at tiny sizes",
    "python tools/bench.py cpu --quick --against base.json": "test_bench, at tiny sizes",
    "python tools/bench_schedules.py --svg pictures": "test_bench_schedules, at tiny sizes",
    "python tools/bench_profile.py": "test_bench_profile, at tiny sizes",
    "python tools/bench.py gpu": "test_bench_gpu, as a dry run",
}


def commands() -> list[str]:
    """Every command line of the README's bash blocks, without its comment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [
        re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines()
    ]
    return [line for line in lines if line]


def tree() -> set[str]:
    """The files of the README's tree, from its indentation."""
    block = README.split("## Where everything is")[1].split("```text\n")[1].split("```")[0]
    found, folders = set(), []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, gloss = line.strip().partition(" ")
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert gloss.strip(), f"{name} has no gloss in the README's tree"
            found.add("".join(folders) + name)
    return found


def test_the_tree_is_the_tree() -> None:
    """Catches a file that nobody explained, and one explained that is gone."""
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("k2train", "tools", "scripts", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "__init__.py"
    }
    assert tree() - there == set(), "in the README, not on the disk"
    assert there - tree() == set(), "on the disk, not in the README"


def test_every_command_is_run_by_a_test() -> None:
    """Catches a command that was added or changed in the README and never tried."""
    tried = {*FAST, *(command for command, _, _ in ON_THE_ROAD), *ELSEWHERE}
    assert set(commands()) == tried


def test_every_section_of_the_config_is_named() -> None:
    """Catches a section of the config that the table forgot."""
    table = README.split("| section | what it decides |")[1].split("\n\n")[0]
    assert set(
        re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:]))
    ) == set(sections())


def test_every_key_of_a_recipe_is_named() -> None:
    """Catches a key that nobody can find, and an example that does not load."""
    example = re.search(r"^```yaml\n(name: mine\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert example is not None
    recipe = Recipe.model_validate(yaml.safe_load(example[1]))
    for section, head in (
        (SubsetRecipe, "| key of a subset | |"),
        (Recipe, "| key of a recipe | |"),
    ):
        table = README.split(head)[1].split("\n\n")[0]
        named = set(re.findall(r"`(\w+)`", table)) | (
            set(yaml.safe_load(example[1])) if section is Recipe else set()
        )
        assert set(section.model_fields) <= named
    assert set(ExecutorRecipe.model_fields) <= named
    assert recipe.chunks == 8


def test_every_link_to_a_file_leads_somewhere() -> None:
    """Catches a renamed file."""
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_contributing_lists_the_mutations() -> None:
    """Catches a table that fell behind the tool it was copied from."""
    listed = shell("python tools/mutation_check.py --list", ROOT)
    assert listed.returncode == 0, listed.stderr
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [line for line in listed.stdout.splitlines() if line not in text]
    assert missing == [], "paste the output of tools/mutation_check.py --list into CONTRIBUTING.md"
    assert text.count("::test_") == listed.stdout.count("::test_"), (
        "CONTRIBUTING.md lists a fault that is gone"
    )


def shell(
    command: str, folder: Path, seconds: float = 120, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command of the README as a user would, with this interpreter as the activated one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


@pytest.mark.parametrize("command", FAST)
def test_fast_commands(command: str) -> None:
    """Catches a command of the README that fails."""
    done = shell(command, ROOT)
    assert done.returncode == 0, done.stderr
    assert FAST[command] in done.stdout


STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
"-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"; exit 0 ;;
"-m pip") exit 0 ;;
esac
exec "$REAL_PYTHON" "$@"
"""
"""Makes a `.venv` that is the one of these tests: nothing is installed, everything else is real."""


class Road:
    """A clone, and how to run the quickstart in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        for name in ("k2train", "tools", "scripts", "configs", "constraints"):
            shutil.copytree(
                ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", self.root)
        stand_in = folder / "python"
        stand_in.write_text(STAND_IN, encoding="utf-8")
        stand_in.chmod(0o755)
        self.variables = {"PYTHON": str(stand_in), "REAL_PYTHON": sys.executable}

    def quickstart(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        told = " ".join(f"'{argument}'" for argument in [*SMALL, *arguments])
        return shell(f"bash scripts/quickstart.sh {told}", self.root, 400, **self.variables)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """Stopped after two steps, started again and finished: what the other tests of this file look at."""
    made = Road(tmp_path_factory.mktemp("road"))
    stopped = made.quickstart("run.stop_after_steps=2")
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    assert stopped.stderr.splitlines()[-1].startswith('quickstart: stopped in "train stage 1"')
    assert "Traceback" not in stopped.stderr
    done = made.quickstart()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "at step 2 (attempt 2)" in done.stderr
    assert "demo-stage2: finished" in done.stdout
    yield made


@pytest.mark.slow
def test_quickstart_again_shows_the_table(road: Road) -> None:
    """Catches a second start that trains again, or that calls a finished stage a mistake."""
    before = {path: path.stat().st_mtime_ns for path in (road.root / "runs").rglob("*.safetensors")}
    again = road.quickstart()
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("this stage is finished, nothing to do") == 2
    assert "demo-stage1: finished" in again.stdout
    assert {
        path: path.stat().st_mtime_ns for path in (road.root / "runs").rglob("*.safetensors")
    } == before
    assert again.stderr == ""


@pytest.mark.slow
def test_quickstart_tells_a_mistake_once(road: Road) -> None:
    """Catches a line for each of the four processes, torchrun's traceback, and exit code 1 for a user's mistake."""
    refused = road.quickstart("model.num_head=4")
    assert refused.returncode == 2
    lines = refused.stderr.splitlines()
    assert len(lines) == 2, refused.stderr
    assert "num_heads" in lines[0]
    assert lines[1] == 'quickstart: "train stage 1" failed (exit code 2); its message is above'


@pytest.mark.slow
def test_commands_on_the_road(road: Road) -> None:
    """Catches a command of the README that fails after the quickstart, in the order a reader tries them."""
    for command, code, told in ON_THE_ROAD:
        done = shell(command, road.root, 300)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stderr[-2000:]}"
        assert told in done.stdout + done.stderr, command


@pytest.mark.slow
def test_two_nodes_meet(road: Road) -> None:
    """Catches a cluster command with which the nodes do not find each other, or each train alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = TWO_NODES.replace("--nnodes 60 --nproc-per-node 8", "--nnodes 2 --nproc-per-node 2")
    command = command.replace("configs/k2_65b/stage1.yaml", "configs/demo/stage1.yaml").replace(
        ":29500", f":{port}"
    )
    overrides = " ".join(
        f"'{part}'" for part in [*SMALL, "run.name=nodes", "run.stop_after_steps=1"]
    )
    one = f"{command} {overrides} parallel.tensor=2 parallel.pipeline=2"
    shell(f"{one} & {one} & wait", road.root, 200, HEAD="127.0.0.1")
    ledger = (road.root / "runs/nodes/ledger.jsonl").read_text(encoding="utf-8")
    assert '"world_size":4' in ledger.replace(" ", "")
    assert "run.stop_after_steps" in ledger
