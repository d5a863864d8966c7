"""The command that writes a report: a page that is not there, a traceback, a watch without end."""

from pathlib import Path
from typing import Any

import pytest
from report import main

from k2train.files import AtomicFile
from k2train.record.events import Finished, Started
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


def make_run(folder: Path, finished: bool) -> Path:
    end = [(5.0, event(Finished, attempt=1, step=2))] if finished else []
    write_ledger(folder, [(0.0, event(Started, attempt=1)), *end])
    write_records(folder, [step(1), step(2)])
    return folder


def test_it_writes_the_page_into_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a page elsewhere, and one that is written while another run is compared."""
    run = make_run(tmp_path / "a", finished=True)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: a, step 2, ")
    other = make_run(tmp_path / "b", finished=True)
    page = tmp_path / "both.html"
    assert main([str(run), "--compare", str(other), "--to", str(page)]) == 0
    assert "training b" in page.read_text() and "refresh" not in page.read_text()[:400]


def test_a_watch_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a page that goes on loading itself after the run has ended."""
    run = make_run(tmp_path / "a", finished=False)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert 'content="7"' in (run / "report.html").read_text()
        make_run(run, finished=True)

    monkeypatch.setattr("time.sleep", sleep)
    assert main([str(run), "--watch", "7"]) == 0
    assert slept == [7] and 'http-equiv="refresh"' not in (run / "report.html").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, and argparse's usage in place of a line."""
    assert main(["nowhere"]) == 2
    for arguments in (["--watch", "0", "nowhere"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_place_that_cannot_be_written_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback for a folder that is not there."""
    run = make_run(tmp_path / "a", finished=True)
    assert main([str(run), "--to", str(tmp_path / "none" / "r.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_nothing_but_a_page_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page in the place of a ledger, or of a device such as /dev/stdout."""
    run = make_run(tmp_path / "a", finished=True)
    ledger = run / "ledger.jsonl"
    before = ledger.read_bytes()
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    for path in (ledger, device):
        assert main([str(run), "--to", str(path)]) == 2
        assert f"{path} exists and is no HTML page" in capsys.readouterr().err
    assert ledger.read_bytes() == before and device.is_symlink()
    empty = tmp_path / "empty.html"
    empty.touch()
    assert main([str(run), "--to", str(empty)]) == 0 == main([str(run), "--to", str(empty)])


def test_a_watch_outlives_another_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two programs that write the page under one temporary name."""
    run = make_run(tmp_path / "a", finished=True)
    made = AtomicFile.__enter__

    def meanwhile(file: AtomicFile) -> Any:
        stream = made(file)
        # As another process does, which has another id.
        monkeypatch.setattr(AtomicFile, "__enter__", made)
        with monkeypatch.context() as other:
            other.setattr("os.getpid", lambda: 1)
            assert main([str(run)]) == 0
        return stream

    monkeypatch.setattr(AtomicFile, "__enter__", meanwhile)
    assert main([str(run)]) == 0
    assert (run / "report.html").read_bytes().rstrip().endswith(b"</html>")
