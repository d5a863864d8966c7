"""Flight recorder: what torch recorded of the last collectives, for the failure report."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.launch.environment import Launch
from k2train.parallel import flight_recorder
from k2train.parallel.flight_recorder import DUMPS, KEPT, flight_recording
from tests.support.gloo_pool import GlooPool


def record_job(launch: Launch) -> str:
    dist.all_reduce(torch.ones(17))
    content = flight_recording()
    return "" if content is None else content.decode()


def test_the_last_collectives_of_gloo_are_in_it(pool: GlooPool) -> None:
    """Catches a call that torch has renamed, and a recording that nobody can read as JSON."""
    for text in pool.run(2, record_job):
        entries = json.loads(text)["entries"]
        assert any(
            entry["profiling_name"] == "gloo:all_reduce" and entry["input_sizes"] == [[17]]
            for entry in entries
        )


def recorders(monkeypatch: pytest.MonkeyPatch, **dumps: Any) -> None:
    for name in DUMPS:
        monkeypatch.setattr(flight_recorder.recorders, name, dumps.get(name), raising=False)


def test_ncclss_recorder_comes_first_and_only_the_end_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a collective that hangs and is cut away because it is old, and files of every rank
    that hold thousands of operations.
    """
    entries = [{"record_id": n, "retired": n != 3} for n in range(1000)]
    nccl = json.dumps({"entries": entries, "pg_config": {"0": 1}}).encode()
    recorders(monkeypatch, _dump_nccl_trace_json=lambda: nccl, _dump_fr_trace_json=lambda: b"{}")
    found = json.loads(flight_recording() or b"")
    kept = [entry["record_id"] for entry in found["entries"]]
    assert kept == [3, *range(1000 - KEPT, 1000)] and found["pg_config"] == {"0": 1}


def broken() -> bytes:
    raise RuntimeError("no recorder")


@pytest.mark.parametrize("dump", (None, broken, lambda: b"not json", lambda: b"[1]", lambda: b"{}"))
def test_without_a_recorder_there_is_no_recording(
    monkeypatch: pytest.MonkeyPatch, dump: Any
) -> None:
    """Catches a diagnosis that ends with the error of a recorder."""
    recorders(monkeypatch, _dump_nccl_trace_json=dump)
    assert flight_recording() is None
