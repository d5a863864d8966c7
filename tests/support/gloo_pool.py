"""A pool of gloo worker processes, started once for the whole test run; each job gets a process group of its own size.

Starting 8 torch processes takes 10 seconds on two cores, a job in the pool takes a tenth of one. A job is a module-level
function `job(launch, *args)`; what each rank returns comes back in rank order.
"""

import gc
import importlib
import itertools
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WORKERS = 8
_ids = itertools.count()


def _serve(connection: Any, index: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from k2train.launch.environment import Launch

    while True:
        message = connection.recv()
        if message is None:
            return
        module, name, rank, world, store, args = message
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world
            )
            function = getattr(importlib.import_module(module), name)
            result = ("ok", function(Launch(rank, world, rank, launched=True), *args))
            dist.barrier()
        except BaseException:
            result = ("error", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # A group lives until its last user is collected, and its threads with it: hundreds of jobs of them slow all.
            gc.collect()
        connection.send(result)


class GlooPool:
    """Workers are started on first use; `run(world, job, *args)` runs a job on the first `world` of them."""

    def __init__(self, directory: Path):
        self.directory, self.workers = directory, []

    def _start(self, count: int) -> None:
        context = get_context("spawn")
        while len(self.workers) < count:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, len(self.workers)), daemon=True)
            process.start()
            self.workers.append((process, here))

    def run(self, world: int, job: Any, *args: Any, timeout_seconds: float = 120) -> list[Any]:
        self._start(world)
        store = self.directory / f"store{next(_ids)}"
        for rank, (_, connection) in enumerate(self.workers[:world]):
            connection.send((job.__module__, job.__name__, rank, world, str(store), args))
        results: list[Any] = [None] * world
        failed = []
        for rank, (_, connection) in enumerate(self.workers[:world]):
            if not connection.poll(2 if failed else timeout_seconds):
                failed.append(f"rank {rank}: no answer")
                continue
            kind, value = connection.recv()
            if kind == "error":
                failed.append(f"rank {rank}: {value}")
            results[rank] = value
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return results

    def close(self) -> None:
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers = []
