"""Packages that a process on a GPU machine needs, checked before anything is started.

- A GPU machine often has a torch and no package registry. What it lacks is named at once, with the
  command that makes a folder to take along.
- The lower bounds are those of `pyproject.toml`.
- torch is found and not imported: that takes many seconds, and each part needs them.
- Standard library only.

Alternatives considered:
- The first part's traceback: every part fails alike, and none says what to do.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError

ROOT = Path(__file__).resolve().parents[3]
SITE_FOLDER = ".gpu_site"
"""Folder that `scripts/gpu_site.sh` makes, ignored by git."""
OLDEST_PYTHON = (3, 11)
NOT_BROUGHT = ("torch ", "numpy ", "Python ")
"""Begins of problems that the folder does not solve."""


@dataclass(frozen=True)
class Requirement:
    """A package by its module's name and its name in a registry."""

    module: str
    distribution: str
    light: bool = True
    """Imported by the check; else only found."""


TRAINING = (
    Requirement("torch", "torch", light=False),
    Requirement("numpy", "numpy"),
    Requirement("yaml", "pyyaml"),
    Requirement("pydantic", "pydantic"),
    Requirement("xxhash", "xxhash"),
)
"""What training imports. Preparing data takes more: sentencepiece and tqdm."""


def check_requirements(wanted: Iterable[Requirement] = TRAINING) -> None:
    """Raise RunError that names all that is missing or too old, and how to get it."""
    problems = list(missing(wanted))
    if not problems:
        return

    version = ".".join(platform.python_version_tuple()[:2])
    advice = ["install it there"]
    if any(not problem.startswith(NOT_BROUGHT) for problem in problems):
        advice.append(
            "on a machine with a package registry run `bash scripts/gpu_site.sh --python "
            f"{version}` and take the folder {SITE_FOLDER} along"
        )
    advice.append("name another interpreter: PY=/path/to/python3")
    if own := [problem.split()[0] for problem in problems if problem.startswith(NOT_BROUGHT)]:
        advice[-1] += f" ({SITE_FOLDER} brings no {' and no '.join(own)})"
    raise RunError(
        f"{sys.executable} (Python {platform.python_version()}) lacks {', '.join(problems)}; "
        f"{', or '.join(advice)}"
    )


def missing(
    wanted: Iterable[Requirement] = TRAINING, bounds: Mapping[str, str] | None = None
) -> Iterable[str]:
    """Yield each package that is not usable here, with the reason.

    `bounds`: lowest version by distribution; those of `pyproject.toml` by default.
    """
    lowest = lower_bounds() if bounds is None else bounds
    if sys.version_info < OLDEST_PYTHON:
        yield f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"

    for one in wanted:
        if problem := _problem(one, lowest.get(one.distribution, "0")):
            yield f"{one.distribution} ({problem})"


def _problem(one: Requirement, lowest: str) -> str:
    try:
        if one.light:
            importlib.import_module(one.module)
        elif importlib.util.find_spec(one.module) is None:
            return f"no module {one.module}"
    except Exception as error:
        # A wheel of another Python fails with whatever its first import raises.
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

    try:
        found = importlib.metadata.version(one.distribution)
    except importlib.metadata.PackageNotFoundError:
        # Unpacked without its record: what can be imported is taken.
        return ""
    old = _numbers(found) < _numbers(lowest)
    return f"{found} is older than {lowest}" if old else ""


def lower_bounds() -> dict[str, str]:
    """Lowest version of each dependency in `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.match(r"([\w.-]+)>=([\d.]+)", line) for line in project["dependencies"])
    return {match[1]: match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, without what a build adds: 2.11.0+cu130 -> (2, 11, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
