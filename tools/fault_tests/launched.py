"""Tiny run by the real command line: a new interpreter, the launcher, and its ranks."""

import os
import subprocess
import sys
from collections.abc import Mapping

from fault_tests.processes import ROOT
from fault_tests.tiny_run import TinyRun
from k2train.fault_injection import VARIABLE


def launch(
    world: TinyRun, name: str, faults: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the launcher on the ranks of `world`; its stderr is a pipe."""
    command = [
        *(sys.executable, "-m", "k2train.launch"),
        *("--nproc-per-node", str(world.ranks)),
        *("-m", "k2train.train", *world.arguments(name)),
    ]
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "K2TRAIN"))
    }
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), VARIABLE: faults}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**inherited, **settings, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
