"""Launcher: torchrun with the exit code of its processes, signal forwarding and restarts.

    python -m k2train.launch [torchrun options] -m k2train.train CONFIG.yaml

- torchrun alone always exits with 1, under two screens of traceback. That includes a stop on
  request after saving (75) and a rejected config (2). A batch script cannot tell them apart.
- Signals are forwarded to the processes, which get all the time they need to save
  (`launch/supervisor.py`).
- The processes of one machine meet in a file and talk over loopback (`stay_inside`). Those of
  several machines meet at a port, which is for a trusted network only (docs/security.md).
- Processes get the variables that must be set before torch starts (`environment_defaults`).
- One option is added, all others are torchrun's:

      --restarts N    on one machine: restart after a crash (exit code 1), at most N times,
                      after 1, 2, 4 ... 60 s

- The process that ended first decides (`status.first_end`): what the others do once they were told
  to end, or have no peer any more, is a consequence.
- A mistake (2) and a stop on request (75) are never restarted. A run without progress ends the
  restarts by itself with exit code 2 (`run.max_fruitless_starts`).

Alternatives considered:
- torchrun's own --max-restarts: it restarts whatever the exit code was.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import k2train.early_signals  # noqa: F401
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.run import get_args_parser, run

from k2train.command_line import Parser, command
from k2train.commands import COMMANDS, started_as
from k2train.config.load import load_config
from k2train.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USAGE,
    UnavailableError,
)
from k2train.fault_injection import require_permission
from k2train.launch.environment import (
    keep_sockets_inside,
    read_faults,
    refuse_repeated_start,
    request_statuses,
)
from k2train.launch.environment_defaults import set_environment_defaults
from k2train.launch.limits import raise_open_files
from k2train.launch.ports import taken_by
from k2train.launch.rendezvous import BACKEND, meeting_port, read_states_only, register
from k2train.launch.status import ProcessStatus, first_end
from k2train.launch.supervisor import Supervisor
from k2train.launch.torchrun_close import looking_before_others_end

KILLED_BY_TORCHRUN = -15
"""Exit code of a process that torchrun ended because another one had failed."""
MAX_BACKOFF_SECONDS = 60.0
"""Longest wait before a restart."""
BACKOFF_RESET_SECONDS = 600.0
"""A start that ran this long resets the wait before the next restart."""
TORCHRUN_SIGNALS = ["--signals-to-handle", "SIGQUIT"]


@command
def main(arguments: Sequence[str]) -> int:
    """Run torchrun, restart it after crashes if asked to, and return its processes' exit code.

    The exit code is 1 when the processes do not agree on another one.
    """
    options = parse(arguments)
    # Before anything that may take time: it hears the signals.
    with Supervisor(_log, alone=is_alone(options)) as supervisor:
        if is_alone(options) and trains(options):
            refuse_repeated_start(launcher=True)
        refuse_taken_port(options)
        refuse_faults(options)
        # torchrun's own lines, from here on: what was read before may have had to wait, and says
        # so.
        logging.disable(logging.ERROR)
        set_environment_defaults()
        # For the store that this process may serve, and for the processes it starts.
        raise_open_files()
        return start_with_restarts(
            lambda: _start(options, supervisor), options.restarts, supervisor
        )


def start_with_restarts(start: Callable[[], int], restarts: int, supervisor: Supervisor) -> int:
    """Call `start` until it does not crash, a signal came, or the restarts are used up.

    Returns the exit code of the last start.
    """
    wait_seconds = 1.0

    for number in range(1, restarts + 2):
        began = time.monotonic()
        code = start()
        if code != EXIT_FAILED or supervisor.first_signal or number > restarts:
            break

        # Exponential backoff, reset after a long start.
        if time.monotonic() - began > BACKOFF_RESET_SECONDS:
            wait_seconds = 1.0
        _log(f"start {number + 1} of {restarts + 1} follows in {wait_seconds:g} s")
        if supervisor.wait(wait_seconds):
            _log(f"{supervisor.first_signal}: not started again")
            break
        wait_seconds = min(2 * wait_seconds, MAX_BACKOFF_SECONDS)
    return code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse torchrun's options and ours; exits with one line on an error."""
    theirs = get_args_parser()
    train = "train" if started_as() else "-m k2train.train"
    start = started_as() or "python -m k2train.launch"
    parser = Parser(
        prog="python -m k2train.launch",
        description="Start the processes of a run on this machine, hand signals on to them, and "
        "end with their exit code. All options but --restarts are torchrun's.",
        epilog="Exit codes: 0 done; 2 a mistake in config, data or usage; 75 stopped on request "
        "after saving; 130 a second Ctrl-C; 1 any other failure. "
        f"Example: {start} --nproc-per-node 4 {train} CONFIG.yaml",
        parents=[theirs],
        add_help=False,
    )
    parser.add_argument(
        "--restarts",
        type=_count,
        default=0,
        metavar="N",
        help="On one machine: restart after a crash (exit code 1), at most N times.",
    )

    for action in parser._actions:
        if action.dest == "training_script":
            action.help = (
                "The program of each process: -m k2train.train, the name of another k2train "
                "command, or a script; its arguments follow."
            )

    if not arguments:
        parser.error(f"nothing to start; give {train} CONFIG.yaml")
    options = parser.parse_args([*TORCHRUN_SIGNALS, *arguments])

    _name_program(options)
    script = options.training_script
    if script.endswith((".yaml", ".yml")):
        # Python would run it as a program, in every process.
        parser.error(f"{script} is a config, not a program; put {train} before it")
    if not (options.module or options.no_python or options.run_path or Path(script).exists()):
        parser.error(f"there is no file {script}; a module needs -m before it")

    # With several nodes each launcher would restart on its own.
    if options.restarts and options.nnodes not in ("1", "1:1"):
        parser.error(
            f"--restarts is for one machine, --nnodes is {options.nnodes}; "
            "leave it to the batch system to start all nodes again"
        )
    return options


