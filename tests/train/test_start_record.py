"""Record of a start: what is open and known before the ranks have exchanged anything."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2train.config.load import Config
from k2train.errors import RunError, UnavailableError
from k2train.guard.stop_signals import StopAsked, StopRequest
from k2train.model.kernels.select import choose_kernels
from k2train.parallel.grid import Axis
from k2train.record import jsonl, ledger
from k2train.record.events import Change, Starting, Stopped, Takeover
from k2train.record.ledger import read_ledger
from k2train.train import start_record
from k2train.train.preflight import Start, prepare_start
from k2train.train.rank_zero_logger import RankZeroRunLogger
from k2train.train.run_logger import RunLogger
from k2train.train.start_record import log_finished, log_starting, open_run_logger
from tests.support.tiny_corpus import config_tree, make_corpus

LOCK: Any = SimpleNamespace(
    token=4,
    taken_over_from={"token": 3, "reason": "its process is gone"},
    takeover_message="taken over from attempt 3",
)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    make_corpus(tmp_path / "data", 2)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    return prepare_start(Config.model_validate(tree), 1, verify=False)


def run_of(rank: int) -> Any:
    return SimpleNamespace(
        grid=SimpleNamespace(rank=rank, device=torch.device("cpu")),
        logger=RunLogger(),
        monitor=SimpleNamespace(stop=StopRequest()),
    )


class Alone:
    """An agreement with rank 0, which has said `word`; without one, a peer is gone."""

    def __init__(self, word: Any) -> None:
        self.word = word

    def __call__(self, grid: Any) -> "Alone":
        return self

    def from_first(self, value: Any, form: Any, what: str) -> Any:
        assert what == "open the record"
        if self.word is None:
            raise RuntimeError("Connection closed by peer")
        return value if self.word == "mine" else form.validate_python(self.word)

    def distinct(self, value: list[str], form: Any, what: str) -> list[list[str]]:
        assert what == "open the record"
        return [value, ["end:term", "gradient@step=3:nan"], []]


def test_a_peer_that_dies_meanwhile_can_be_recorded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a logger that nobody can reach, so that no one says in the ledger who is gone."""
    monkeypatch.setattr(start_record, "Agreement", Alone(None))
    run = run_of(0)
    with pytest.raises(RuntimeError, match="closed by peer"):
        open_run_logger(start, run, None, "malloc")
    assert isinstance(run.logger, RankZeroRunLogger)


