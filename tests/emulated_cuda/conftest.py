"""Fixtures of the emulated tests: a warm server of the CUDA build, and a pool of its processes."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.emulated_cuda import interpreter
from tests.support import forkserver
from tests.support.forkserver import MODULES, ForkServer
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import environment

DEVICES = "4"
Train = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="session")
def emulated() -> Iterator[ForkServer]:
    """The server; its processes have the emulated libraries and torch loaded."""
    lacking = interpreter.why_not()
    if lacking is not None:
        pytest.skip(lacking)
    scratch = Path(tempfile.mkdtemp(prefix="k2train-emulated-"))
    modules = ("tests.emulated_cuda.preload", *MODULES)
    with ForkServer(scratch, modules, os.environ[interpreter.PYTHON]) as server:
        yield server
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="session")
def cuda_pool(emulated: ForkServer) -> Iterator[GlooPool]:
    """Workers under emulated CUDA, each with a device of its own."""
    made = GlooPool(
        lambda: emulated,
        "tests.emulated_cuda.worker:serve",
        "cpu:gloo,cuda:nccl",
        EMULATED_CUDA_DEVICES=DEVICES,
        # Not this process's path: it has another torch.
        PYTHONPATH=str(forkserver.ROOT),
    )
    yield made
    made.close()


@pytest.fixture(scope="session")
def cuda_train(emulated: ForkServer) -> Train:
    """`tiny_corpus.train` under emulated CUDA."""

    def train(*arguments: object, processes: int = 1, **variables: str) -> CompletedProcess[str]:
        command = ["-m", "tests.emulated_cuda", "-m", "k2train.train", *arguments]
        # Segments that grow need more of the driver than is emulated.
        variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False", **variables}
        variables = {"EMULATED_CUDA_DEVICES": DEVICES, **variables}
        return forkserver.run(command, environment(**variables), processes=processes, on=emulated)

    return train
