"""Cluster files: YAML of a device and its links, read into `plan.hardware.Cluster`.

- `configs/clusters/` has one for each kind; a user's own is named by its path.
- The links are ordered, innermost first, and the last one must reach everywhere.
- `sources` says where each number is from, by dotted key. A key that names no number is a mistake.

Alternatives considered:
- A table in code: a team's network differs from the reference design, and is what matters.
- `{value, source}` in place of each number: a reader no longer sees the numbers side by side.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from k2train.commands import tools_folder
from k2train.config.messages import legal_keys, nearest, problems_of, unknown
from k2train.config.section import Section
from k2train.config.yaml_source import Path as KeyPath
from k2train.config.yaml_source import dotted, read_source
from k2train.errors import ConfigError
from k2train.plan.hardware import GIB, Cluster, Device, Link
from k2train.planner.measured_section import MeasuredSection
from k2train.retry import is_file_retried, is_folder_retried, list_retried

# Ten to a thousand times what the largest machines have: beyond it, the unit is another one.
Teraflops = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
Gibibytes = Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)]
Gigabytes = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
Watts = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Microseconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]


class DeviceFile(Section):
    """Section `device`."""

    name: str
    generation: str
    memory_gib: Gibibytes
    memory_gb_per_second: Gigabytes
    watts: Watts
    sustained: Annotated[float, Field(gt=0, le=1)] = 1.0
    peak_tflops: dict[str, Teraflops]


class LinkFile(Section):
    """One entry of `links`."""

    devices: Annotated[int, Field(ge=0, le=2**30)]
    gb_per_second: Gigabytes
    latency_microseconds: Microseconds


class ClusterFile(Section):
    """A whole cluster file."""

    name: str
    source: str
    device: DeviceFile
    links: dict[str, LinkFile]
    sources: dict[str, str] = Field(default_factory=dict)
    """Origin of each number by its dotted key; a key stands for all numbers below it."""
    measured: MeasuredSection | None = None
    """What `tools/calibrate.py` measured; left out in files of data sheets."""


def clusters_folder() -> Path:
    """Return the folder of the shipped cluster files."""
    inside = tools_folder() / "configs" / "clusters"
    return inside if is_folder_retried(inside) else tools_folder().parent / "configs" / "clusters"


def cluster_names() -> list[str]:
    """Names of the shipped clusters."""
    return sorted(path.stem for path in list_retried(clusters_folder()) if path.suffix == ".yaml")


def load_cluster(name: str, option: str = "--cluster") -> Cluster:
    """Read a shipped cluster by name, or a file by path; an error names the option.

    Raises ConfigError for an unknown name, and with every mistake of a file, one per line.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read_cluster(name)
    path = clusters_folder() / f"{name.lower()}.yaml"
    if not is_file_retried(path):
        names = cluster_names()
        meant = meant_clusters(name, names)
        raise ConfigError(
            f"{option} {name}: no such cluster; "
            + (f"write {' or '.join(meant)}; " if meant else "")
            + f"there are, by bf16 TFLOP/s and GiB of a device: {_capabilities(names)}; or give "
            "the path of a YAML file"
        )
    return read_cluster(str(path))


def meant_clusters(name: str, names: Sequence[str]) -> list[str]:
    """Clusters that a name may mean, by its words: `H100 SXM` is h100, `a100` is two of them.

    Spelling decides between those that share a word only: a V100 is no H100.
    """
    words = name_words(name)
    whole = [known for known in names if name_words(known) <= words]
    if whole:
        return [max(whole, key=len)]
    sharing = [known for known in names if name_words(known) & words]
    if len(words) > 1 and sharing:
        near = nearest(name.lower(), sharing)
        return [near] if near else sharing
    return sharing or [known for known in names if known.startswith(name.lower())]


def name_words(name: str) -> set[str]:
    """Words of a device's or a cluster's name, in small letters."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _capabilities(names: Sequence[str]) -> str:
    """Each shipped cluster with its device's rate and memory, slowest first."""
    devices = {name: read_cluster(str(clusters_folder() / f"{name}.yaml")).device for name in names}
    ordered = sorted(names, key=lambda name: (devices[name].peak("bf16"), name))
    return ", ".join(
        f"{name} {devices[name].peak('bf16') / 1e12:.0f}/{devices[name].memory_bytes / GIB:.0f}"
        for name in ordered
    )


