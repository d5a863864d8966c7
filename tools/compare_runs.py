"""Bitwise comparison of two runs: find the first step, state or tensor that differs.

    python tools/compare_runs.py RUN_A RUN_B [--assert-equal] [--by-root]

Compared in this order:

- the metrics step by step (the last attempt of each step);
- the root of the whole state at every step where both have one (metrics, `state_roots.jsonl`, and
  the checkpoints' manifests, which also name the tensors);
- every tensor of the newest checkpoint that both have.

Without --assert-equal only common steps and checkpoints count; with it, both runs must also have
the same steps and end at the same checkpoint. With --by-root the roots alone decide: no losses and
tensors are read, so runs of different layouts and checkpoints of any size compare in a moment.
Shards are read with NumPy alone; each header has its offsets in the global tensor.

Exit codes: 0 equal; 1 different; 2 a usage error or a damaged run.

Alternatives considered:
- Tolerances: two runs with one record are the same bits. For others the distance is printed.
"""

import json
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from command_line import Parser, command

from k2train.checkpoint.manifest import is_thinned, list_checkpoints, read_manifest
from k2train.errors import EXIT_DONE, CheckpointError, RunError
from k2train.record.events import Entry
from k2train.record.jsonl import read_lines
from k2train.record.ledger import checked_entries, run_notes
from k2train.record.metrics import latest, latest_roots
from k2train.state_digest import short_digests
from k2train.text import counted

Array = npt.NDArray[Any]
EXIT_DIFFERENT = 1
COMPARED = ("chunk", "consumed_tokens", "loss", "grad_norm", "lr", "applied")
# NumPy has no bfloat16; its bits are compared as integers.
DTYPES = {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}
SHOWN = 5


def shards_of(file: Path) -> Iterator[tuple[str, list[int], Array]]:
    """Yield (name, offsets in the global tensor, values) of each tensor in a safetensors shard."""
    content = np.memmap(file, dtype=np.uint8, mode="r")
    (length,) = struct.unpack("<Q", content[:8].tobytes())
    header = json.loads(content[8 : 8 + length].tobytes())
    offsets = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
    for name, facts in header.items():
        start, stop = (8 + length + offset for offset in facts["data_offsets"])
        values = content[start:stop].view(DTYPES[facts["dtype"]]).reshape(facts["shape"])
        yield name, offsets[name]["saved_offsets"], values


