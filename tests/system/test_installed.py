"""k2train as `pip install` leaves it: in a fresh environment, far from the checkout.

- Nothing is downloaded. The environment sees the packages of the one that runs the tests, but not
  its k2train: the folder is on the path, its own path files are not read.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import k2train
from k2train.commands import COMMANDS
from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("k2train", "tools", "configs", "scripts")
PARTS = (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE")
RECIPE = """\
name: mine
output: data/mine
seed: 1
sequence_length: 16
chunks: 2
tokenizer: {model: data/t.model, train: {vocab_size: 290}}
executor: {workers: 1}
subsets: {notes: {kind: text, paths: ["text/*.txt"]}}
"""
MODEL = """\
run: {name: mine, seed: 1}
model: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_heads: 2, vocab_size: 308}
data: {manifest: data/mine/manifest.json, sequence_length: 16}
batch: {global_sequences: 4, micro_sequences: 2}
lr: {kind: constant, peak: 1.0e-3}
precision: fp32
"""
ONE_OF_MANY = re.compile(
    r"(?<![\w.,:=/-])1 (tasks|files|documents|chunks|rows|steps|ranks|processes|checkpoints|"
    r"samples|tokens|events|parts|tensors|layers|devices|pieces|batches|targets|attempts|texts|subsets)\b"
)
"""A count of one with the word for several, in the output of any command here."""
EVERY_HELP = """\
import contextlib, io, sys
from k2train.__main__ import main
from k2train.commands import COMMANDS, tools_folder
assert tools_folder().name == "k2train_tools", tools_folder()
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main([name, "--help"])
        except SystemExit as end:
            assert not end.code, (name, end.code)
    assert shown.getvalue().startswith(f"usage: k2train {name}"), shown.getvalue()[:200]
    print(name)
"""


class Installed:
    """An environment with k2train in it, and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        source, self.home = folder / "source", folder / "home"
        self.home.mkdir()
        source.mkdir()
        for name in PARTS:
            path = ROOT / name
            copy = shutil.copy if path.is_file() else shutil.copytree
            copy(path, source / name)
        for cache in source.rglob("__pycache__"):
            shutil.rmtree(cache)

        venv = folder / "venv"
        self.bin = venv / "bin"
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
        } | {"OMP_NUM_THREADS": "1"}
        assert self.run(sys.executable, "-m", "venv", "--without-pip", venv).returncode == 0
        site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

        options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
        done = self.run(
            self.bin / "python", "-m", "pip", "install", "--quiet", *options, str(source)
        )
        assert done.returncode == 0, done.stderr
        # Whatever is found from here on is not the source.
        shutil.rmtree(source)

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )

    def k2train(self, *arguments: str, code: int = 0) -> str:
        """Output of the command, which must end with `code`."""
        done = self.run(self.bin / "k2train", *arguments)
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        shown = done.stdout + done.stderr
        assert not ONE_OF_MANY.search(shown), ONE_OF_MANY.search(shown)
        return shown


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_every_command_starts(installed: Installed) -> None:
    """Catches a file that the wheel leaves out, and a command that names itself as a script."""
    done = installed.run(installed.bin / "python", "-c", EVERY_HELP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(COMMANDS)
    assert installed.k2train("--version") == f"k2train {k2train.__version__}\n"
    module = installed.run(installed.bin / "python", "-m", "k2train", "--version")
    assert module.stdout == f"k2train {k2train.__version__}\n"


@pytest.mark.slow
def test_from_an_empty_folder_to_a_first_step(installed: Installed) -> None:
    """Catches a command that works in a checkout only, and a message that names one."""
    home = installed.home
    shown = installed.k2train("init", ".")
    assert "configs/presets/llama_8b.yaml" in shown and "k2train prepare-data" in shown
    assert (home / "scripts" / "pretrain.sbatch").is_file()
    assert "is there already" in installed.k2train("init", ".", code=2)
    assert "training works here; k2train init" in installed.k2train("doctor")
    planned = installed.k2train("plan", "configs/presets/llama_8b.yaml", "--world", "64")
    assert "8,030,261,248 parameters" in planned

    (home / "text").mkdir()
    for number in range(8):
        text = f"the value of {number} is ä\n" * 40
        (home / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    (home / "data.yaml").write_text(RECIPE, encoding="utf-8")
    (home / "model.yaml").write_text(MODEL, encoding="utf-8")
    missing = installed.k2train("train", "model.yaml", code=2)
    assert missing.endswith("; k2train prepare-data makes it\n") and missing.count("\n") == 1
    assert "k2train inspect data/mine shows" in installed.k2train("prepare-data", "data.yaml")

    first = installed.k2train("train", "model.yaml", "run.stop_after_steps=1", code=75)
    assert "at step 1" in first and "tools/" not in first
    second = installed.k2train(
        *("launch", "--nproc-per-node", "1", "train", "model.yaml", "run.stop_after_steps=1"),
        code=75,
    )
    assert "at step 2" in second and "tools/" not in second
    assert "2 starts" in installed.k2train("show", "runs/mine")
    installed.k2train("verify", "runs/mine")
    assert [path.name for path in home.glob("*")].count("tools") == 0


def test_every_package_of_an_extra_is_imported() -> None:
    """Catches an extra that installs what no file uses, as one for GPUs once did."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("k2train", "tools")
        for path in (ROOT / folder).rglob("*.py")
    )
    extras = {
        name: lines
        for name, lines in project["optional-dependencies"].items()
        if name not in ("dev", "all")
    }
    assert {"data", "tracking", "eval", "trace"} <= set(extras)
    for extra, lines in extras.items():
        for line in lines:
            (package,) = re.findall(r"^[\w-]+", line)
            imported = {
                "nvidia-ml-py": "pynvml",
                "pyopenssl": "OpenSSL",
                "cyclonedx-python-lib": "cyclonedx",
            }
            name = imported.get(package, package)
            used = rf"(\b(import|from) |[\"'.]){name.replace('-', '_')}\b"
            assert re.search(used, text), f"[{extra}] {name}"
