"""Line of a training step: its parts in order, their units, and which go where space is short.

- Units: `tok/s` of all ranks; `s` of the step; `MFU` where the device's peak is known, else FLOP/s
  of one rank; `peak` the memory of rank 0's device, or of its process on a CPU.
- A part that is not known is left out.
"""

import math
import textwrap
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from k2train.record.metrics import StepRecord
from k2train.text import bytes_text

LEAST_IMPORTANT = ("device", "lr", "seconds", "chunk", "memory", "flops", "grad_norm", "speed")
"""Parts to leave out where a line does not fit, the first one first."""
SHORTER = {"grad_norm": ("grad_norm", "norm"), "memory": ("peak ", "")}
"""Words that a line can do without, before a part of it is left out: part -> (word, shorter)."""


@dataclass(frozen=True)
class StageFacts:
    """What the lines of a stage are about.

    - `total_steps` counts the whole stage; `chunk_ends` holds for each chunk the step after which
      it is consumed.
    - `rank_flops_per_token`: planned FLOPs of one rank for a token of the batch; 0 where unknown.
    - `device`: such as `cuda:0`; "" is left out.
    """

    name: str
    total_steps: int
    chunk_ends: Sequence[int]
    rank_flops_per_token: float = 0.0
    device: str = ""

    def chunk_of(self, step: int) -> int:
        """Number of the chunk, from 1, that a step reads."""
        # At the chunk's end, `step` is the last of its chunk, not the first of the next.
        return min(bisect_left(self.chunk_ends, step) + 1, len(self.chunk_ends))


def step_parts(record: StepRecord, stage: StageFacts, verbose: bool = False) -> dict[str, str]:
    """Return the parts of a step's line by name, in order."""
    step = record.step
    parts = {
        "chunk": f"chunk {stage.chunk_of(step)}/{len(stage.chunk_ends)}",
        "step": f"step {step}/{stage.total_steps}",
        "loss": f"loss {record.loss:.4f}",
        "grad_norm": f"grad_norm {three_digits(record.grad_norm)}",
        "lr": f"lr {record.lr:.3g}",
        "speed": f"{record.tokens_per_second:.0f} tok/s",
        "seconds": f"{record.seconds:.2f} s",
        "flops": _flops(record, stage),
        "memory": f"peak {bytes_text(record.peak_memory_bytes)}" * (record.peak_memory_bytes > 0),
        "device": stage.device and f"on {stage.device}",
    }
    if verbose:
        parts["update_norm"] = (
            "" if record.update_norm is None else f"update_norm {three_digits(record.update_norm)}"
        )
        losses = [f"{name} {loss:.4f}" for name, (_, loss) in (record.subsets or {}).items()]
        parts["subsets"] = f"by subset: {', '.join(losses)}" if losses else ""
    return {name: text for name, text in parts.items() if text}


def _flops(record: StepRecord, stage: StageFacts) -> str:
    """Share of the device's peak, or the speed itself where the peak is not known."""
    if record.mfu is not None:
        return f"MFU {100 * record.mfu:.1f}%"
    flops = record.tokens_per_second * stage.rank_flops_per_token
    return flops_text(flops) if math.isfinite(flops) and flops > 0 else ""


def flops_text(flops: float) -> str:
    """Format operations a second: `18.3 GFLOP/s`, `412 TFLOP/s`; three digits."""
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops >= size:
            return f"{three_digits(flops / size)} {unit}"
    return f"{three_digits(flops / 1e6)} MFLOP/s"


def three_digits(value: float) -> str:
    """Format with three digits, zeros too, so that numbers of one size are equally long."""
    return f"{value:#.3g}".rstrip(".")


def wrapped(parts: dict[str, str], columns: int) -> list[list[tuple[str, str]]]:
    """Return the names and texts of the parts on each line of `columns`.

    A part that a line has room for stays in one piece; others are cut between words.
    """
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for name, text in parts.items():
        for piece in textwrap.wrap(text, columns, break_on_hyphens=False):
            if used and used + 1 + len(piece) > columns:
                lines.append([])
                used = 0
            lines[-1].append((name, piece))
            used += len(piece) + (used > 0)
    return lines


def fitting(
    parts: dict[str, str], columns: int, least: Sequence[str] = LEAST_IMPORTANT
) -> dict[str, str]:
    """Return the parts that fit a line of `columns`.

    Less important ones are left out first, but words that a line can do without before them.
    """
    kept = dict(parts)
    for name in (*least, ""):
        shorter = {part: text.replace(*SHORTER.get(part, ("", ""))) for part, text in kept.items()}
        for form in (kept, shorter):
            if sum(len(text) + 1 for text in form.values()) - 1 <= columns:
                return form
        kept.pop(name, None)
    return kept