def _name_program(options: argparse.Namespace) -> None:
    """Turn `train CONFIG.yaml` and `-m k2train train CONFIG.yaml` into the module they mean."""
    given = options.training_script_args
    if options.module and options.training_script == "k2train" and given:
        name, given = given[0], given[1:]
    elif not (options.module or options.no_python or Path(options.training_script).exists()):
        name = options.training_script
    else:
        return
    if name not in COMMANDS:
        return

    options.module, program = True, COMMANDS[name].program
    module, given = (program, given) if "." in program else ("k2train", [name, *given])
    options.training_script, options.training_script_args = module, list(given)


def refuse_faults(options: argparse.Namespace) -> None:
    """Refuse faults that the config of a training run does not permit, before a process starts.

    Raises UserError. Every process checks again: another machine has another environment.
    """
    given = [str(argument) for argument in options.training_script_args]
    if not (read_faults() and trains(options) and given) or any(
        one.startswith("-") for one in given
    ):
        return
    require_permission(read_faults(), load_config(given[0], given[1:]).run.allow)


def refuse_taken_port(options: argparse.Namespace) -> None:
    """Raise UnavailableError where another program holds the port at which the nodes meet."""
    if is_alone(options):
        return
    port = meeting_port(options.rdzv_backend, options.rdzv_endpoint, options.rdzv_conf)
    if port is not None and (holder := taken_by(port, os.getpid())):
        raise UnavailableError(
            f"port {port} of --rdzv-endpoint {options.rdzv_endpoint} is taken by {holder}; "
            "give all nodes another port"
        )


def trains(options: argparse.Namespace) -> bool:
    """Return whether the processes are those of a training run."""
    return bool(options.module and options.training_script == "k2train.train")


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a count, got {text!r}")
    return int(text)


