"""Context of a GPU benchmark part: its device, its deadline, and its rows of results or reasons."""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.cpu.contract import UnavailableError
from k2train.errors import UserError


class OutOfTimeError(Exception):
    """The work no longer fits before the deadline."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for out-of-memory errors; libraries below torch wrap them in errors of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def first_line(error: BaseException) -> str:
    """An error on one line, for a row."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else "no message"
    return f"{type(error).__name__}: {text}"[:240]


@dataclass
class Bench:
    """A running part. `deadline` is a reading of `time.monotonic`."""

    part: str
    device: torch.device
    dry: bool
    deadline: float
    rows: TextIO
    folder: Path = Path(".")
    """Where the part may write."""

    @property
    def left_seconds(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    @property
    def cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    def emit(self, what: str, status: str = "ok", why: str = "", **figures: Any) -> None:
        """Write one row at once, so that it survives this process."""
        row = {"part": self.part, "what": what, "status": status, "why": why, **figures}
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()

    def attempt(
        self,
        what: str,
        work: Callable[[], Mapping[str, Any]],
        needs_seconds: float = 0.0,
        optional: bool = False,
        **labels: Any,
    ) -> Mapping[str, Any] | None:
        """Run `work` and write its figures as a row, or the reason why there are none.

        Returns None in that case. `optional`: a choice that this device or machine may not have, so
        that a refusal or too little memory is a fact about it (`unavailable`) and no failure.

        Catches every error: the next row may still be measured.
        """
        if self.left_seconds < needs_seconds or self.left_seconds <= 0:
            why = f"needs about {needs_seconds:.0f} s, {max(self.left_seconds, 0):.0f} s were left"
            self.emit(what, "skipped", why, **labels)
            return None

        self.emit(what, "begun")
        status, why, figures = "failed", "", None

        try:
            figures = work()
        except OutOfTimeError as error:
            status, why = "skipped", str(error)
        except UnavailableError as error:
            status, why = "unavailable", str(error)
        except Exception as error:
            status = "out of memory" if is_out_of_memory(error) else "failed"
            why = first_line(error)
            if optional and (status == "out of memory" or isinstance(error, UserError)):
                status = "unavailable"

        self.free()
        if figures is None:
            self.emit(what, status, why, **labels)
        else:
            self.emit(what, **{**labels, **figures})

        return figures

    def free(self) -> None:
        """Release what the last work held; engines reference themselves in cycles of hooks."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def total_bytes(self) -> int | None:
        """Memory of the device; None on the CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.cuda else None

    def forget_peak(self) -> None:
        """Restart the peak measurement."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Peak bytes of tensors since `forget_peak`; None on the CPU, which has no counter."""
        return torch.cuda.max_memory_allocated() if self.cuda else None

    def held_bytes(self) -> int | None:
        """Present bytes of tensors; None on the CPU."""
        return torch.cuda.memory_allocated() if self.cuda else None
