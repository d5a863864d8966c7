"""Stop signals: would catch a lost signal, a save cut short by Ctrl-C, and handlers left behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train import early_signals
from k2train.guard.stop_signals import SIGNALS, StopAsked, StopRequest, run_hearing
from tests.support.command_line import HANG_SECONDS, soon

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
    rest, _ = process.communicate(timeout=HANG_SECONDS)
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


def test_during_a_start_the_first_signal_raises_once() -> None:
    """Catches a start that trains on for minutes, and a clean-up that is interrupted again."""
    with StopRequest() as stop:
        stop.begin_start()
        with pytest.raises(StopAsked, match="SIGUSR1"):
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGUSR1"


def test_after_the_start_a_signal_is_recorded() -> None:
    with StopRequest() as stop:
        stop.begin_start()
        stop.end_start()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"


def test_a_held_signal_raises_at_the_end() -> None:
    """Catches a lease that a signal leaves behind, and a held signal that is forgotten."""
    done = []
    with StopRequest() as stop:
        stop.begin_start()
        with pytest.raises(StopAsked, match="SIGTERM"), stop.held():
            signal.raise_signal(signal.SIGTERM)
            done.append("held")
        assert done == ["held"]
        with stop.held():
            signal.raise_signal(signal.SIGTERM)


def test_another_thread_may_ask() -> None:
    """Catches a reason that is told as the signal which carried it."""
    with StopRequest() as stop:
        stop.begin_start()
        thread = threading.Thread(target=stop.ask, args=("STOP file",))
        with pytest.raises(StopAsked, match="STOP file"):
            thread.start()
            # Bounded: no signal comes where nobody sends one.
            soon(lambda: False)
        thread.join()
        assert stop.requested == "STOP file" and not stop.starting


def test_nobody_asks_a_process_that_hears_no_more() -> None:
    """Catches a STOP that kills a process whose start was refused: USR2 without its handler."""
    sent: list[int] = []
    with StopRequest() as stop:
        stop.begin_start()
        stop.restore()
        assert not stop.starting
        signal.signal(signal.SIGUSR2, lambda number, frame: sent.append(number))
        stop.ask("STOP file")
    assert stop.requested is None and sent == []


def test_blocks_that_hold_a_signal_may_be_nested() -> None:
    """Catches a signal that an inner block lets through, and one that another thread raises."""
    done: list[str] = []

    def elsewhere() -> None:
        with stop.held():
            done.append("elsewhere")

    with StopRequest() as stop:
        stop.begin_start()
        with pytest.raises(StopAsked, match="SIGTERM"), stop.held():
            with stop.held():
                signal.raise_signal(signal.SIGTERM)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            done.append("outer")
    assert done == ["elsewhere", "outer"]


def test_no_handler_of_errors_swallows_it() -> None:
    """Catches a start that goes on because an `except Exception` took the request."""
    assert not issubclass(StopAsked, Exception)


def test_native_code_that_waits_does_not_delay_a_signal() -> None:
    """Catches a rank that waits ten minutes for a missing one, deaf to SIGTERM."""
    entered, release = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        release.wait()

    def send() -> None:
        entered.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop:
        stop.begin_start()
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(StopAsked):
            run_hearing(wait)
    release.set()


def test_what_runs_hearing_answers_as_usual() -> None:
    assert run_hearing(lambda: 7) == 7
    with pytest.raises(KeyError, match="gone"):
        run_hearing(lambda: {}["gone"])


def test_the_launchers_copy_of_a_second_ctrl_c_interrupts_no_clean_up() -> None:
    """Catches an end that is not recorded, because each key press arrives twice."""
    now = [0.0]
    with StopRequest(echo_seconds=2.0, clock=lambda: now[0]):
        signal.raise_signal(signal.SIGINT)
        now[0] = 3.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        now[0] = 3.1
        signal.raise_signal(signal.SIGINT)
        now[0] = 5.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_waits_for_what_is_held() -> None:
    """Catches a KeyboardInterrupt in the midst of torch's import, which aborts."""
    now = [0.0]
    with StopRequest(echo_seconds=2.0, clock=lambda: now[0]) as stop:
        stop.begin_start()
        with pytest.raises(StopAsked, match="SIGINT"), stop.held():
            signal.raise_signal(signal.SIGINT)
            now[0] = 3.0
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("saves", "said"),
    (
        (True, "\nk2train: SIGTERM: finishing the step, then saving\n"),
        (False, ""),
        (
            None,
            "\nk2train: SIGTERM: finishing the step, then saving, unless another process has "
            "failed\n",
        ),
    ),
)
def test_a_save_is_promised_only_if_it_follows(
    saves: bool | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a promise to save after a launcher has ended what a dead rank left."""
    with StopRequest(announce=True) as stop:
        stop.means_to_save = lambda name: saves
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    assert capfd.readouterr().err == said


def test_a_signal_of_the_imports_ends_the_start() -> None:
    """Catches a signal that came before there was a handler and is forgotten."""
    early_signals.keep()
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.requested == "SIGUSR1"
        with pytest.raises(StopAsked, match="SIGUSR1"):
            stop.begin_start()
    assert early_signals.take() == []


def test_kept_signals_are_handed_over_once() -> None:
    """Catches handlers that stay behind, and an ignored SIGHUP that is heard again."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # In the background of a shell script it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    early_signals.keep()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.raise_signal(number)
    heard: list[int] = []
    restore, came = early_signals.replace(lambda number, frame: heard.append(number))
    assert came == [signal.SIGINT, signal.SIGUSR2]
    assert restore == {n: before[n] for n in SIGNALS if n != signal.SIGHUP}
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.raise_signal(number)
    assert heard == [signal.SIGUSR1] and early_signals.take() == []
