"""What the launcher says of this process, and what the process tells it at its end. The one place for those variables.

Kept apart from `grid` because a config mistake must be told, once and not once a rank, before torch is imported.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError


@dataclass(frozen=True)
class Launch:
    """One process as torchrun started it; without torchrun it is rank 0 of a world of 1."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool


def read_launch() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK.

    Raises RunError when only some of them are set: a world of one by accident trains N copies in silence.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if all(value is None for value in values):
        return Launch(0, 1, 0, launched=False)
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise RunError(
            f"{', '.join(missing)} not set although {len(names) - len(missing)} of {', '.join(names)} are; start with torchrun or unset them all"
        )
    try:
        rank, world_size, local_rank = (int(str(value)) for value in values)
    except ValueError:
        raise RunError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers, got {', '.join(map(str, values))}") from None
    if not 0 <= rank < world_size:
        raise RunError(f"RANK ({rank}) must be in 0..WORLD_SIZE-1 (WORLD_SIZE is {world_size})")
    return Launch(rank, world_size, local_rank, launched=True)


VERDICTS = "K2TRAIN_VERDICTS"
"""Names the folder where each process of a machine leaves its exit code: torchrun hides them when a signal ended it."""


def leave_verdict(rank: int, code: int | None) -> None:
    """Tell a k2train launcher this process's exit code; None at the start: still running. Nothing under another one."""
    folder = os.environ.get(VERDICTS)
    if folder and Path(folder).is_dir():
        (Path(folder) / f"rank_{rank}").write_text("running" if code is None else str(code))


def offer_verdicts(folder: Path) -> None:
    """Ask the processes started from here to leave their exit codes in `folder`."""
    os.environ[VERDICTS] = str(folder)


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def order_kernels() -> None:
    """Ask CUDA, in the processes started from here, to begin kernels of all streams in the order they are queued.

    A layer that overlaps queues a collective first and then the product that hides it. With CUDA's usual 8 hardware
    queues, one a stream, the product may still be begun first and take all compute units, and the collective begins when
    it is over: nothing was hidden. With one queue the collective gets the few units that it needs, and the product the
    rest. A value that is set already stays: products fused over symmetric memory do better with several queues, since
    there copies wait for other devices.
    """
    os.environ.setdefault(CONNECTIONS, "1")


def read_verdicts(folder: Path) -> dict[int, int | None]:
    """Rank -> exit code of the processes that started; None for one that was ended before it had one."""
    texts = {int(path.name.removeprefix("rank_")): path.read_text() for path in folder.glob("rank_*")}
    return {rank: int(text) if text.lstrip("-").isdigit() else None for rank, text in sorted(texts.items())}