def tensors_of(checkpoint: Path, folder: str) -> dict[str, Array]:
    """Assemble whole tensors by global name from all shards of `model` or `optimizer`.

    Raises CheckpointError when the shards do not cover a tensor.
    """
    shapes = read_manifest(checkpoint).shapes(folder)

    whole: dict[str, Array] = {}
    filled = dict.fromkeys(shapes, 0)
    for file in sorted((checkpoint / folder).glob("*.safetensors")):
        for name, offsets, values in shards_of(file):
            into = whole.setdefault(name, np.zeros(shapes[name], dtype=values.dtype))
            into[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = (
                values
            )
            filled[name] += values.size

    for name, shape in shapes.items():
        if filled[name] != int(np.prod(shape)):
            raise CheckpointError(
                f"{checkpoint}: {name} has {filled[name]} of {int(np.prod(shape))} values"
            )
    return whole


def metric_differences(a: Path, b: Path, strict: bool) -> list[str]:
    """First step at which a compared metric differs, and steps that only one run has.

    Raises RunError when the runs have no step in common.
    """
    rows = [{record.step: record for record in latest(run / "metrics.jsonl")} for run in (a, b)]

    found = []
    # NaN differs from itself, but two NaN losses are equal here.
    for step in sorted(set(rows[0]) & set(rows[1])):
        pairs = [(key, *(getattr(of_run[step], key) for of_run in rows)) for key in COMPARED]
        ids = [of_run[step].ids for of_run in rows]
        # Older versions recorded none.
        if None not in ids:
            pairs.insert(0, ("ids", *ids))
        different = [
            f"{key} {x!r} and {y!r}" for key, x, y in pairs if x != y and not (x != x and y != y)
        ]
        if different:
            found.append(f"step {step} is the first that differs: {'; '.join(different)}")
            break

    only = sorted(set(rows[0]) ^ set(rows[1]))
    if only and strict:
        found.append(f"{counted(len(only), 'step')} are in one run only, the first is {only[0]}")

    if not set(rows[0]) & set(rows[1]):
        raise RunError(f"{a} and {b} have no step in common")
    return found


def tensor_differences(a: Path, b: Path) -> list[str]:
    """Every tensor of two checkpoints whose bits differ, with the number of values and distance."""
    # A thinned checkpoint has lost its optimizer states.
    folders = ["model"] if is_thinned(a) or is_thinned(b) else ["model", "optimizer"]
    found = []
    for folder in folders:
        left, right = tensors_of(a, folder), tensors_of(b, folder)
        found += [f"{name} is in one run only" for name in sorted(set(left) ^ set(right))]
        for name in (name for name in left if name in right):
            x, y = left[name], right[name]
            if x.shape != y.shape or x.dtype != y.dtype:
                found.append(f"{name}: {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}")
            elif x.tobytes() != y.tobytes():
                apart = (
                    ""
                    if x.dtype.kind == "u"
                    else f", at most {np.abs(x.astype('f8') - y.astype('f8')).max():.3g} apart"
                )
                found.append(f"{name}: {int((x != y).sum())} of {x.size} values differ{apart}")
    return found


@dataclass
class State:
    """A run's record of its state after one step: root by source, and short tensor digests."""

    roots: dict[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """Root of the first source."""
        return next(iter(self.roots.values()))


def states_of(run: Path) -> dict[int, State]:
    """States of a run by step, from metrics, `state_roots.jsonl` and checkpoints.

    Older runs have none.
    """
    found: dict[int, State] = {}

    def add(step: int, source: str, root: str, tensors: Mapping[str, str] | None) -> None:
        state = found.setdefault(step, State())
        state.roots[source] = root
        state.tensors = tensors or state.tensors

    if (path := run / "metrics.jsonl").exists():
        for step in latest(path):
            if step.state_root is not None:
                add(step.step, path.name, step.state_root, None)

    if (path := run / "state_roots.jsonl").exists():
        for record in filter(lambda record: record.root, latest_roots(path)):
            add(record.step, path.name, record.root, record.tensors)

    for checkpoint in list_checkpoints(run / "checkpoints"):
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError:
            # Without a record. If this checkpoint must be compared, its reader raises the same.
            continue
        if state := manifest.state:
            add(manifest.step, checkpoint.name, state.root, short_digests(state.digests))
    return found


def root_differences(a: Path, b: Path) -> tuple[list[str], int]:
    """Compare the recorded roots of two runs.

    Returns the differences and the number of steps with a root in both. Differences are the first
    step whose state differs, with its tensors, and contradictory roots within one run.
    """
    states = [states_of(run) for run in (a, b)]
    found = []

    for run, of_run in zip((a, b), states, strict=True):
        for step, state in sorted(of_run.items()):
            if len(set(state.roots.values())) > 1:
                recorded = " and ".join(
                    f"{root[:16]} in {source}" for source, root in state.roots.items()
                )
                found.append(f"{run} contradicts itself: the root of step {step} is {recorded}")

    # Only steps that both recorded can be compared; roots need not be of every step.
    common = sorted(set(states[0]) & set(states[1]))
    different = [step for step in common if states[0][step].root != states[1][step].root]
    if different:
        first = different[0]
        roots = " and ".join(of_run[first].root[:16] for of_run in states)
        equal = [step for step in common if step < first]
        since = (
            f"last equal at step {equal[-1]}" if equal else "nothing earlier was recorded by both"
        )
        line = f"step {first} is the first whose state differs: root {roots}; {since}"
        named = next(
            (step for step in different if all(of_run[step].tensors for of_run in states)), None
        )

        if named is not None:
            where = "" if named == first else f"at step {named} "
            line += f"; {where}{_tensors_apart(states[0][named].tensors, states[1][named].tensors)}"
        found.append(line)
    return found, len(common)


def _tensors_apart(a: Mapping[str, str], b: Mapping[str, str]) -> str:
    names = [name for name in a if name in b and a[name] != b[name]]
    names += [f"{name} (in one run only)" for name in sorted(set(a) ^ set(b))]
    if not names:
        return "no tensor differs, so the number of updates applied does"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"{len(names)} of {len(set(a) | set(b))} tensors differ: {', '.join(names[:SHOWN])}{more}"
    )


def checkpoint_differences(a: Path, b: Path, strict: bool, read: bool) -> tuple[list[str], int]:
    """Compare the newest common checkpoint, its tensors only if `read`.

    Returns the differences and the number of common checkpoints.
    """
    names = [[path.name for path in list_checkpoints(run / "checkpoints")] for run in (a, b)]
    common = [name for name in names[0] if name in names[1]]
    found = []

    if strict and names[0][-1:] != names[1][-1:]:
        newest = [(of_run or ["none"])[-1] for of_run in names]
        found.append(f"the newest checkpoints are {newest[0]} and {newest[1]}")

    if not common:
        return found, 0

    left, right = (run / "checkpoints" / common[-1] for run in (a, b))
    steps = [(m.step, m.adam_steps) for m in (read_manifest(left), read_manifest(right))]
    if steps[0] != steps[1]:
        found.append(f"{common[-1]}: (step, adam_steps) is {steps[0]} and {steps[1]}")
    tensors = tensor_differences(left, right) if read else []

    found += [f"{common[-1]}: {line}" for line in tensors[:SHOWN]]
    if len(tensors) > SHOWN:
        found.append(f"{common[-1]}: {len(tensors) - SHOWN} more tensors differ")
    return found, len(common)


def differences(a: Path, b: Path, strict: bool, by_root: bool = False) -> list[str]:
    """List everything that differs between two runs, one line each; empty when they are equal.

    Raises RunError or CheckpointError when a run cannot be read or they have nothing in common.
    """
    found = [] if by_root else metric_differences(a, b, strict)
    roots, common_roots = root_differences(a, b)
    checkpoints, common_checkpoints = checkpoint_differences(a, b, strict, read=not by_root)

    if by_root and not common_roots:
        raise RunError(
            f"{a} and {b} have no step of which both recorded the root; see audit.root_every_steps"
        )
    if not common_checkpoints and not common_roots:
        raise RunError(f"{a} and {b} have no checkpoint in common")
    return found + roots + checkpoints


def what_was_compared(a: Path, b: Path, by_root: bool) -> str:
    """Say how much was compared, and how much could not be, since only one run has it."""
    roots = len(set(states_of(a)) & set(states_of(b)))
    parts = [f"the roots of {counted(roots, 'state')}"] if roots else []
    rest = ""
    if not by_root:
        steps = [{record.step for record in latest(run / "metrics.jsonl")} for run in (a, b)]
        names = [[path.name for path in list_checkpoints(run / "checkpoints")] for run in (a, b)]
        common = [name for name in names[0] if name in names[1]]
        parts = [counted(len(steps[0] & steps[1]), "step"), *parts, *common[-1:]]
        if only := sorted(steps[0] ^ steps[1]):
            rest = (
                f"; {counted(len(only), 'step')} of one run alone, the first is {only[0]}: "
                "--assert-equal asks for the same steps"
            )
    return ", ".join(parts) + rest


def _notes(ledger: Path) -> list[str]:
    """Say what to know of a run; a ledger that is missing or damaged is no difference."""
    if not ledger.exists():
        return []
    entries = (entry for _, entry in checked_entries(ledger, *read_lines(ledger)))
    return run_notes(entry for entry in entries if isinstance(entry, Entry))


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="compare_runs.py", description="Compare two runs bit for bit.")
    parser.add_argument("a", type=Path, metavar="RUN_A")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument(
        "--assert-equal",
        action="store_true",
        help="require also the same steps and last checkpoint",
    )
    parser.add_argument(
        "--by-root", action="store_true", help="compare the roots of the state and nothing else"
    )
    options = parser.parse_args(arguments)

    found = differences(options.a, options.b, options.assert_equal, options.by_root)
    for run in (options.a, options.b):
        for line in _notes(run / "ledger.jsonl"):
            print(f"note: {run}: {line}")

    how = "by the roots of their states" if options.by_root else "bit for bit"
    if found:
        print("\n".join(found))
    else:
        compared = what_was_compared(options.a, options.b, options.by_root)
        print(f"{options.a} and {options.b} are equal, {how}: {compared}")
    return EXIT_DIFFERENT if found else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