def _start(options: argparse.Namespace, supervisor: Supervisor) -> int:
    with TemporaryDirectory(prefix="k2train-launch-") as name, supervisor.watching(Path(name)):
        request_statuses(Path(name))
        with looking_before_others_end(supervisor.ends):
            ended = _run(options, Path(name))

        # Whatever became of the others: a mistake stays one, and so does a second Ctrl-C.
        first = first_end(supervisor.ends().values())
        if first is not None and first.code in (EXIT_USAGE, EXIT_INTERRUPTED):
            return first.code
        if isinstance(ended, SignalException):
            return exit_code_after_signal(supervisor.statuses())
        if isinstance(ended, Exception):
            # Another node's store may be gone because that node is done. What counts is how the
            # processes of this node have ended.
            return exit_code_after_error(supervisor.statuses(), ended)
        failures = ended
        if supervisor.first_signal and not set(failures.values()) <= {EXIT_USAGE, EXIT_STOPPED}:
            return exit_code_after_signal(supervisor.statuses())

        own = {
            rank: code for rank, code in failures.items() if rank not in supervisor.killed
        } or failures
        return exit_code_of(own) if failures else EXIT_DONE


def _run(options: argparse.Namespace, folder: Path) -> dict[int, int] | Exception:
    """Run torchrun to its end: the exit codes of its failed processes, or its own error.

    `folder` is that of this start, which does not stay.
    """
    # A copy, since torchrun adds the address of this start to the options.
    given = argparse.Namespace(**vars(options))
    if given.log_dir is None and (given.redirects, given.tee) == ("0", "0"):
        # Else torchrun makes a folder in the temporary one at every start, and leaves it there.
        given.log_dir = str(folder / "torchrun")
    read_states_only()
    try:
        if is_alone(given):
            stay_inside(given)
        record(run)(given)
    except ChildFailedError as failed:
        return {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
    except Exception as error:
        return error
    return {}


def is_alone(options: argparse.Namespace) -> bool:
    """Return whether all processes of the job are on this machine, and nobody named a meeting
    place for others.
    """
    return options.nnodes in ("1", "1:1") and (options.standalone or not options.rdzv_endpoint)


def stay_inside(options: argparse.Namespace) -> None:
    """Let torchrun meet nobody, and the processes of one machine in a file of this user's.

    torchrun's store listens on every network interface, without a password: whoever reaches the
    port can end the job or join it.
    """
    register()
    options.standalone = False
    options.rdzv_backend, options.rdzv_id = BACKEND, uuid4().hex
    options.rdzv_endpoint, options.rdzv_conf = "memory", ""
    # Without an address torchrun would look up this machine's name in the network.
    options.local_addr = options.local_addr or "127.0.0.1"
    keep_sockets_inside()


def exit_code_after_signal(statuses: dict[int, ProcessStatus]) -> int:
    """Return the exit code after a stop request.

    It is 75 only if every process that started has saved or was done.
    """
    codes = {status.code for status in statuses.values()}
    unsaved = [
        rank for rank, status in statuses.items() if status.code not in (EXIT_STOPPED, EXIT_DONE)
    ]
    if codes and not unsaved:
        return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_DONE

    who = f"process {unsaved[0]} of {len(statuses)}" if unsaved else "every process"
    _log(f"asked to stop, and {who} ended before it had saved")
    return EXIT_FAILED


def exit_code_after_error(statuses: dict[int, ProcessStatus], error: Exception) -> int:
    """Return the exit code after torchrun itself failed.

    It is that of the processes if all of them ended by themselves, else 1.
    """
    codes = {status.code for status in statuses.values()}
    if codes and codes <= {EXIT_DONE, EXIT_STOPPED, EXIT_USAGE}:
        return (
            EXIT_USAGE if EXIT_USAGE in codes else max(code for code in codes if code is not None)
        )
    _log(f"the launcher failed: {type(error).__name__}: {' '.join(str(error).split())}")
    return EXIT_FAILED


def exit_code_of(codes: dict[int, int]) -> int:
    """Return the exit code of a job, given those of its failed processes.

    Prints processes that did not end cleanly on stderr.
    """

    # The exit code of a process that torchrun ended does not show the cause.
    own = {rank: code for rank, code in codes.items() if code != KILLED_BY_TORCHRUN} or codes
    if set(own.values()) <= {EXIT_USAGE, EXIT_STOPPED}:
        # A mistake outweighs a stop: a restart would not help.
        return min(own.values())

    for rank, code in own.items():
        if code not in (EXIT_USAGE, EXIT_STOPPED):
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            _log(f"process {rank} ended with {how}")
    return EXIT_FAILED


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
