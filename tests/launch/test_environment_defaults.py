"""Environment variables that must be set before torch starts."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.errors import ConfigError
from k2train.launch import __main__ as launcher
from k2train.launch.environment_defaults import (
    DEFAULTS,
    DETERMINISTIC_DEFAULTS,
    OFFLINE,
    QUIET,
    environment_settings,
    require_deterministic_environment,
    set_environment_defaults,
    set_harness_environment,
)
from k2train.train import __main__ as command_line
from tests.support.forkserver import PATIENCE_SECONDS
from tests.support.tiny_corpus import config_tree, make_corpus, write_yaml

ALLOCATOR, QUEUES, RECORDER = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "TORCH_FR_BUFFER_SIZE",
)


@pytest.fixture(autouse=True)
def none_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without any of the variables, and leave none behind."""
    for default in (*DEFAULTS, *DETERMINISTIC_DEFAULTS):
        for name in (default.name, *default.other_names):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


def test_what_is_missing_is_set() -> None:
    """Catches a default that never reaches the process."""
    set_environment_defaults()
    assert os.environ[ALLOCATOR] == "expandable_segments:True"
    assert os.environ[QUEUES] == "1" and int(os.environ[RECORDER]) > 0
    assert not any(setting.own for setting in environment_settings())


def test_a_world_of_one_keeps_all_queues() -> None:
    """Catches an order of kernels that only transfers need, forced on a single process."""
    set_environment_defaults(world_size=1)
    assert QUEUES not in os.environ and ALLOCATOR in os.environ
    set_environment_defaults(world_size=2)
    assert os.environ[QUEUES] == "1"


@pytest.mark.parametrize(
    ("name", "default"),
    [(name, one.name) for one in DEFAULTS for name in (one.name, *one.other_names)],
)
def test_a_value_of_the_user_stays_and_is_told(
    monkeypatch: pytest.MonkeyPatch, name: str, default: str
) -> None:
    """Catches a user's setting that is overwritten, or hidden by ours under torch's other name."""
    monkeypatch.setenv(name, "7")
    set_environment_defaults()
    assert os.environ[name] == "7" and (name == default or default not in os.environ)
    assert f"{name}=7 (your value)" in map(str, environment_settings())


def test_an_empty_value_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `VARIABLE= command`, by which a user takes a default away, read as not set."""
    monkeypatch.setenv(ALLOCATOR, "")
    set_environment_defaults()
    assert os.environ[ALLOCATOR] == ""


def test_training_sets_them_before_it_loads_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches defaults that come after torch, which has read its variables by then."""
    make_corpus(tmp_path / "data", 2)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    seen: list[str] = []

    def load(name: str) -> Any:
        seen.append(f"{name} with {os.environ.get(ALLOCATOR)}")
        return SimpleNamespace(train=lambda *_: 0)

    monkeypatch.setattr(command_line.importlib, "import_module", load)
    assert command_line.main([str(write_yaml(tmp_path / "c.yaml", tree))]) == 0
    assert seen == ["k2train.train.run with expandable_segments:True"]