def read_cluster(path: str) -> Cluster:
    """Read one cluster file. Raises ConfigError with every mistake, one per line."""
    source = read_source(path)
    mistakes = [str(mistake) for mistake in source.mistakes]
    try:
        file = ClusterFile.model_validate(source.tree)
    except ValidationError as error:
        for problem in problems_of(error, _unknown_key):
            where = f"{dotted(problem.path)}: " if problem.path else ""
            mistakes.append(f"{source.origin_of(problem.path)}: {where}{problem.message}")
        raise ConfigError("\n".join(dict.fromkeys(mistakes))) from None
    mistakes += _orphans(file, numbers_of(source.tree), path)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return _cluster(file, path)


def numbers_of(tree: dict[str, Any]) -> list[str]:
    """Dotted keys of all numbers of device and links; not of `devices: 0`, which means all."""
    found = []

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}")
        elif isinstance(value, int | float) and not (value == 0 and key.endswith(".devices")):
            found.append(key)

    for section in ("device", "links"):
        visit(tree.get(section, {}), section)
    return found


def source_of(key: str, sources: Mapping[str, str]) -> str | None:
    """Return what `sources` has of a number: at its own key, or at the nearest one above."""
    while key not in sources:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return None
    return sources[key]


def _orphans(file: ClusterFile, numbers: Sequence[str], path: str) -> list[str]:
    """Mistakes of `sources`: keys that name no number of the file; of a missing link, the link."""
    found = []
    for key in file.sources:
        if any(f"{number}.".startswith(f"{key}.") for number in numbers):
            continue
        section, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if section == "links" and name and name not in file.links and not _like_a_link(name, file):
            found.append(
                f"{path}: links.{name}: missing, and sources names it; add it, with devices, "
                "gb_per_second and latency_microseconds, or take its sources out"
            )
            continue
        found.append(
            f"{path}: sources.{key}: names no number of this file; nearest is "
            f"{nearest(key, numbers)}"
        )
    return list(dict.fromkeys(found))


def _like_a_link(name: str, file: ClusterFile) -> bool:
    """Whether a name is a misspelt link of the file."""
    return nearest(name, list(file.links), cutoff=0.7) is not None


def _cluster(file: ClusterFile, path: str) -> Cluster:
    """Turn units into bytes and seconds. Raises ConfigError for links that join nothing."""
    links = tuple(
        Link(name, link.devices, link.gb_per_second * 1e9, link.latency_microseconds * 1e-6)
        for name, link in file.links.items()
    )
    if not links or links[-1].devices:
        last = (
            f"the last, {links[-1].name}, joins {links[-1].devices}" if links else "there is none"
        )
        raise ConfigError(
            f"{path}: links: a link between nodes is missing ({last}); "
            "the outermost needs devices: 0, which means all"
        )
    # A machine that was measured has one link, between all of its ranks.
    if len(links) == 1 and file.measured is None:
        raise ConfigError(
            f"{path}: links: a link inside a node is missing (the only one, {links[0].name}, joins "
            "all); the first needs devices: as many as a node has"
        )
    sizes = [link.devices for link in links[:-1]]
    if 0 in sizes or sizes != sorted(set(sizes)):
        raise ConfigError(
            f"{path}: links: devices ({', '.join(map(str, sizes))}) must grow from the first to "
            "the last, which has 0"
        )
    if "bf16" not in file.device.peak_tflops:
        raise ConfigError(f"{path}: device.peak_tflops: bf16 is missing; attention runs in it")
    device = Device(
        file.device.name,
        file.device.generation.lower(),
        {name: 1e12 * value for name, value in file.device.peak_tflops.items()},
        file.device.memory_gib * GIB,
        file.device.memory_gb_per_second * 1e9,
        file.device.watts,
        file.device.sustained,
    )
    measured = None if file.measured is None else file.measured.measured(path)
    return Cluster(file.name, device, links, measured)


def _unknown_key(path: KeyPath) -> str:
    legal = legal_keys(ClusterFile, path[:-1])
    return unknown(nearest(str(path[-1]), legal), legal)
