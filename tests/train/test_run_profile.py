"""Profile of a run: its files, its tables, its phases, and a run that does not change by a bit."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.errors import ConfigError
from k2train.model.kernels.openblas import PROFILED_AS
from k2train.model.kernels.processor_library import fp32_library_of_processor
from k2train.record.metrics import read_metrics, read_roots
from k2train.train.profile_table import PREFIX, lines, profile_of
from k2train.train.run_profile import FOLDER
from k2train.train.trainer import Trainer
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import audited_tree, make_corpus, trainer_job

TRAINED = {"run__stop_after_steps": 7, "audit__resume_drill": "off", "data__held_out_rows": 3}
STEPS = [5, 6]
"""The end of the first chunk, with its evaluation and save, and the step after it."""
OPERATORS = {
    "torch": "aten::mm",
    "onednn": "mkldnn::_linear_pointwise",
    "openblas": PROFILED_AS,
}
"""What a library's product is called in a profile."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and in `runs` a run without a profile and one with it, on two ranks."""
    folder = tmp_path_factory.mktemp("profile")
    make_corpus(folder / "data", 2)
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, pool: GlooPool) -> tuple[Path, Path]:
    trees = [
        audited_tree(base, "without", **TRAINED),
        audited_tree(base, "profiled", **TRAINED, profile__steps=STEPS, profile__ranks="all"),
    ]
    for tree in trees:
        assert pool.run(2, trainer_job, tree) == [75, 75]
    return base / "runs" / "without", base / "runs" / "profiled"


def test_a_profile_changes_no_bit(runs: tuple[Path, Path]) -> None:
    """Catches a profile that draws random numbers, reorders sums or skips a step."""
    without, profiled = runs
    losses = [[(row.step, row.loss) for row in read_metrics(run / "metrics.jsonl")] for run in runs]
    roots = [
        [(row.step, row.root) for row in read_roots(run / "state_roots.jsonl")] for run in runs
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert roots[0] == roots[1] and len(roots[0]) == 7
    assert not (without / FOLDER).exists() and (profiled / FOLDER).exists()


def test_each_rank_writes_a_trace_and_a_table(runs: tuple[Path, Path]) -> None:
    """Catches a trace that no viewer opens, a phase that is missing, and shares beyond a whole."""
    _, profiled = runs
    names = sorted(path.name for path in (profiled / FOLDER).iterdir())
    stem = "attempt_001_steps_000005_000006_rank_"
    assert names == [f"{stem}{rank}.{end}" for rank in (0, 1) for end in ("trace.json.gz", "txt")]
    with gzip.open(profiled / FOLDER / names[0]) as stream:
        trace = json.load(stream)
    events = trace["traceEvents"]
    assert trace["host_name"] == "", "the record of a run names no host"
    marked = [event["name"] for event in events if str(event.get("name")).startswith(PREFIX)]
    assert marked.count(f"{PREFIX}data") == marked.count(f"{PREFIX}update") == 2
    assert f"{PREFIX}evaluate" in marked and f"{PREFIX}save" in marked
    # Two micro-batches a step on each of two ranks; the evaluation's forwards are not the step's.
    assert marked.count(f"{PREFIX}forward") == marked.count(f"{PREFIX}backward") == 4
    table = (profiled / FOLDER / names[1]).read_text(encoding="utf-8")
    assert table.startswith("steps 5 to 6, rank 0; a step took ")
    assert "under the profiler and" in table.splitlines()[0]
    phases = table.partition("by operator")[0].splitlines()[4:-1]
    assert [row.split()[0] for row in phases] == [
        *("data", "forward", "backward", "reduce", "update", "evaluate", "save", "other"),
    ]
    shares = [float(row.split()[-1].rstrip("%")) for row in phases]
    assert sum(shares) == pytest.approx(100, abs=0.5) and all(share >= 0 for share in shares)
    assert OPERATORS[fp32_library_of_processor()] in table


def test_a_stop_in_the_midst_writes_what_there_is(base: Path, pool: GlooPool) -> None:
    """Catches a profile that is lost, and ranks that wait for each other, when a run is stopped."""
    changes = {**TRAINED, "run__stop_after_steps": 2, "profile__steps": [2, 6]}
    assert pool.run(2, trainer_job, audited_tree(base, "stopped", **changes)) == [75, 75]
    found = sorted(path.name for path in (base / "runs" / "stopped" / FOLDER).iterdir())
    assert [name.rpartition(".")[0][:42] for name in found] == [
        "attempt_001_steps_000002_000002_rank_0.tra",
        "attempt_001_steps_000002_000002_rank_0",
    ]


def _folder_is_a_file(trainer: Trainer) -> None:
    (trainer.start.directory / FOLDER).write_text("", encoding="utf-8")


def test_a_disk_that_refuses_ends_no_run(base: Path, pool: GlooPool) -> None:
    """Catches a run that ends because its profile cannot be written."""
    tree = audited_tree(base, "refused", **{**TRAINED, "run__stop_after_steps": 3})
    tree["profile"] = {"steps": [1, 2]}
    assert pool.run(1, trainer_job, tree, _folder_is_a_file) == [75]
    assert len(read_metrics(base / "runs" / "refused" / "metrics.jsonl")) == 3


def test_steps_and_ranks_that_the_run_does_not_have_are_refused(base: Path, pool: GlooPool) -> None:
    """Catches a profile that never comes, without a word."""
    tree = audited_tree(base, "beyond", profile__steps=[9, 12])
    (told,) = pool.run(1, trainer_job, tree)
    assert told == (
        f"{ConfigError.__name__}: profile.steps ([9, 12]) must lie within the 10 steps of this "
        "run: lower the last to 10 or less, or set profile.steps=null"
    )
    tree = audited_tree(base, "beyond", profile__steps=[2, 3], profile__ranks=4)
    (told,) = pool.run(1, trainer_job, tree)
    assert "profile.ranks (4) must be below the world size (1), or all; nearest is 0" in str(told)


def _event(name: str, start: float, end: float, own: float, kernels: tuple[float, ...] = ()) -> Any:
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=own,
        kernels=[SimpleNamespace(duration=time) for time in kernels],
        device_type="DeviceType.CPU",
    )


def test_device_time_counts_in_the_phase_that_started_it() -> None:
    """Catches kernels of a backward, which another thread starts, that are in no phase.

    One call in two steps is 0.5 a step, not 0.

    Times are in microseconds, of two steps that took 1 ms.
    """
    events = [
        _event(f"{PREFIX}forward", 0, 100, 0),
        _event(f"{PREFIX}backward", 100, 300, 0),
        _event("aten::mm", 10, 20, 10, (50.0,)),
        _event("MmBackward", 150, 160, 10, (80.0, 20.0)),
        _event("aten::copy_", 400, 410, 10, (8.0,)),
        SimpleNamespace(name=f"{PREFIX}forward", device_type="DeviceType.CUDA"),
    ]
    found = profile_of(events, steps=2, wall=1e-3)
    device = {name: round(time.device * 1e6) for name, time in found.phases.items()}
    assert device == {"forward": 50, "backward": 100, "other": 8}
    assert found.phases["backward"].host == pytest.approx(200e-6)
    text = lines(found)
    assert text[1].split() == ["phase", "calls", "host", "s", "share", "device", "s"]
    rows = {row.split()[0]: row.split()[1:] for row in text[2:5]}
    assert rows["forward"] == ["0.5", "0.000050", "10.0%", "0.000025"]
    assert rows["other"] == ["0.000350", "70.0%", "0.000004"]
    assert [row.split()[0] for row in text[-3:]] == ["MmBackward", "aten::mm", "aten::copy_"]
