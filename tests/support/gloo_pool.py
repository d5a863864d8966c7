"""A pool of gloo worker processes for a whole test run; each job gets a process group of its own
size.

- The workers are forked off the warm server, so that 8 of them are there in a tenth of a second.
- A job is a module-level function `job(launch, *args)`; what each rank returns comes back in rank
  order.
- A job that fails ends the pool, and the next one gets new workers: what a failure left behind is
  nobody's.
"""

import gc
import importlib
import itertools
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support import forkserver, left_behind
from tests.support.forkserver import ForkServer, Job

LIMIT_SECONDS = forkserver.PATIENCE_SECONDS
KEY, BACKEND = "GLOO_POOL_KEY", "GLOO_POOL_BACKEND"
_ids = itertools.count()


def serve(arguments: Sequence[str]) -> int:
    """A worker: take jobs from the socket that was named, until it is closed."""
    import torch
    import torch.distributed as dist

    # Tensors in a result travel as descriptors, which only processes with the same key exchange.
    current_process().authkey = bytes.fromhex(os.environ[KEY])
    torch.set_num_threads(1)
    from k2train.launch.environment import Launch

    with socket.socket(socket.AF_UNIX) as joined:
        joined.connect(arguments[0])
        connection = Connection(joined.detach())
    while True:
        try:
            module, name, rank, world, store, args = connection.recv()
        except EOFError:
            # Not through the exit functions: groups of a job that failed may be left.
            os._exit(0)
        before = left_behind.State()
        try:
            dist.init_process_group(
                os.environ[BACKEND], init_method=f"file://{store}", rank=rank, world_size=world
            )
            function = getattr(importlib.import_module(module), name)
            result = ("ok", function(Launch(rank, world, rank, launched=True), *args))
            dist.barrier()
        except BaseException:
            result = ("error", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # A group and its threads live until its last user is collected: hundreds slow all.
            gc.collect()
            # What is left need not be looked at again.
            gc.freeze()
        if result[0] == "ok":
            # The next job is another test's.
            list(before.put_back())
        connection.send(result)


class GlooPool:
    """Workers are started on first use; `run(world, job, *args)` runs a job on the first `world` of
    them.

    `server` forks them (None: the one whose process has `variables`), `worker` is their function,
    `backend` that of the process group. `variables` are in the environment of the workers, and of
    all that they import.
    """

    def __init__(
        self,
        server: Callable[[], ForkServer] | None = None,
        worker: str = "tests.support.gloo_pool:serve",
        backend: str = "gloo",
        **variables: str,
    ) -> None:
        self._server = server or partial(forkserver.server, **variables)
        self._worker = worker
        self._variables = {BACKEND: backend, **variables}
        # A socket's name is short, the test's own folder need not be.
        self.directory = Path(tempfile.mkdtemp(prefix="k2train-pool-"))
        self.workers: list[tuple[Job, Connection]] = []

    def _start(self, count: int) -> None:
        while len(self.workers) < count:
            name = str(self.directory / f"worker{next(_ids)}")
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(name)
                listener.listen(1)
                listener.settimeout(forkserver.PATIENCE_SECONDS)
                environment = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    KEY: bytes(current_process().authkey).hex(),
                    **self._variables,
                }
                job = self._server().start([[self._worker, name]], environment, merged=True)
                joined, _ = listener.accept()
            joined.setblocking(True)
            self.workers.append((job, Connection(joined.detach())))

    def run(
        self, world: int, job: Any, *args: Any, timeout_seconds: float = LIMIT_SECONDS
    ) -> list[Any]:
        self._start(world)
        store = self.directory / f"store{next(_ids)}"
        for rank, (_, connection) in enumerate(self.workers[:world]):
            connection.send((job.__module__, job.__name__, rank, world, str(store), args))

        results: list[Any] = [None] * world
        failed = []
        for rank, (worker, connection) in enumerate(self.workers[:world]):
            if not connection.poll(2 if failed else timeout_seconds):
                failed.append(f"rank {rank}: no answer")
                continue
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionError):
                kind, value = "error", f"ended: {worker.text('out')}"
            if kind == "error":
                failed.append(f"rank {rank}: {value}")
            results[rank] = value
        if failed:
            self._end_workers()
            raise AssertionError("\n".join(failed))
        return results

    def _end_workers(self) -> None:
        for worker, connection in self.workers:
            connection.close()
            self._server().end(worker)
        self.workers = []

    def close(self) -> None:
        self._end_workers()
        shutil.rmtree(self.directory, ignore_errors=True)