@pytest.mark.parametrize("call", ("append_bytes", "fsync", "write_head"))
def test_a_signal_in_a_write_leaves_the_record_whole(
    start: Start, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Catches a line that is on disk and not in the account: it would be written twice, or its size
    taken for another process's.
    """
    monkeypatch.setattr(start_record, "Agreement", Alone("mine"))
    run = run_of(0)
    logger = open_run_logger(start, run, None, "malloc")
    # The ledger's own calls: `fsync` is behind the line, and before anything is known of it.
    holder: Any = jsonl.os if call == "fsync" else ledger
    real = getattr(holder, call)

    def interrupted(*given: Any, **named: Any) -> Any:
        result = real(*given, **named)
        monkeypatch.setattr(holder, call, real)
        signal.raise_signal(signal.SIGUSR1)
        return result

    with run.monitor.stop as stop:
        stop.begin_start()
        monkeypatch.setattr(holder, call, interrupted)
        with pytest.raises(StopAsked, match="SIGUSR1"):
            logger.event(Starting(attempt=1, step=0))
        logger.event(Stopped(attempt=1, reason="SIGUSR1", step=0, problem=""))

    path = start.directory / "ledger.jsonl"
    assert [entry.event.name for entry in read_ledger(path)] == ["starting", "stopped"]
    assert logger.all_written() and ledger.Ledger(path).head == logger.ledger_head


def test_rank_0_says_what_it_found(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a takeover or a removed remainder that no one is told of."""
    (start.checkpoints / "ckpt_001.3.tmp").mkdir(parents=True)
    monkeypatch.setattr(start_record, "Agreement", Alone("mine"))
    run = run_of(0)
    logger = open_run_logger(start, run, LOCK, "malloc: kept")
    assert logger is run.logger and (logger.attempt, logger.fencing_token) == (1, 4)
    assert logger.taken_over_from == Takeover(token=3, reason="its process is gone")
    assert logger.memory == "malloc: kept"
    # Another rank's environment arms them, on a machine of its own.
    assert logger.faults == ("end:term", "gradient@step=3:nan")
    printed = capsys.readouterr().err
    assert "taken over from attempt 3" in printed and "removed unfinished ckpt_001.3.tmp" in printed


def test_another_rank_takes_rank_0s_word(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that writes, that counts starts by itself, or that goes on alone."""
    monkeypatch.setattr(start_record, "Agreement", Alone((5, 9, "", False)))
    logger = open_run_logger(start, run_of(1), None, "malloc")
    assert (logger.attempt, logger.fencing_token) == (5, 9) and not start.directory.exists()
    for unavailable, kind in ((False, RunError), (True, UnavailableError)):
        told = (5, 9, "runs/run cannot be written", unavailable)
        monkeypatch.setattr(start_record, "Agreement", Alone(told))
        with pytest.raises(kind, match="cannot be written"):
            open_run_logger(start, run_of(1), None, "malloc")


LEFT = (
    "config.yaml.tmp",
    "ledger.head.tmp",
    "watch/verdict.json.0.tmp",
    "watch/verdict.json.11.tmp",
)
KEPT = ("notes.tmp", "watch/verdict.json", "watch/verdict.json.tmp.txt", "config.yaml")


@pytest.mark.parametrize("finished", (False, True))
def test_what_a_kill_left_is_removed(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
) -> None:
    """Catches files that stay for ever, and one of somebody else that goes with them."""
    (start.directory / "watch").mkdir(parents=True)
    for name in (*LEFT, *KEPT):
        (start.directory / name).write_text("x")
    (start.directory / "watch" / "verdict.json.7.tmp").mkdir()
    (start.directory / "watch" / "verdict.json.8.tmp").symlink_to(start.directory / "notes.tmp")

    if finished:
        log_finished(start, run_of(1).grid, start.checkpoints / "ckpt_002")
        assert all((start.directory / name).exists() for name in LEFT), "rank 0 tidies"
        log_finished(start, run_of(0).grid, start.checkpoints / "ckpt_002")
        assert "this stage is finished" in capsys.readouterr().out
    else:
        monkeypatch.setattr(start_record, "Agreement", Alone("mine"))
        open_run_logger(start, run_of(0), None, "malloc")

    assert [name for name in LEFT if (start.directory / name).exists()] == []
    assert all((start.directory / name).exists() for name in KEPT)
    assert (start.directory / "watch" / "verdict.json.7.tmp").is_dir()
    assert (start.directory / "watch" / "verdict.json.8.tmp").is_symlink()


class Logged:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.lines: list[str] = []
        self.attempt, self.memory, self.run_id, self.config_sha256 = 1, "malloc", "id", None
        self.fencing_token, self.taken_over_from = 0, None

    def event(self, event: Any) -> None:
        self.events.append(event)

    def info(self, line: str) -> None:
        self.lines.append(line)


def on_cuda(deterministic: bool) -> Any:
    """An engine on a GPU, as far as a record asks."""
    kernels = replace(choose_kernels(), deterministic=deterministic)
    return SimpleNamespace(kernels=kernels, grid=SimpleNamespace(device=torch.device("cuda")))


def test_a_start_records_whether_bits_repeat(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ledger, a first line or a resume that does not say that the promise is off."""
    logger: Any = Logged()
    config = start.setup.config
    kernels = config.kernels.model_copy(update={"deterministic": False})
    loose_config = config.model_copy(update={"kernels": kernels})
    loose = replace(start, setup=replace(start.setup, config=loose_config))
    before = SimpleNamespace(
        config=config.model_dump(mode="json"), step=4, chunks=SimpleNamespace(order=())
    )
    chosen: Any = SimpleNamespace(
        path=Path("ckpt_001"), manifest=before, refused=(), allowed=(), is_new=False
    )
    unmoved = SimpleNamespace(
        total_steps=9,
        rate_last=0.0,
        rate_next=0.0,
        total_steps_before=9,
        rate_before=0.0,
        lines=list,
    )
    monkeypatch.setattr(start_record, "schedule_change", lambda *_: unmoved)

    for deterministic in (True, False):
        engine = on_cuda(deterministic)
        start_record.log_started(logger, start, engine)
        start_record.log_resumed(logger, loose, engine, chosen, ())
    starts = [event for event in logger.events if not isinstance(event, Change)]
    assert [event.deterministic for event in starts] == [True, True, False, False]
    assert sum("was true up to this checkpoint" in line for line in logger.lines) == 2
    notes = [list(start_record._notes(of, "cuda")) for of in (start, loose)]
    assert [sum("sums have no fixed order" in (n or "") for n in told) for told in notes] == [0, 1]


def test_a_start_without_inodes_says_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "no space left" on a disk that shows room."""

    def no_room(start: Start, *_: Any) -> RankZeroRunLogger:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(start.directory / "a"))

    monkeypatch.setattr(start_record, "Agreement", Alone("mine"))
    monkeypatch.setattr(start_record, "ExpectingRunLogger", no_room)
    for free, words in ((0, r"inodes are used up, see df -i"), (9, r"No space left on device$")):
        facts = SimpleNamespace(f_files=100, f_favail=free)
        monkeypatch.setattr("k2train.retry.os.statvfs", lambda path, facts=facts: facts)
        with pytest.raises(UnavailableError, match=words):
            open_run_logger(start, run_of(0), None, "malloc")


@pytest.mark.parametrize("device_type", ("cpu", "cuda"))
def test_the_environment_of_an_accelerator_is_recorded(
    start: Start, monkeypatch: pytest.MonkeyPatch, device_type: str
) -> None:
    """Catches an allocator setting of the user's that no line and no event tells."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    events: list[Any] = []
    logger: Any = SimpleNamespace(attempt=1, faults=(), event=events.append)
    log_starting(logger, 0, device_type)
    notes = [note or "" for note in start_record._notes(start, device_type)]
    told = [note for note in notes if "max_split_size_mb:64 (your value)" in note]
    if device_type == "cpu":
        assert events[0].settings is None and told == []
    else:
        assert events[0].settings["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
        assert len(told) == 1


@pytest.mark.parametrize(
    ("setting", "tensor", "unconnected", "expected"),
    (
        ("auto", 2, "", "symmetric memory on, "),
        ("auto", 2, "rank 3 needs devices", "symmetric memory off (rank 3 needs devices), "),
        ("auto", 1, "1 ranks", ""),
        (False, 2, "", ""),
    ),
)
def test_what_symmetric_memory_came_to(
    setting: str | bool, tensor: int, unconnected: str, expected: str
) -> None:
    """Catches a run whose first lines leave open what `auto` chose."""
    parallel = SimpleNamespace(symmetric_memory=setting)
    axis = Axis("tp", tensor, 0, None, symmetric=not unconnected)
    config = SimpleNamespace(parallel=parallel)
    engine: Any = SimpleNamespace(config=config, tp=axis, unconnected=unconnected)
    assert start_record._symmetric(engine) == expected


@pytest.mark.parametrize(
    ("setting", "device", "tensor", "overlap", "pair", "expected"),
    (
        ("auto", "cpu", 2, False, True, "tensor transfers in shared memory, "),
        ("auto", "cpu", 2, False, None, "tensor transfers by gloo (no shared memory), "),
        ("auto", "cpu", 2, True, None, ""),
        ("auto", "cpu", 4, False, None, "tensor transfers by gloo (no shared memory), "),
        ("auto", "cpu", 8, False, None, ""),
        ("auto", "cuda", 2, False, None, ""),
        ("off", "cpu", 2, False, None, ""),
    ),
)
def test_what_shared_memory_came_to(
    setting: str, device: str, tensor: int, overlap: bool, pair: Any, expected: str
) -> None:
    """Catches a run on slow transfers whose first lines do not say so."""
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(parallel=SimpleNamespace(shared_memory=setting)),
        grid=SimpleNamespace(device=SimpleNamespace(type=device)),
        tp=Axis("tp", tensor, 0, None, overlap=overlap, pair=pair),
        dp=Axis("dp", 1, 0, None),
        pp=Axis("pp", 1, 0, None),
    )
    assert start_record._pairs(engine) == expected
    # A pipeline's sends run beside the computation in any case.
    engine.tp, engine.pp = engine.dp, Axis("pp", tensor, 0, None, overlap=overlap, channel=pair)
    if overlap:
        expected = "pipeline transfers by gloo (no shared memory), "
    pipeline = expected.replace("tensor", "pipeline") if tensor == 2 else ""
    assert start_record._pairs(engine) == pipeline
