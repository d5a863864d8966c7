"""Training command line: `python -m k2train.train CONFIG.yaml [dotted.key=value ...]`.

- Runs alone or under torchrun (`python -m k2train.launch`).
- Config and data mistakes are reported before torch is imported, once and not once per rank.
- `--help` and such mistakes answer within a second. Everything that needs torch is behind the
  project's one deferred import, `k2train.train.trainer`.
- Exit codes: 0 done; 2 a mistake in config, data or usage; 75 stopped on request after saving,
  run the same command again; 1 any other failure.
"""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence

from k2train import fault_injection, retry
from k2train.command_line import Parser, readers_may_leave
from k2train.config.load import Config, explain, load_config
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UnavailableError, UserError
from k2train.guard.stop_signals import StopRequest
from k2train.launch.environment import Launch, read_faults, read_launch, write_status
from k2train.record.system_info import job_facts, slurm_job_ended
from k2train.run_lock.lock import RunLock
from k2train.train.preflight import Start, prepare_start, run_directory

OTHER_RANKS_DELAY_SECONDS = 5.0
"""Other ranks report an error this late, so that the launcher can end them first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parse(arguments)
    launch = Launch(0, 1, 0, launched=False)
    code = EXIT_FAILED

    try:
        launch = read_launch()
        write_status(launch.rank, None)
        if options.explain:
            with readers_may_leave():
                print(explain(options.config, options.overrides))
            _explain_faults(load_config(options.config, options.overrides))
            code = EXIT_DONE
        else:
            code = _train(options.config, options.overrides, launch)
    except UserError as error:
        code = report_error(error, launch)
    except UnavailableError as error:
        report_error(error, launch)
        code = EXIT_FAILED
    except OSError as error:
        # Any other call that the environment refused, too, is worth another start.
        if not retry.is_passing(error):
            raise
        if error.filename is None:
            traceback.print_exc()
        report_error(UnavailableError(f"{error.filename or 'a file'}: {error.strerror}"), launch)
        code = EXIT_FAILED
    finally:
        write_status(launch.rank, code)
    return code


def report_error(error: UserError | UnavailableError, launch: Launch) -> int:
    """Print an error on stderr and return the exit code of a user's.

    Rank 0 prints at once. Another rank prints only if the launcher has not ended it by then.
    """
    if launch.rank != 0:
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
        "75 stopped on request after saving; 1 any other failure.",
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
    return parser.parse_intermixed_args(arguments)


def _explain_faults(config: Config) -> None:
    """Say that faults are armed. Raises RunError, as a start does, where nobody permitted them."""
    fault_injection.require_permission(read_faults(), config.run.allow)
    if faults := fault_injection.parse(read_faults()):
        armed = "; ".join(fault.text for fault in faults)
        print(f"k2train: faults on purpose, permitted by run.allow: {armed}", file=sys.stderr)


def _train(path: str, overrides: Sequence[str], launch: Launch) -> int:
    config = load_config(path, overrides)
    retry.tell_only(launch.local_rank == 0)
    fault_injection.require_permission(read_faults(), config.run.allow)
    fault_injection.arm(read_faults(), launch.rank)
    lock = RunLock(run_directory(config), job_facts(), slurm_job_ended)

    # Only rank 0 locks the run directory; one rank per machine hashes the data.
    if launch.rank != 0:
        start = prepare_start(config, launch.world_size, verify=launch.local_rank == 0)
        return _run(launch, start, None)

    lock.acquire()
    try:
        fault_injection.point("start.locked")
        start = prepare_start(config, launch.world_size, verify=True)
        return _run(launch, start, lock)
    finally:
        lock.release(discard_if_empty=True)


def _run(launch: Launch, start: Start, lock: RunLock | None) -> int:
    stop = StopRequest(announce=launch.rank == 0)
    try:
        # Under a launcher the handlers are installed once the ranks have met. Until then a rank
        # that waits for a missing one must die of a signal, and there is nothing to save yet.
        if not launch.launched:
            stop.install()
        return int(
            importlib.import_module("k2train.train.trainer").train(launch, start, stop, lock)
        )
    finally:
        stop.restore()


if __name__ == "__main__":
    sys.exit(main())
