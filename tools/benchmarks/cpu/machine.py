"""Machine facts for benchmark records: hardware, versions and commit, without importing torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.cpu.processor import processor_facts
from k2train.record.system_info import git_output, package_version, processor_name

PACKAGES = ("torch", "transformers", "megatron-core")


def machine_facts() -> dict[str, Any]:
    """Processor (`cpu` is what identifies it), cores, memory, load at the start, and versions.

    Null for a missing package.
    """
    return {
        "processor": processor_name() or platform.machine(),
        "cpu": processor_facts(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def commit_of(root: Path) -> tuple[str | None, bool]:
    """(commit of the tree, whether it has uncommitted changes); (None, False) without git."""
    head = git_output(root, "rev-parse", "HEAD")
    return head, bool(head and git_output(root, "status", "--porcelain"))
