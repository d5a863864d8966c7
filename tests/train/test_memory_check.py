"""A model that does not fit: refused before it is built, with the ranks of a machine summed up."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k2train.config.load import Config
from k2train.errors import RunError, UnavailableError
from k2train.launch.environment import Launch, ranks_of_machine
from k2train.train.machine import FreeMemory
from k2train.train.memory_check import check_memory
from k2train.train.setup import Setup
from tests.support.tiny_corpus import ROOT, config_tree, environment, make_corpus, write_yaml

WORLD = 4


def setup_of(*allow: str) -> Setup:
    tree: dict[str, Any] = config_tree(Path("m.json"), Path("runs"), "a", run__allow=list(allow))
    tree["batch"]["micro_sequences"] = 3
    return Setup.of(Config.model_validate(tree), WORLD)


def planned(setup: Setup) -> int:
    return setup.memory(setup.work("cpu"), 0).total_bytes


def test_all_ranks_of_a_machine_share_its_memory() -> None:
    """Catches a check of one rank alone: four of them fill the machine."""
    setup = setup_of()
    one = planned(setup)
    # Each two of them also share 4 MiB.
    needed = 4 * one + 6 * 4 * 2**20
    check_memory(setup, range(WORLD), "cpu", [FreeMemory(needed, needed, "here", True)])
    check_memory(setup, [0], "cpu", [FreeMemory(one, one, "here", True)])
    check_memory(setup, range(WORLD), "cpu", [FreeMemory(one, one, "here", False)])
    with pytest.raises(RunError, match=r"4 processes of a machine need at least .* are here; of"):
        check_memory(setup, range(WORLD), "cpu", [FreeMemory(needed - 1, needed - 1, "here", True)])
    with pytest.raises(RunError, match="a process needs at least"):
        check_memory(setup, range(WORLD), "cpu", [FreeMemory(one - 1, one - 1, "here", False)])


def test_what_others_use_now_is_no_mistake() -> None:
    """Catches exit code 2 for a start whose predecessor is not gone yet: nothing starts again."""
    setup = setup_of()
    one = planned(setup)
    with pytest.raises(UnavailableError, match="a process needs at least"):
        check_memory(setup, [0], "cpu", [FreeMemory(one - 1, one, "here", True)])


def test_what_never_fits_is_told_before_what_others_use() -> None:
    one = planned(setup_of())
    limits = [FreeMemory(0, 9 * one, "here", True), FreeMemory(one - 1, one - 1, "there", True)]
    with pytest.raises(RunError, match="are there; of"):
        check_memory(setup_of(), [0], "cpu", limits)


def test_an_open_precision_is_refused_when_neither_fits() -> None:
    """By hand: one process keeps 18 bytes a parameter in bf16 and 16 in fp32."""
    setups = {
        precision: Setup.of(
            Config.model_validate(
                config_tree(Path("m.json"), Path("runs"), "a", precision=precision)
            ),
            1,
        )
        for precision in ("bf16", "fp32", "auto")
    }
    sizes = {name: planned(setup) for name, setup in setups.items() if name != "auto"}
    least = min(sizes.values())
    assert least < max(sizes.values()), "they must differ, or this shows nothing"
    check_memory(setups["auto"], [0], "cpu", [FreeMemory(least, least, "here", True)])
    with pytest.raises(RunError, match="a process needs at least"):
        check_memory(setups["auto"], [0], "cpu", [FreeMemory(least - 1, least - 1, "here", True)])


def test_a_person_may_go_on() -> None:
    check_memory(setup_of("memory"), range(WORLD), "cpu", [FreeMemory(1, 1, "here", True)])


@pytest.mark.parametrize(
    ("launch", "count", "expected"),
    (
        (Launch(0, 1, 0, False), None, [0]),
        (Launch(2, 4, 0, True), "2", [2, 3]),
        (Launch(3, 4, 1, True), "2", [2, 3]),
        (Launch(3, 4, 1, True), None, [3]),
        (Launch(3, 4, 1, True), "1", [3]),
    ),
)
def test_ranks_of_a_machine(
    launch: Launch, count: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if count is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
    assert list(ranks_of_machine(launch)) == expected


def test_a_real_start_is_refused_in_one_line(tmp_path: Path) -> None:
    """Catches a minute of building and forty lines of the allocator."""
    make_corpus(tmp_path / "data", 1)
    path = write_yaml(
        tmp_path / "c.yaml",
        config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "big"),
    )
    size = 16 * 2**30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    wide = ["model.hidden_size=8192", "model.ffn_hidden_size=65536", "run.allow=[space]"]
    done = subprocess.run(
        [sys.executable, "-m", "k2train.train", path, *wide],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        preexec_fn=limited,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "does not fit in memory" in line and "GiB" in line
    assert "run.allow=[memory]" in line and not os.path.exists(tmp_path / "runs")
