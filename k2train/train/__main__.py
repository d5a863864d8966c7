"""Training command line: `python -m k2train.train CONFIG.yaml [dotted.key=value ...]`.

- Runs alone or under torchrun (`python -m k2train.launch`).
- Config and data mistakes are reported before torch is imported, once and not once per rank.
- `--help` and such mistakes answer within a second. Everything that needs torch is behind the
  project's one deferred import, `k2train.train.run`.
- Exit codes: 0 done; 2 a mistake in config, data or usage; 75 stopped on request after saving,
  run the same command again; 130 a second Ctrl-C; 1 any other failure.
- A signal during a start ends it at once, with 75: there is nothing to save yet. A signal by which
  a launcher ends what is left of a failed start gives 1, and of a refused one 2.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from k2train import early_signals, fault_injection, retry
from k2train.command_line import (
    Parser,
    locale_problem,
    readers_may_leave,
    show_any_character,
)
from k2train.config.load import explain, load_config
from k2train.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USAGE,
    AnotherRefusedError,
    UnavailableError,
    UserError,
)
from k2train.guard.control_files import STOP_FILE, ControlFiles
from k2train.guard.stop_signals import StopAsked, StopRequest
from k2train.launch.environment import (
    ANOTHER_FAILED,
    Launch,
    another_has_refused,
    means_to_save,
    read_faults,
    read_launch,
    was_asked_to_stop,
    write_status,
)
from k2train.launch.environment_defaults import quiet_profiler, set_environment_defaults
from k2train.launch.limits import require_open_files
from k2train.plan.connections import connections
from k2train.record.system_info import job_facts, slurm_job_ended
from k2train.retry import exists_retried
from k2train.run_lock.lock import RunLock
from k2train.text import counted
from k2train.train.held_out_sets import held_out_sets
from k2train.train.machine import has_accelerator
from k2train.train.preflight import Start, check_data, prepare_start
from k2train.train.recorded_choices import run_directory
from k2train.train.start_notes import bf16_note, evaluation_note

CONTINUE = "run the same command again to continue"
OTHER_RANKS_DELAY_SECONDS = 5.0
"""Other ranks report an error this late, so that the launcher can end them first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    show_any_character()
    with readers_may_leave():
        code, at_once = _outcome(_parse(arguments))
    if at_once:
        # Threads may wait for other ranks, or abort at a usual exit because those are gone.
        os._exit(code)
    return code


def _outcome(options: argparse.Namespace) -> tuple[int, bool]:
    """Run a command; return the exit code, and whether to leave without the usual exit."""
    launch = Launch(0, 1, 0, launched=False)
    code, at_once, reason = EXIT_FAILED, False, ""
    stop = StopRequest()

    try:
        if not options.explain:
            stop.install()
        elif early_signals.take():
            raise KeyboardInterrupt
        # What a signal means depends on it.
        launch = read_launch()
        write_status(launch.rank, None)
        if options.explain:
            _explain(options.config, options.overrides)
            code = EXIT_DONE
        else:
            stop.begin_start()
            code = _train(options.config, options.overrides, launch, stop)
    except UserError as error:
        stop.restore()
        code, at_once = report_error(error, launch), launch.world_size > 1
    except AnotherRefusedError:
        code, at_once = EXIT_USAGE, True
    except UnicodeEncodeError as error:
        stop.restore()
        if not (problem := locale_problem(error)):
            raise
        code, at_once = report_error(UserError(problem), launch), launch.world_size > 1
    except UnavailableError as error:
        stop.restore()
        report_error(error, launch)
        code = EXIT_FAILED
    except StopAsked as asked:
        code, at_once, reason = _ended_start(asked, launch), launch.world_size > 1, str(asked)
    except KeyboardInterrupt as interrupt:
        code, at_once = EXIT_INTERRUPTED, True
        if launch.rank == 0:
            _say(f"{interrupt or 'interrupted'}; {CONTINUE}")
    except OSError as error:
        stop.restore()
        # Any other call that the environment refused, too, is worth another start.
        if not retry.is_passing(error):
            raise
        if error.filename is None:
            traceback.print_exc()
        report_error(UnavailableError(f"{error.filename or 'a file'}: {error.strerror}"), launch)
        code = EXIT_FAILED
    finally:
        write_status(launch.rank, code, reason=reason)
        stop.restore()
    return code, at_once


def _ended_start(asked: StopAsked, launch: Launch) -> int:
    """Say on rank 0 why a signal or a STOP file ended the start; return the exit code.

    A rank that a launcher ends because another one has refused the start ends like that one, which
    says why.
    """
    requested = was_asked_to_stop(str(asked))
    if not requested and another_has_refused():
        return EXIT_USAGE
    if launch.rank == 0:
        _say(
            f"stopped on request ({asked}) before the first step; {CONTINUE}"
            if requested
            else f"{asked} before the first step: {ANOTHER_FAILED}"
        )
    return EXIT_STOPPED if requested else EXIT_FAILED


