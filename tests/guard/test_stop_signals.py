"""Stop signals: would catch a lost signal, a save cut short by Ctrl-C, and handlers left behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train.guard.stop_signals import SIGNALS, StopRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # Under nohup the tests inherit an ignored SIGHUP, which a stop request rightly leaves ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_to_stop(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name


def test_the_first_signal_names_the_request() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested == "SIGUSR1"


def test_a_second_ctrl_c_means_now_but_the_launchers_copy_does_not() -> None:
    now = [0.0]
    with StopRequest(echo_seconds=2.0, clock=lambda: now[0]) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] = 0.5
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("the launcher's copy of the same key press was taken for a second one")
        assert stop.requested == "SIGINT"
        now[0] = 2.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_restore_gives_the_signals_back() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopRequest().install()
    assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
    with pytest.raises(AssertionError, match="installed already"):
        stop.install()
    stop.restore()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    stop.restore()
    stop.install().restore()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_only_the_main_thread_may_install() -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            StopRequest().install()
        except AssertionError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1 and "main thread" in str(raised[0])


def test_a_process_finishes_its_step_after_sigterm() -> None:
    code = (
        "import time; from k2train.guard.stop_signals import StopRequest\n"
        "stop = StopRequest().install(); print('in', flush=True)\n"
        "while not stop.requested: time.sleep(0.01)\n"
        "print('saved', stop.requested); raise SystemExit(75)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    process.terminate()
    rest, _ = process.communicate(timeout=120)
    assert (process.returncode, rest) == (75, "saved SIGTERM\n")


def test_the_request_is_answered_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Silence after Ctrl-C for as long as a step takes makes people press it again."""
    with StopRequest(announce=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "\nk2train: SIGTERM: finishing the step, then saving\n"


def test_a_hang_up_that_was_ignored_stays_so() -> None:
    """Catches nohup undone: a run that stops with its terminal although SIGHUP was ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.requested == "SIGUSR2"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
