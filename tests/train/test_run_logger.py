"""Run logger of rank 0: attempts, run id, ledger entries of a committed checkpoint."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from k2train.checkpoint.manifest import CheckpointManifest, manifest_text, seal
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.config.load import Config, flat_values, load_config
from k2train.errors import RunError
from k2train.files import write_synced
from k2train.record.events import CheckpointSaved, Resumed, Started, Stopped, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import MetricsWriter, Record, StepRecord, read_metrics
from k2train.record.score_files import evaluated_sets, file_differences, read_scores
from k2train.train import rank_zero_logger
from k2train.train.preflight import Start, prepare_start
from k2train.train.rank_zero_logger import RankZeroRunLogger
from k2train.train.run_logger import RunLogger
from tests.support.events import event
from tests.support.tiny_corpus import ROOT, config_tree, make_corpus, manifest_of

RECORD = StepRecord(1, 1, loss=5.0, grad_norm=1.0, lr=0.1, tokens_per_second=9.0, seconds=0.5)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    make_corpus(tmp_path / "data", 2)
    config = Config.model_validate(
        config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "pen")
    )
    prepared = prepare_start(config, 1, verify=False)
    prepared.checkpoints.mkdir(parents=True)
    return prepared


def test_attempts_count_restarts(start: Start) -> None:
    """One more each start: from the metrics, and from the ledger where a start died before its
    first step.
    """
    for attempt in (1, 2):
        logger = RankZeroRunLogger(start)
        assert logger.attempt == attempt
        logger.step(replace(RECORD, attempt=logger.attempt))
        logger.close()
    logger = RankZeroRunLogger(start)
    logger.event(event(Resumed, attempt=3))
    logger.close()
    assert RankZeroRunLogger(start).attempt == 4
    assert [row.attempt for row in read_metrics(start.directory / "metrics.jsonl")] == [1, 2]


def test_one_run_id_across_restarts(start: Start) -> None:
    """W&B continues one curve only if the id is that of the first start, also after a second
    `started`.
    """
    first = RankZeroRunLogger(start)
    first.event(event(Started, attempt=1, run_id=first.run_id))
    again = RankZeroRunLogger(start)
    assert again.run_id == first.run_id and len(first.run_id) == 32


def test_committed(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger gets the manifest's facts and the hash of its bytes.

    A held-out loss that is not finite is told too.
    """
    logger = RankZeroRunLogger(start)
    golden = manifest_of(ROOT / "tests" / "golden" / "format_2" / "ckpt_001")
    for name, held_out in (("ckpt_000", None), ("ckpt_001", 5.25), ("ckpt_002", "nan")):
        path = start.checkpoints / name
        path.mkdir()
        raw = golden | {"step": 5, "loss": 5.5, "held_out_loss": held_out}
        raw["files"] = {name: facts | {"bytes": 3} for name, facts in raw["files"].items()}
        manifest = CheckpointManifest.model_validate(raw)
        (path / "manifest.json").write_text(json.dumps(raw))
        logger.committed(path, manifest, 0.25)
        saved = of_kind(read_ledger(start.directory / "ledger.jsonl"), CheckpointSaved)[-1]
        assert (saved.checkpoint, saved.bytes, saved.seconds) == (name, 6, 0.25)
        assert (
            saved.manifest_sha256
            == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        )
    assert capsys.readouterr().err == "", "the console belongs to the main thread"
    logger.step(RECORD)
    output = capsys.readouterr().err
    assert (
        "saved ckpt_001 at step 5, held-out loss 5.2500" in output and "held-out loss nan" in output
    )
    assert (
        output.index("saved ckpt_000") < output.index("saved ckpt_001") < output.index("step 1/10")
    )