def _say(text: str) -> None:
    print(f"k2train: {text}", file=sys.stderr, flush=True)


def report_error(error: UserError | UnavailableError, launch: Launch) -> int:
    """Print an error on stderr and return the exit code of a user's.

    Rank 0 prints at once. Another rank prints only if the launcher has not ended it by then; that
    launcher is told before.
    """
    if launch.rank != 0:
        write_status(launch.rank, EXIT_USAGE if isinstance(error, UserError) else EXIT_FAILED)
        time.sleep(OTHER_RANKS_DELAY_SECONDS)
    prefix = f"rank {launch.rank}: " if launch.rank else ""
    print(
        "\n".join(f"k2train: {prefix}{line}" for line in str(error).splitlines()),
        file=sys.stderr,
        flush=True,
    )
    return EXIT_USAGE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m k2train.train",
        description="Train a model from one YAML config, alone or under torchrun.",
        epilog="Exit codes: 0 done; 2 a mistake in config, data or usage; "
        "75 stopped on request after saving; 130 a second Ctrl-C; 1 any other failure.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="dotted.key=value",
        help="values that replace those of the file; the last one wins",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print every resolved value and where it was set, then exit",
    )
    lines = parser.add_mutually_exclusive_group()
    lines.add_argument(
        "--quiet",
        dest="detail",
        action="store_const",
        const=["log.detail=quiet"],
        default=[],
        help="no step lines and no progress, as log.detail=quiet",
    )
    lines.add_argument(
        "--verbose",
        dest="detail",
        action="store_const",
        const=["log.detail=verbose"],
        help="a line of every step, with all that is known of it, as log.detail=verbose",
    )
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [*options.overrides, *options.detail]
    return options


def _explain(path: str, overrides: Sequence[str]) -> None:
    """Print every value and where it was set, and what a start would say of data and settings.

    Says that faults are armed. Raises RunError, as a start does, where nobody permitted them.
    Raises DataError or ConfigError where the data are there and do not fit.
    """
    print(explain(path, overrides))
    config = load_config(path, overrides)
    notes = [bf16_note(config)]
    # A config is often explained on a machine that does not have its data.
    if exists_retried(Path(config.data.manifest)):
        manifest, order = check_data(config)
        print(
            f"# {manifest.path}: {counted(len(order.names), 'chunk')}, "
            f"{counted(order.total_steps, 'step')}"
        )
        notes.append(evaluation_note(config, held_out_sets(config, manifest), order))
    else:
        print(f"# {config.data.manifest}: not there, so nothing is said of the data")
    for note in filter(None, notes):
        _say(note)
    fault_injection.require_permission(read_faults(), config.run.allow)
    if faults := fault_injection.parse(read_faults()):
        armed = "; ".join(fault.text for fault in faults)
        _say(f"faults on purpose, permitted by run.allow: {armed}")


def _train(path: str, overrides: Sequence[str], launch: Launch, stop: StopRequest) -> int:
    # One rank confirms a signal.
    stop.announce, stop.means_to_save = launch.rank == 0, means_to_save
    config = load_config(path, overrides)
    retry.tell_only(launch.local_rank == 0)
    fault_injection.require_permission(read_faults(), config.run.allow)
    fault_injection.arm(read_faults(), launch.rank)
    lock = RunLock(run_directory(config), job_facts(), slurm_job_ended)

    # Only rank 0 locks the run directory; one rank per machine hashes the data.
    if launch.rank != 0:
        start = prepare_start(config, launch.world_size, verify=launch.local_rank == 0)
        return _run(launch, start, stop, None)

    files = ControlFiles(lock.directory)
    try:
        # A signal meanwhile would leave a lease that nobody releases.
        with stop.held():
            lock.acquire()
        # One from earlier refuses the start; one that comes from here on ends it.
        files.refuse_start()
        files.watch_start(lambda: stop.starting, stop.ask)
        fault_injection.point("start.locked")
        start = prepare_start(config, launch.world_size, verify=True)
        return _run(launch, start, stop, lock)
    except StopAsked as asked:
        if str(asked) == STOP_FILE:
            files.done("STOP")
        raise
    finally:
        lock.release(discard_if_empty=True)


def _run(launch: Launch, start: Start, stop: StopRequest, lock: RunLock | None) -> int:
    device_type = "cuda" if has_accelerator() else "cpu"
    require_open_files(connections(start.layout, device_type).files, launch.world_size)
    # Before torch, which reads them once.
    deterministic = start.setup.config.kernels.deterministic
    set_environment_defaults(launch.world_size, deterministic)
    if start.setup.config.profile.steps is not None:
        quiet_profiler()
    # An error raised in the midst of torch's import aborts the process.
    with stop.held():
        trainer = importlib.import_module("k2train.train.run")
    return int(trainer.train(launch, start, stop, lock))


if __name__ == "__main__":
    sys.exit(main())
