"""Cluster files: shipped ones against data sheets, and one line for a mistake."""

import re
from pathlib import Path

import pytest

from k2train.config.yaml_source import read_source
from k2train.errors import ConfigError
from k2train.plan.device_peak import peak_flops
from k2train.planner.cluster_file import (
    cluster_names,
    clusters_folder,
    load_cluster,
    numbers_of,
    source_of,
)

GOOD = """\
name: mine
source: "measured"
device: {name: X, generation: ampere, memory_gib: 40, memory_gb_per_second: 1000, watts: 300,
  peak_tflops: {bf16: 100}}
links:
  nvlink: {devices: 8, gb_per_second: 300, latency_microseconds: 4}
  network: {devices: 0, gb_per_second: 25, latency_microseconds: 8}
"""


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_cluster(str(path))
    return str(caught.value)


@pytest.mark.parametrize("name", cluster_names())
def test_shipped_peaks_are_those_of_the_data_sheets(name: str) -> None:
    """Catches a peak with sparsity, or of another part, in a cluster file."""
    cluster = load_cluster(name)
    assert cluster.device.peak("bf16") == peak_flops(cluster.device.name)
    if "fp8" in cluster.device.peak_flops:
        assert cluster.device.peak("fp8") == peak_flops(cluster.device.name, "fp8")
    assert cluster.links[-1].devices == 0
    assert cluster.node == (72 if name.startswith("gb") else 8)


@pytest.mark.parametrize("name", cluster_names())
def test_every_shipped_number_has_a_source(name: str) -> None:
    """Catches a number that nobody can look up, and a source that names none of them."""
    tree = read_source(str(clusters_folder() / f"{name}.yaml")).tree
    numbers = numbers_of(tree)
    assert len(numbers) >= 10 and "links.network.devices" not in numbers
    for key in numbers:
        source = source_of(key, tree["sources"])
        assert source and (source.startswith("measured") or re.search(r"https://\S+$", source)), key
    used = {source_of(key, tree["sources"]) for key in numbers}
    assert used == set(tree["sources"].values())


def test_a_source_of_no_number_is_a_mistake(tmp_path: Path) -> None:
    """Catches a source that stays when its number was renamed, and one taken for its neighbour."""
    sources = "sources:\n  device: https://a.org\n  device.watts: given\n"
    path = tmp_path / "good.yaml"
    path.write_text(GOOD + sources, encoding="utf-8")
    assert load_cluster(str(path)).device.watts == 300
    found = read_source(str(path)).tree["sources"]
    assert source_of("device.watts", found) == "given"
    assert source_of("device.peak_tflops.bf16", found) == "https://a.org"
    assert source_of("links.nvlink.devices", found) is None

    for key, near in (("device.watt", "device.watts"), ("links.network.devices", "links.n")):
        said = refused(tmp_path, GOOD + f"sources: {{{key}: measured}}\n")
        assert f"sources.{key}: names no number of this file; nearest is {near}" in said


def test_units_become_bytes_and_seconds(tmp_path: Path) -> None:
    """Catches a thousand where 1024 is meant, and microseconds taken as seconds."""
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    cluster = load_cluster(str(path))
    assert cluster.device.memory_bytes == 40 * 2**30
    assert cluster.device.memory_bytes_per_second == 1e12
    assert [link.latency_seconds for link in cluster.links] == pytest.approx([4e-6, 8e-6])


def test_mistakes_are_one_line_with_their_place(tmp_path: Path) -> None:
    """Catches a missing link that is found when a group needs it, and keys that do nothing."""
    network = "  network: {devices: 0, gb_per_second: 25, latency_microseconds: 8}\n"
    missing = refused(tmp_path, GOOD.replace(network, ""))
    assert "a link between nodes is missing (the last, nvlink, joins 8)" in missing
    assert "\n" not in missing
    # One line as well where its numbers still have their sources.
    own = (f"links.network.{key}: measured" for key in ("gb_per_second", "latency_microseconds"))
    sources = f"sources: {{{', '.join(own)}}}\n"
    said = refused(tmp_path, GOOD.replace(network, "") + sources)
    assert "links.network: missing, and sources names it; add it, with devices, gb_per_s" in said
    assert "\n" not in said
    inside = "  nvlink: {devices: 8, gb_per_second: 300, latency_microseconds: 4}\n"
    alone = refused(tmp_path, GOOD.replace(inside, ""))
    assert "a link inside a node is missing (the only one, network, joins all)" in alone
    assert "unknown key; nearest is devices" in refused(
        tmp_path, GOOD.replace("devices: 8", "device: 8")
    )
    order = refused(tmp_path, GOOD.replace("devices: 8", "devices: 0"))
    assert "must grow from the first to the last" in order
    assert "bf16 is missing" in refused(tmp_path, GOOD.replace("bf16", "fp16"))


@pytest.mark.parametrize(
    ("name", "meant"),
    (
        ("a100-80g", "write a100-80gb; there"),
        ("A100", "write a100-40gb or a100-80gb; there"),
        ("A100-SXM4-80GB", "write a100-80gb; there"),
        ("h100-80gb", "write h100; there"),
        ("H100 SXM", "write h100; there"),
        ("gb", "write gb200 or gb300; there"),
        ("v100", "no such cluster; there"),
    ),
)
def test_a_name_that_is_none_is_answered_by_what_it_means(name: str, meant: str) -> None:
    """Catches a device taken for another one that is spelled like it."""
    with pytest.raises(ConfigError) as caught:
        load_cluster(name)
    said = str(caught.value)
    assert meant in said and "\n" not in said
    assert "a100-40gb 312/39, a100-80gb 312/79, " in said and "h100 989/79, " in said


@pytest.mark.parametrize(
    ("number", "other"),
    (
        ("bf16: 100", "bf16: 312e12"),
        ("gb_per_second: 300", "gb_per_second: 300e9"),
        ("memory_gib: 40", "memory_gib: 42949672960"),
        ("microseconds: 4", "microseconds: .inf"),
        ("microseconds: 4", "microseconds: 1e300"),
        ("watts: 300", "watts: 4.0e8"),
    ),
)
def test_numbers_of_another_unit_are_refused(tmp_path: Path, number: str, other: str) -> None:
    """Catches FLOP/s taken for TFLOP/s, and bytes for gigabytes: the plan would be free."""
    said = refused(tmp_path, GOOD.replace(number, other))
    assert number.partition(":")[0] in said and "\n" not in said


def test_a_generation_is_known_in_any_case(tmp_path: Path) -> None:
    """Catches `Ampere` taken for a device that nobody has calibrated."""
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("ampere", "Ampere"), encoding="utf-8")
    assert load_cluster(str(path)).device.generation == "ampere"
