"""State of a process that tests share: what a test leaves behind is put back, and named.

- Any file may follow any other in the same process. What one leaves behind would show up in
  another, on the day on which they meet.
- A variable that is new counts where this project reads or sets such a one. Libraries set some of
  their own for good, when they are imported.

Alternatives considered: failing the test that leaves something, which turns a harmless line of a
library's next version into a red run; a process for each test, which costs an import of torch.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

OURS = ("k2train", "tests")
READ = (
    "CUBLAS_", "CUDA_", "FAULT_RUN_", "GLOO_", "GROUP_", "HF_", "K2TRAIN_", "LANG", "LC_", "LOCAL_",
    "MASTER_", "NCCL_", "OMP_", "PATH", "PYTHON", "PYTORCH_", "RANK", "ROLE_", "SLURM_", "TMPDIR",
    "TORCHELASTIC_", "TORCH_", "TQDM_", "TRITON_", "WANDB_", "WORLD_SIZE",
)  # fmt: skip
"""Starts of the variables that this project reads or sets."""
SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGCHLD, signal.SIGPIPE,
)  # fmt: skip
REAL = signal.ITIMER_REAL
END_SECONDS = 5.0
"""How long a thread that works on is waited for: most have been asked to end."""


class Shared(NamedTuple):
    """One item of the state: its name, how it is read and how it is put back."""

    name: str
    read: Callable[[], Any]
    put: Callable[[Any], object]


def _put_handler(number: signal.Signals) -> Callable[[Any], object]:
    # None stands for a handler that was not installed from Python: no one can put that back.
    return lambda handler: handler is not None and signal.signal(number, handler)


def _is_timed() -> bool:
    return signal.getitimer(REAL)[0] > 0


RETRIES = logging.getLogger("k2train.retry")
PLAIN = (
    Shared("the working folder", os.getcwd, os.chdir),
    Shared("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    Shared("logging.disable", lambda: logging.root.manager.disable, logging.disable),
    Shared("the level of the root logger", lambda: logging.root.level, logging.root.setLevel),
    Shared("the level of k2train.retry", lambda: RETRIES.level, RETRIES.setLevel),
    Shared("whether SIGALRM is to come", _is_timed, lambda _: signal.setitimer(REAL, 0.0)),
    *(
        Shared(
            f"the handler of {one.name}", lambda one=one: signal.getsignal(one), _put_handler(one)
        )  # type: ignore[misc]
        for one in SIGNALS
    ),
)


def _of_torch(torch: Any) -> tuple[Shared, ...]:
    return (
        Shared("torch's threads", torch.get_num_threads, torch.set_num_threads),
        Shared("torch's default type", torch.get_default_dtype, torch.set_default_dtype),
        Shared("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Shared(
            "torch's deterministic algorithms",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda two: torch.use_deterministic_algorithms(two[0], warn_only=two[1]),
        ),
        Shared(
            "torch's precision of products",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
    )


class State:
    """What was shared when it was made; `put_back` later."""

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        # One that is still being imported has nothing yet.
        whole = torch is not None and hasattr(torch, "set_float32_matmul_precision")
        self._items = [(one, one.read()) for one in (*PLAIN, *(_of_torch(torch) if whole else ()))]
        self._variables = dict(os.environ)
        self._threads = own_threads()

    def put_back(self) -> Iterator[str]:
        """Put back what has changed, and yield a line for each change.

        Threads of this project that are new are waited for, `END_SECONDS` at most.
        """
        for thread in threads_left(self._threads):
            yield f"the thread {thread.name} works on"
        for one, before in self._items:
            if (now := one.read()) != before:
                one.put(before)
                yield f"{one.name} was {before!r} and is {now!r}"
        yield from _put_back_variables(self._variables)


def _put_back_variables(before: Mapping[str, str]) -> Iterator[str]:
    now = dict(os.environ)
    for name in sorted({*before, *now}):
        new = name not in before and not name.startswith(READ)
        if before.get(name) == now.get(name) or new or name.startswith("PYTEST_"):
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
        yield f"the environment's {name} was {before.get(name)!r} and is {now.get(name)!r}"


def own_threads() -> set[threading.Thread]:
    """Return the live threads that run code of this project; libraries keep some of their own."""
    return {
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(OURS) or _module_of(thread).startswith(OURS)
    }


def _module_of(thread: threading.Thread) -> str:
    # A thread that has just ended has no target any more.
    target = getattr(thread, "_target", None)
    if type(thread) is threading.Thread:
        return f"{getattr(target, '__module__', '')}"
    return type(thread).__module__


def threads_left(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads that are new and do not end, after a wait for them."""
    deadline = time.monotonic() + END_SECONDS
    while (left := own_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.002)
    return left
