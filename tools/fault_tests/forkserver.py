"""Fork server: a warm process that forks the processes of runs in milliseconds.

Each is a real process, which a real SIGKILL ends.

    python tools/fault_tests/forkserver.py [MODULE ...]

Orders come on stdin, news go to stdout, one JSON object a line.

- Importing torch and the trainer takes seconds, a fork of what is imported milliseconds. The fault
  tests restart a run a thousand times in minutes; the test suite starts its processes here too.
- MODULEs are imported before the first fork; without any, those that a rank of a training run
  needs.
- The fork is safe because the server has one thread, no socket and no random state in use; else it
  refuses to serve.
- A child that ends by itself joins its threads, runs its exit functions and leaves. It does not
  take down all modules one by one, which would copy the heap of the server (0.5 to 3 s); processes
  under a launcher do.
- A server can be forked off a process that is warm itself, see `fork_server`.

Alternatives considered: pools of workers that live on after a job. What a kill leaves behind in a
process cannot be seen in one that is never killed.

Order: {"job", "folder", "ranks": [{"rank", "command", "environment", "replace", "stdout",
"stderr"}]}. A command is what follows `python` on a command line (`-m MODULE` or a
script, then arguments), or `MODULE:FUNCTION` to call a function with the list of arguments.
`replace` makes the environment the whole environment, not an addition. News: {"job", "pids"}, then
for each rank {"job", "rank", "status", "at"}: the wait status and CLOCK_MONOTONIC at its end.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG = 36, 1
MODULES = (
    "k2train.train.run", "k2train.train.__main__", "k2train.fault_injection",
    "torch._dynamo", "torch._inductor.utils", "safetensors.torch",
    "numpy.random", "numpy.fft", "ctypes.util",
)  # fmt: skip
"""What a rank imports, and what it imports later on its way."""
INHERITED = "FAULT_RUN_FORKSERVER"
"""Set by `fork_server` for the process that holds the other ends of the server's pipes: their
descriptors and the pid.
"""
NESTED = "FAULT_RUN_NESTED"
"""Set in an order: the child forks a server off itself before it does anything else, and inherits
its pipes.
"""
TRACE, PATCH, NETWORK = "FAULT_RUN_TRACE", "FAULT_RUN_PATCH", "FAULT_RUN_NETNS"
CLONE_NEWNET = 0x40000000
MEET_SECONDS = 1.0
"""Not more: a rank 0 that refuses to start never listens, and one in another network is not seen.
"""


def warm(modules: Sequence[str]) -> None:
    """Import all that the children need, and check that this process can be forked."""
    for name in modules:
        importlib.import_module(name)

    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1 or threading.active_count() != 1:
        raise SystemExit(f"the imports have started {threads - 1} threads: a fork would lose them")

    # A collection in a child would look at all that is imported here, and copy it: 0.3 s each.
    gc.collect()
    gc.freeze()

    # Orphans of a rank come to us, so that none can hide.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def fork_server(modules: Sequence[str] = MODULES) -> str:
    """Fork a server off this process, which must have one thread; the value of `INHERITED` for
    those who use it.

    It imports its modules when the first order comes: a process that never sends one does not pay
    for them.
    """
    orders, to_server = os.pipe()
    from_server, news = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        die_with(parent)
        os.dup2(orders, 0)
        os.dup2(news, 1)
        for descriptor in (orders, news, to_server, from_server):
            os.close(descriptor)
        os.environ.pop(INHERITED, None)
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.select()
        main(modules)
    os.close(orders)
    os.close(news)
    return f"{from_server} {to_server} {pid}"


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def serve() -> dict[str, Any] | None:
    """Fork and reap until stdin ends; returns the order of a rank in the forked child, None in the
    server.
    """
    news = os.dup(1)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(read_end, selectors.EVENT_READ)
    alive: dict[int, tuple[int, int]] = {}
    rest = b""
    say(news, {"ready": os.getpid()})
    while True:
        for key, _ in selector.select():
            if key.fd == read_end:
                os.read(read_end, 4096)
                reap(alive, news)
                continue
            piece = os.read(0, 1 << 20)
            if not piece:
                return None
            *lines, rest = (rest + piece).split(b"\n")
            for line in filter(None, lines):
                mine = fork_ranks(json.loads(line), alive, news)
                if mine is not None:
                    selector.close()
                    for descriptor in (news, read_end, write_end):
                        os.close(descriptor)
                    return mine


def fork_ranks(
    order: dict[str, Any], alive: dict[int, tuple[int, int]], news: int
) -> dict[str, Any] | None:
    """One process a rank, all in one process group of their own; in a child, its order."""
    server, pids = os.getpid(), list[int]()
    for rank in order["ranks"]:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            die_with(server)
            return {**rank, "folder": order["folder"]}
        # Both sides set it, so it is set before either continues, in any order.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
        alive[pid] = (order["job"], rank["rank"])
    say(news, {"job": order["job"], "pids": pids, "at": time.monotonic()})
    return None


def reap(alive: dict[int, tuple[int, int]], news: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        job, rank = alive.pop(pid, (-1, -1))
        say(news, {"job": job, "rank": rank, "pid": pid, "status": status, "at": time.monotonic()})


def say(news: int, fact: dict[str, Any]) -> None:
    os.write(news, json.dumps(fact).encode() + b"\n")


def become(order: dict[str, Any]) -> int:
    """In the child: the signals, descriptors, environment and command of a rank; its exit code."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    for descriptor, path in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)

    environment = order["environment"]
    if order["replace"]:
        os.environ.clear()
    os.environ.update(environment)
    os.chdir(order["folder"])
    sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(":") if part]
    if os.environ.pop(NESTED, ""):
        os.environ[INHERITED] = fork_server()

    if network := environment.get(NETWORK):
        with open(network) as opened_network:
            if ctypes.CDLL(None, use_errno=True).setns(opened_network.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
    patch(environment.get(PATCH, ""))
    if path := environment.get(TRACE):
        patches: Any = importlib.import_module("code_patches")
        patches.trace(path, order["rank"])
    if order["rank"] > 0 and "MASTER_PORT" in environment:
        meet(int(environment["MASTER_PORT"]))
    return run(order["command"])


def run(command: Sequence[str]) -> int:
    """What `python COMMAND` would do, in this process, or call the function that `MODULE:FUNCTION`
    names.
    """
    first, *rest = command
    module, _, function = first.partition(":")
    if function:
        return int(getattr(importlib.import_module(module), function)(rest) or 0)

    if first == "-m":
        name, sys.argv = rest[0], rest
        sys.path.insert(0, os.getcwd())
        forget(name)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
    return 0


def forget(name: str) -> None:
    """Let a module that is run be no imported one: runpy warns of that."""
    spec = importlib.util.find_spec(name)
    package = spec is not None and spec.submodule_search_locations is not None
    sys.modules.pop(f"{name}.__main__" if package else name, None)


def leave(code: int) -> None:
    """End this process with `code`, without taking down what was there before the fork."""
    # The interpreter's own first steps at its end, in its order.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def patch(names: str) -> None:
    """Break the code on purpose (`module:function` of a file beside this one, several separated by
    commas), so that the runner can be seen to fail.
    """
    for name in filter(None, names.split(",")):
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)()


def meet(port: int) -> None:
    """Let this rank look for rank 0 when it listens: torch, when it comes first, waits for up to a
    second to ask again.
    """
    trainer: Any = importlib.import_module("k2train.train.run")
    start = trainer.start_process_group

    def started(*arguments: Any) -> Any:
        deadline = time.monotonic() + MEET_SECONDS
        while port not in listening() and time.monotonic() < deadline:
            time.sleep(0.003)
        return start(*arguments)

    trainer.start_process_group = started


def listening() -> set[int]:
    """TCP ports of this machine that someone listens to."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def code_of(end: SystemExit) -> int:
    """The exit code that the interpreter makes of it; a text is printed."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def main(modules: Sequence[str]) -> None:
    """Serve; in every child do its work. Does not return."""
    warm(modules)
    # Each child has the paths of its own order, and these modules for patches.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, HERE)] + [
        str(HERE)
    ]
    mine = serve()
    if mine is None:
        os._exit(0)
    try:
        ended = become(mine)
    except SystemExit as end:
        ended = code_of(end)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        ended = 1
    leave(ended)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:] or MODULES)
