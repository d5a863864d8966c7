"""Control files STOP and SAVE: requests by file.

Would catch a request that is forgotten, met twice, or that stops the run when the disk does not
answer.
"""

import timeit
from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.guard.control_files import ControlFiles


def test_a_request_stands_until_it_is_met(tmp_path: Path) -> None:
    requests = ControlFiles(tmp_path)
    assert requests.poll() is None
    (tmp_path / "SAVE").touch()
    assert [requests.poll(), requests.poll()] == ["SAVE", "SAVE"]
    requests.done("SAVE")
    assert requests.poll() is None and list(tmp_path.iterdir()) == []


def test_stop_comes_before_save_and_meets_both(tmp_path: Path) -> None:
    """Catches a SAVE that is left behind by a stop, and done again by the next start."""
    requests = ControlFiles(tmp_path)
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").write_text("whatever somebody wrote into it")
    assert requests.poll() == "STOP"
    requests.done("STOP")
    assert requests.poll() is None and list(tmp_path.iterdir()) == []


def test_a_save_that_was_met_leaves_a_later_stop(tmp_path: Path) -> None:
    requests = ControlFiles(tmp_path)
    (tmp_path / "SAVE").touch()
    assert requests.poll() == "SAVE"
    (tmp_path / "STOP").touch()
    requests.done("SAVE")
    assert requests.poll() == "STOP"


def test_what_cannot_be_read_or_removed_does_not_stop_the_run(tmp_path: Path) -> None:
    """Catches a run that ends because a folder has that name, or a mount was away for a moment."""
    (tmp_path / "file").touch()
    away = ControlFiles(tmp_path / "file" / "run")
    assert away.poll() is None
    away.done("STOP")
    (tmp_path / "STOP").mkdir()
    requests = ControlFiles(tmp_path)
    assert requests.poll() == "STOP"
    requests.done("STOP")
    requests.done("STOP")
    ControlFiles(tmp_path / "not there").done("SAVE")


def test_a_stop_that_stands_before_the_start(tmp_path: Path) -> None:
    requests = ControlFiles(tmp_path)
    requests.refuse_start()
    (tmp_path / "SAVE").touch()
    requests.refuse_start()
    (tmp_path / "STOP").touch()
    with pytest.raises(
        RunError, match=r"/STOP asks this run not to start; remove the file, then start again$"
    ):
        requests.refuse_start()
    assert (tmp_path / "STOP").exists()


def test_a_poll_costs_nothing_beside_a_step(tmp_path: Path) -> None:
    """Catches a poll that lists the directory or reads something: two stats take 4 us."""
    for number in range(1000):
        (tmp_path / f"other_{number}").touch()
    requests = ControlFiles(tmp_path)
    assert min(timeit.repeat(requests.poll, number=100, repeat=5)) / 100 < 1e-3
