"""Findings about this machine that need no torch: Python, memory, disk, limits, network, packages.

- Each is read from where the trainer reads it, so both judge alike.

Alternatives considered:
- Importing each optional package: a broken one takes seconds, and only its user needs to know.
"""

import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from doctor_parts.finding import Finding
from k2train.launch.limits import raise_open_files
from k2train.text import bytes_text, counted
from k2train.train.machine import cpu_has_bf16, free_memory

OLDEST_PYTHON = (3, 11)
LITTLE_MEMORY_BYTES = 2 * 2**30
LITTLE_DISK_BYTES = 5 * 2**30
LITTLE_SHARED_BYTES = 256 * 2**20
"""A container has 64 MiB unless asked for more; NCCL alone takes more with eight devices."""
FEW_FILES = 1024
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
"""Not there after an installation."""
EXTRAS = ("data", "tracking", "eval", "release", "trace")
"""Extras that a user asks for; the others are of developers, or for GPUs."""


def python_finding() -> Finding:
    """Return what Python this is."""
    version, old = platform.python_version(), sys.version_info < OLDEST_PYTHON
    needs = f"; needs {'.'.join(map(str, OLDEST_PYTHON))} or newer" if old else ""
    return Finding("FAIL" if old else "ok", "python", f"{version}, {sys.executable}{needs}")


def memory_finding(root: Path = Path("/")) -> Finding:
    """Return the least of the limits of host memory."""
    limits = free_memory(root)
    if not limits:
        return Finding("note", "memory", "unknown on this system")
    least = min(limits, key=lambda limit: limit.free_bytes)
    text = f"{bytes_text(least.free_bytes)} of {bytes_text(least.total_bytes)} free ({least.limit})"
    little = least.free_bytes < LITTLE_MEMORY_BYTES
    return Finding("note" if little else "ok", "memory", text)


def disk_finding(folder: Path) -> Finding:
    """Return the free space of a folder, and whether it can be written to."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"k2train")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        text = f"{folder} cannot be written to: {problem.strerror}; start from another folder"
        return Finding("FAIL", "disk", text)
    little = free < LITTLE_DISK_BYTES
    text = f"{bytes_text(free)} free in {folder}" + ("; a checkpoint may not fit" if little else "")
    return Finding("note" if little else "ok", "disk", text)


def files_finding() -> Finding:
    """Return the limit of open files, after a process has raised its own."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = raise_open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    if limit is None or limit > FEW_FILES:
        return Finding("ok", "open files", f"{'no limit' if limit is None else f'{limit:,}'}")
    text = f"{limit:,}, enough for some hundred processes; ulimit -Hn raises it"
    return Finding("note", "open files", text)


def shared_memory_finding(folder: Path = Path("/dev/shm")) -> Finding:
    """Return the size of shared memory, by which processes of a machine exchange."""
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return Finding("note", "shared memory", f"there is no {folder}")
    if size < LITTLE_SHARED_BYTES:
        text = f"{bytes_text(size)}; in a container ask for more (docker run --shm-size=1g)"
        return Finding("note", "shared memory", text)
    return Finding("ok", "shared memory", bytes_text(size))


def loopback_finding() -> Finding:
    """Return whether a port of this machine can be listened at and reached."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
    except OSError as problem:
        text = f"127.0.0.1 cannot be reached ({problem.strerror or problem}): one process at most"
        return Finding("note", "loopback", text)
    return Finding("ok", "loopback", "a free port was listened at and reached")


def bf16_finding(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Return whether the CPU multiplies bf16 numbers."""
    known = cpu_has_bf16(cpuinfo)
    if known is None:
        return Finding("note", "bf16 on CPU", "unknown on this system")
    if known:
        return Finding("ok", "bf16 on CPU", "in hardware")
    return Finding(
        "note", "bf16 on CPU", "none: products are upcast to fp32, so precision=fp32 is faster"
    )


def compiler_finding() -> Finding:
    """Return the C++ compiler, which only compiled kernels on a CPU need."""
    found = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if found:
        return Finding("ok", "compiler", found)
    return Finding("note", "compiler", "no g++ or clang++: kernels.compile=on needs one on a CPU")


def package_findings(requirements: Mapping[str, list[str]] | None = None) -> Iterator[Finding]:
    """Yield a line for what training needs, and one for each extra.

    `requirements`: lines as `torch>=2.8`, by extra; "" for those that are always needed.
    """
    wanted = requirements_of_project() if requirements is None else requirements
    problems = [text for line in wanted[""] if (text := _problem(line))]
    needed = f"all {counted(len(wanted['']), 'package')} that training needs"
    yield Finding(
        "FAIL" if problems else "ok", "packages", "; ".join(problems) if problems else needed
    )
    for extra in EXTRAS:
        lines = wanted.get(extra, [])
        names = ", ".join(map(_name, lines))
        problems = [text for line in lines if (text := _problem(line))]
        text = f"{'; '.join(problems)}: pip install 'k2train[{extra}]'" if problems else names
        yield Finding("note" if problems else "ok", f"  [{extra}]", text)


def requirements_of_project(pyproject: Path = PROJECT) -> dict[str, list[str]]:
    """Return the requirements of k2train by extra: of this checkout, else as it was installed."""
    found: dict[str, list[str]] = defaultdict(list)
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    for line in metadata.requires("k2train") or ():
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        found[extra[1] if extra else ""].append(line.partition(";")[0].strip())
    return found


def _name(line: str) -> str:
    match = re.match(r"[\w.-]+", line)
    return match[0] if match else line


def _problem(line: str) -> str:
    """Say that a required distribution is missing or too old; "" where it is neither."""
    name, lowest = _name(line), re.search(r">=\s*([\d.]+)", line)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"no {name}"
    old = lowest is not None and _numbers(found) < _numbers(lowest[1])
    return f"{name} {found} is older than {lowest[1]}" if old and lowest else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