def test_the_launcher_hands_them_to_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes of other programs that the launcher starts without them."""
    seen: list[str] = []

    def start(*_: Any) -> int:
        seen.extend(setting.name for setting in environment_settings())
        return 0

    monkeypatch.setattr(launcher, "start_with_restarts", start)
    monkeypatch.setattr(launcher.logging, "disable", lambda level: None)
    assert launcher.main(["--nproc-per-node", "2", "-m", "json.tool"]) == 0
    assert seen == [default.name for default in DEFAULTS]


ORDER = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}
"""What keeps the order of sums."""


def in_force() -> dict[str, str]:
    return {name: os.environ[name] for name in ORDER if name in os.environ}


def test_deterministic_kernels_set_more() -> None:
    """Catches a library that adds in any order, and one slowed down where nobody asked for it."""
    set_environment_defaults()
    assert in_force() == {}
    set_environment_defaults(world_size=1, deterministic=True)
    assert in_force() == {name: ORDER[name] for name in ORDER if name != "NCCL_ALGO"}
    set_environment_defaults(world_size=2, deterministic=True)
    assert in_force() == ORDER
    assert not any(setting.own for setting in environment_settings())


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    (
        ("CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8"), ("", ":4096:2", ":0:0", ":4096:8:16:8")),
        (
            "NCCL_ALGO",
            ("Ring", "ring,CollnetDirect", "CollnetChain", "^Tree,NVLS,NVLSTree,PAT"),
            (
                *("", "Tree", "Ring,Tree", "NVLS", "^Tree", "^NVLS", "^NVLS,Tree", "^"),
                *("allreduce:ring;broadcast:tree", "^Tree,NVLS,NVLSTree,PAT;allreduce:NVLS"),
                "^Tree,NVLS,NVLSTree,PAT,Ring,CollnetDirect,CollnetChain",
            ),
        ),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", ("0",), ("", "1")),
        ("TORCHINDUCTOR_DETERMINISTIC", ("1",), ("", "0", "true")),
    ),
)
def test_values_without_an_order_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, accepted: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    """Catches a promise of equal bits over a library that was told otherwise, by one line."""
    for value in accepted:
        monkeypatch.setenv(name, value)
        require_deterministic_environment(world_size=2)
        assert in_force() == ORDER | {name: value}
    for value in refused:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError) as caught:
            require_deterministic_environment(world_size=2)
        text = str(caught.value)
        assert text.startswith(f"{name} ({value!r}) ") and "\n" not in text
        assert "unset it, or set kernels.deterministic: false" in text


WATCHER = """
import os, sys

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            with open(os.environ["SEEN"], "a") as file:
                file.write(os.environ.get("CUBLAS_WORKSPACE_CONFIG", "none") + "\\n")
            os._exit(0)

sys.meta_path.insert(0, Watcher())
"""
"""Notes the variable when a process first loads torch, and ends it there."""


def cold_start(tmp_path: Path, *overrides: str, **variables: str) -> list[str]:
    """The variable at the first import of torch in a new process of the training command."""
    make_corpus(tmp_path / "data", 2)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    config = write_yaml(tmp_path / "c.yaml", tree)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCHER)
    seen = tmp_path / "seen"
    environment = {key: value for key, value in os.environ.items() if key not in ORDER}
    environment |= {"SEEN": str(seen), **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    command = [sys.executable, "-m", "k2train.train", str(config), *overrides]
    subprocess.run(command, env=environment, check=True, timeout=PATIENCE_SECONDS)
    return seen.read_text().split()


RANKS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29999",
}
"""What torchrun, the launcher and a script under srun hand on."""


@pytest.mark.parametrize(
    ("overrides", "variables", "expected"),
    (
        ((), {}, ":4096:8"),
        ((), {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8"),
        (("kernels.deterministic=false",), {}, "none"),
        ((), RANKS, ":4096:8"),
    ),
    ids=("alone", "of the user", "not asked for", "launched"),
)
def test_a_cold_process_has_them_before_torch(
    tmp_path: Path, overrides: tuple[str, ...], variables: dict[str, str], expected: str
) -> None:
    """Catches a variable set when torch and cuBLAS have read it already."""
    assert cold_start(tmp_path, *overrides, **variables) == [expected]


def test_the_harness_stays_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a variable of the user that lets lm-eval's libraries try the network."""
    for name in (*OFFLINE, *QUIET):
        monkeypatch.setenv(name, "0")
    set_harness_environment(offline=False)
    assert {os.environ[name] for name in OFFLINE} == {"0"} and os.environ["TQDM_DISABLE"] == "1"
    set_harness_environment(offline=True)
    assert {os.environ[name] for name in OFFLINE} == {"1"} and "HF_HUB_OFFLINE" in OFFLINE
