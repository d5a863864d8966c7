"""The part of tools/spike.py that needs torch: the batch of a spike again with an older state.

    python tools/spike_parts/batch_again.py RUN EVENT [--data DATA] [--json]

Exit codes: 0 done; 2 there is no such spike, or no checkpoint before it.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from command_line import Parser, command

from k2train.errors import EXIT_DONE
from k2train.launch.environment import Launch
from k2train.parallel.grid import start_process_group, stop_process_group
from k2train.train.batch_again import bisect_spike
from k2train.train.bundle_read import Bundle, find_bundle


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="batch_again.py", description="Do the batch of a spike with an older state."
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("event", metavar="EVENT")
    parser.add_argument("--data", type=Path, metavar="DATA")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    bundle = find_bundle(given.run, given.event)
    start_process_group(Launch(0, 1, 0, launched=False), torch.device("cpu"))
    try:
        lines = list(lines_of(given.run, bundle, given.data, given.json))
    finally:
        stop_process_group()
    print("\n".join(lines))
    return EXIT_DONE


def lines_of(run: Path, bundle: Bundle, data: Path | None, as_json: bool) -> Iterator[str]:
    found = bisect_spike(run, bundle, data)
    verdict = "data alone" if found.is_data_alone else "data with this state"
    if as_json:
        yield json.dumps({"verdict": verdict, **asdict(found)})
        return

    yield (
        f"batch of step {bundle.step} ({bundle.event['chunk']} rows {bundle.event['rows'][0]}-"
        f"{bundle.event['rows'][1] - 1}) with {found.checkpoint}, step {found.checkpoint_step}"
    )
    losses = [one.loss for one in found.controls]
    norms = [one.grad_norm for one in found.controls]
    yield (
        f"loss {found.batch.loss:.4f}, gradient norm {found.batch.grad_norm:.4g}; the "
        f"{len(losses)} steps before it: median {median(losses):.4f} ({min(losses):.4f} to "
        f"{max(losses):.4f}) and {median(norms):.4g}"
    )
    for jump in found.jumps:
        yield (
            f"{jump.channel}: {jump.older:+.4f} {jump.unit} above the usual, in the run "
            f"{jump.run:+.4f}: {100 * jump.share:.0f}% of it"
        )
    yield (
        f"{verdict}: the older state finds this batch as bad as the run did"
        if found.is_data_alone
        else f"{verdict}: the older state computes this batch like any other"
    )


if __name__ == "__main__":
    sys.exit(main())
