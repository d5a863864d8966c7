"""A measured cluster as the YAML that `tools/plan.py --cluster FILE` reads."""

import json

from k2train.plan.hardware import GIB, Cluster
from k2train.planner.measured_section import digits, measured_lines


def cluster_text(cluster: Cluster) -> str:
    """Whole file; `planner.cluster_file` reads the same cluster from it, up to its digits."""
    device, measured = cluster.device, cluster.measured
    assert measured is not None, "a measured cluster"
    copied = device.memory_bytes_per_second / 1e9
    peaks = ", ".join(
        f"{name}: {digits(value / 1e12)}" for name, value in device.peak_flops.items()
    )
    lines = [
        f"# {measured.processor}: measured on {measured.when} with torch {measured.torch}",
        "",
        f"name: {cluster.name}",
        f"source: {json.dumps('measured on ' + measured.when + ' by tools/calibrate.py')}",
        "",
        "device:",
        f"  name: {json.dumps(device.name)}",
        f"  generation: {device.generation}",
        f"  memory_gib: {digits(device.memory_bytes / GIB)}  # of one rank",
        f"  memory_gb_per_second: {digits(copied)}  # of a large copy",
        f"  watts: {digits(device.watts)}  # given, not measured",
        f"  peak_tflops: {{{peaks}}}  # of a large product",
        "",
        "links:  # where a plan has more ranks than were measured",
    ]
    lines += [
        f"  {link.name}: {{devices: {link.devices}, "
        f"gb_per_second: {digits(link.bytes_per_second / 1e9)}, "
        f"latency_microseconds: {digits(link.latency_seconds * 1e6)}}}"
        for link in cluster.links
    ]
    when = json.dumps(f"measured on {measured.when}")
    lines += [
        "",
        "sources:  # a key stands for all numbers below it",
        f"  device: {when}",
        '  device.watts: "given, not measured"',
        f"  links: {when}",
    ]
    return "\n".join([*lines, "", *measured_lines(measured)]) + "\n"