def test_recover_looks_at_what_is_new(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the last resume compared is not read again: hundreds of manifests lie there. One that is
    new, and one that was saved again since, are recorded by content. A damaged one is told.
    """
    paths = []
    for number in range(5):
        path = start.checkpoints / f"ckpt_{number:03d}"
        shutil.copytree(ROOT / "tests" / "golden" / "format_3" / "ckpt_001", path)
        raw = {k: v for k, v in manifest_of(path).items() if k != "self_sha256"}
        (path / "manifest.json").write_text(manifest_text(seal(raw | {"name": path.name})))
        paths.append(path)

    first = RankZeroRunLogger(start)
    first.event(event(Started, attempt=1, run_id="r"))
    first.recover(paths[:4])
    first.event(event(Resumed, attempt=2, checkpoint="ckpt_002", step=5))
    read: list[str] = []
    real = rank_zero_logger.manifest_sha256

    def noting(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(rank_zero_logger, "manifest_sha256", noting)
    # The third was set aside after that resume, and is another one now; the fourth is new.
    raw = {k: v for k, v in manifest_of(paths[3]).items() if k != "self_sha256"}
    (paths[3] / "manifest.json").write_text(manifest_text(seal(raw | {"attempt": 2})))
    again = RankZeroRunLogger(start)
    again.recover(paths)
    assert read == ["ckpt_003", "ckpt_004"]
    ledger = start.directory / "ledger.jsonl"
    saved = [e.checkpoint for e in of_kind(read_ledger(ledger), CheckpointSaved)]
    assert saved == ["ckpt_000", "ckpt_001", "ckpt_002", "ckpt_003", "ckpt_003", "ckpt_004"]

    (paths[4] / "manifest.json").write_text("{")
    again.recover(paths)
    assert "damaged: " in capsys.readouterr().err


def test_config_is_complete(start: Start) -> None:
    """The config in the run directory loads back to the same values, written by rename."""
    RankZeroRunLogger(start)
    assert flat_values(load_config(str(start.directory / "config.yaml"))) == flat_values(
        start.setup.config
    )
    write_synced(start.directory / "config.yaml", "other: 1\n")
    assert (start.directory / "config.yaml").read_text() == "other: 1\n"
    assert not list(start.directory.glob("*.tmp"))


def test_torn_lines_are_told(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """A killed writer's half line is repaired and reported."""
    logger = RankZeroRunLogger(start)
    logger.event(event(Started, attempt=1, run_id="r"))
    logger.step(RECORD)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        with (start.directory / name).open("ab") as stream:
            stream.write(b'{"half')
    capsys.readouterr()
    RankZeroRunLogger(start)
    output = capsys.readouterr().err
    assert (
        "ledger.jsonl: the last line was cut off" in output
        and "metrics.jsonl: 6 bytes of a torn last line" in output
    )


def test_a_changed_ledger_is_refused(start: Start) -> None:
    """A start on a record that was edited would continue from a false one."""
    logger = RankZeroRunLogger(start)
    logger.event(event(Started, attempt=1, run_id="r"))
    logger.event(event(Stopped, attempt=1))
    path = start.directory / "ledger.jsonl"
    path.write_text(path.read_text().replace('"r"', '"q"'))
    with pytest.raises(RunError, match="line 1 does not match its own hash"):
        RankZeroRunLogger(start)


def test_the_silent_form_has_every_method(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer of any rank calls the same methods; off rank 0 they write nothing."""
    public = {name for name in vars(RankZeroRunLogger) if not name.startswith("_")}
    assert public <= set(dir(RunLogger))
    silent = RunLogger()
    silent.event(event(Started, attempt=1))
    silent.step(RECORD)
    silent.info("text")
    silent.committed(start.checkpoints, {}, 0.0)
    silent.close()
    assert [path.name for path in start.directory.iterdir()] == ["checkpoints"]
    assert capsys.readouterr().err == ""


def test_one_file_that_cannot_be_synced_is_told_and_keeps_no_other(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches rows that are lost in a power cut after a checkpoint, with nobody the wiser."""
    logger, synced = RankZeroRunLogger(start), list[str]()

    def refused() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger.metrics, "sync", refused)
    monkeypatch.setattr(logger.roots, "sync", lambda: synced.append("roots"))
    logger.sync_rows()
    logger.close()
    assert synced == ["roots"]
    assert "metrics.jsonl cannot be synced: No space left on device" in capsys.readouterr().err


def facts_of(name: str, loss: float) -> HeldOutFacts:
    parts = [{"name": part, "loss": loss, "rows": 3} for part in ("code", "web")]
    raw = {"name": name, "loss": loss, "rows": 6, "rows_left_out": 0, "targets": 90}
    return HeldOutFacts.model_validate(raw | {"subsets": parts})


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_kill_9_among_the_lines_of_a_score(
    start: Start,
    written: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Catches a held-out loss that one file has and the other lacks for ever, or that is there
    twice, after a kill before, between and behind its lines in the two files.
    """
    real = MetricsWriter.write
    count = [0]

    def killing(writer: MetricsWriter, record: Record) -> None:
        if not isinstance(record, StepRecord):
            if count[0] == written:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
        real(writer, record)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(MetricsWriter, "write", killing)
            logger = RankZeroRunLogger(start)
            logger.step(RECORD)
            logger.scores(1, [facts_of("held_out", 2.5), facts_of("other", float("nan"))], 4.0)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL

    metrics, held_out = start.directory / "metrics.jsonl", start.directory / "held_out.jsonl"
    assert [row.step for row in read_metrics(metrics)] == [1], "the line of the step is there"
    logger = RankZeroRunLogger(start)
    logger.close()
    found = [(one.step, one.attempt, one.set) for one in read_scores(held_out)]
    assert found == ([(1, 1, "held_out"), (1, 1, "other")] if written else [])
    assert list(map(repr, read_scores(held_out))) == [repr(r) for _, r in evaluated_sets(metrics)]
    assert [*file_differences(metrics, held_out)] == []
    said = capfd.readouterr().err
    assert ("added from metrics.jsonl" in said) == (0 < written < 3)
    # The next start does not do it again.
    assert logger.attempt == 2 and len(read_scores(held_out)) == len(found)
