"""First contact: all groups exchange before the first step; a rank that does not is named."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.errors import EXIT_FAILED, UnavailableError
from k2train.launch.environment import Launch
from k2train.parallel import first_contact
from k2train.parallel.first_contact import make_contact, neighbours
from k2train.parallel.grid import ProcessGrid
from k2train.plan.layout import Layout
from k2train.train.setup import Setup
from k2train.watchdog.heartbeat import recording_path
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, start, write_yaml
from tests.support.tiny_model import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("schedule", "stages", "expected"),
    (
        ("1f1b", 1, [(0, 1), (1, 2), (2, 3)]),
        # The last rank hands on to the first.
        ("interleaved", 2, [(0, 1), (0, 3), (1, 2), (2, 3)]),
        ("zb-v", 2, [(0, 1), (1, 2), (2, 3)]),
    ),
)
def test_neighbours_are_those_of_the_schedule(
    schedule: str, stages: int, expected: list[tuple[int, int]]
) -> None:
    """Catches a pair whose communicator is made in the first step after all."""
    config = tiny_config(
        model__num_layers=8,
        parallel__pipeline=4,
        parallel__schedule=schedule,
        parallel__stages_per_rank=stages,
    )
    assert neighbours(Setup.of(config, 4).programs) == expected


def contact_job(launch: Launch, layout: Layout, pairs: list[tuple[int, int]]) -> Any:
    grid = ProcessGrid(layout, launch.rank, CPU)
    names: list[str] = []
    real = grid.comm.collective
    scope: Any = first_contact.collective_scope
    first_contact.collective_scope = lambda comm, name: names.append(name) or real(name)
    try:
        line = make_contact(grid, pairs)
    finally:
        first_contact.collective_scope = scope
    return line, names


def test_every_group_and_neighbour_is_met_once_in_one_order(pool: GlooPool) -> None:
    """Catches a group that is left for the first step, and an order in which two ranks would wait
    for each other.
    """
    layout = Layout(tensor=2, pipeline=4)
    pairs = [(0, 1), (0, 3), (1, 2), (2, 3)]
    for rank, (line, names) in enumerate(pool.run(8, contact_job, layout, pairs)):
        pp = layout.coordinate(rank).pp
        own = [f"first contact of pipeline ranks {a} and {b}" for a, b in pairs if pp in (a, b)]
        groups = [f"first contact of {name} ranks)" for name in ("tp (2", "stage (2", "pp (4")]
        assert names == [*groups, *(name for name in own for _ in range(2))]
        assert line.startswith("first contact of tp 2, stage 2, pp 4, 2 pipeline neighbours: ")


def test_a_rank_alone_meets_nobody(pool: GlooPool) -> None:
    """Catches an exchange with nobody, which would wait for ever."""
    ((line, names),) = pool.run(1, contact_job, Layout(), [])
    assert names == [] and "alone" in line


def test_a_wrong_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a link that answers with something else, and a run that trains over it."""
    grid: Any = SimpleNamespace(
        device=CPU,
        comm=None,
        dp=SimpleNamespace(size=1),
        stage=SimpleNamespace(size=1),
        pp=SimpleNamespace(size=1, rank=0),
        tp=SimpleNamespace(name="tp", size=2, group=None),
    )
    monkeypatch.setattr(dist, "all_reduce", lambda number, group: number.mul_(3))
    with pytest.raises(UnavailableError, match="group tp of 2 ranks gave 3 instead of 2"):
        make_contact(grid, [])


def test_a_rank_that_never_comes_is_named_before_the_first_step(tmp_path: Path) -> None:
    """Catches a hang in the first step, in which every rank waits for "the device", and a report
    without what torch recorded of the exchange.
    """
    make_corpus(tmp_path / "data", 2)
    tree = config_tree(
        tmp_path / "data" / "manifest.json",
        tmp_path / "runs",
        "run",
        parallel__tensor=2,
        run__allow=["faults"],
        watch__heartbeat_seconds=0.5,
        watch__start_seconds=12.0,
    )
    config = write_yaml(tmp_path / "c.yaml", tree)
    process = start(config, processes=2, K2TRAIN_FAULTS="start.connect@rank=1:sleep=600")
    output, error = process.communicate()
    text = f"{output}{error}"
    assert process.returncode == EXIT_FAILED, text
    (line,) = [one for one in text.splitlines() if "is stuck" in one]
    assert "rank 1 " in line and "making contact in each group" in line

    watch = next((tmp_path / "runs").glob("**/watch"))
    report = json.loads((watch / "verdict.json").read_text())
    assert report["suspects"] == [{"rank": 1, "kind": "stuck"}]
    (waiting,) = [position for rank, position, *_ in report["ranks"] if rank == 0]
    assert waiting[-1] == "first contact of tp (2 ranks)"
    recorded = json.loads(recording_path(watch, 0).read_text())["entries"]
    assert recorded[-1]["profiling_name"].startswith("gloo:") and not recorded[-1]["retired"]
    assert (watch / recording_path(watch, 0).name).match(report["recordings"])
