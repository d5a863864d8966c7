"""Cluster hardware: peak FLOP/s, memory, and the time of a collective over each kind of link.

- A cluster is one kind of device and its links from the inside out: the node (or the NVLink
  domain), then the network between them. `configs/clusters/` holds files of such values.
- A collective is a ring (Patarasuk and Yuan 2009): n ranks move `2 (n-1)/n` of an all-reduce's
  bytes, half of that for a gather or a scatter, and pay a latency for each step.
- A group that spans several nodes is as fast as its slowest link. Its members in one node share
  that node's network ports, so `k` of them have `k` ports together.

Alternatives considered:
- Trees and in-network sums: the published rows do not say which one ran, and a ring is at most
  a few percent off where bytes count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from k2train.errors import ConfigError
from k2train.plan.measured import Measured

GIB = 2**30
EVERY = 2**30
"""More devices than there are."""


@dataclass(frozen=True)
class Device:
    """One device, from its data sheet."""

    name: str
    generation: str
    """Key of its constants: devices of one generation share how near they come to their peak."""
    peak_flops: Mapping[str, float]
    """Dense FLOP/s by precision: bf16, and fp8, mxfp8, nvfp4, fp32 where it has them."""
    memory_bytes: float
    memory_bytes_per_second: float
    watts: float
    sustained: float = 1.0
    """Clock under load, for a part with a power cap, as a share of the uncapped one's."""

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of a precision. Raises ConfigError where the device has none."""
        if precision not in self.peak_flops:
            raise ConfigError(
                f"{self.name} has no peak for {precision}; precisions it has: "
                f"{', '.join(self.peak_flops)}"
            )
        return self.peak_flops[precision]


@dataclass(frozen=True)
class Link:
    """Links of one level, which join `devices` devices."""

    name: str
    devices: int
    """Devices of one domain: 8 of a node, 72 of an NVL72; 0: all there are."""
    bytes_per_second: float
    """Of one device, in one direction."""
    latency_seconds: float


@dataclass(frozen=True)
class Cluster:
    """Devices and their links, innermost first."""

    name: str
    device: Device
    links: tuple[Link, ...]
    measured: Measured | None = None
    """What was measured on it (`tools/calibrate.py`); None: by data sheet and fitted constants."""

    @property
    def node(self) -> int:
        """Devices that the fastest links join; as many as there can be where they join all."""
        return self.links[0].devices or EVERY

    def spans(self, size: int, stride: int = 1) -> int:
        """Level (0: innermost) that a group of `size` ranks, `stride` apart, needs.

        Raises ConfigError when no link reaches so far.
        """
        reach = (size - 1) * stride + 1
        for level, link in enumerate(self.links):
            if link.devices == 0 or reach <= link.devices:
                return level
        raise ConfigError(
            f"cluster {self.name} joins at most {self.links[-1].devices} devices, and a group of "
            f"{size} ranks that are {stride} apart needs {reach}: add a link with devices: 0"
        )

    def ring(self, size: int, stride: int, efficiency: tuple[float, float]) -> tuple[float, float]:
        """(bytes/s of each rank, latency of one step) of a ring over such a group.

        `efficiency` is the share of a link's rate that is reached, inside a node and beyond.
        """
        level = self.spans(size, stride)
        inner = self.links[0]
        rate = inner.bytes_per_second * efficiency[0]
        if level == 0:
            return rate, inner.latency_seconds

        for index in range(1, level + 1):
            inside = self.links[index - 1].devices
            ports = max(1, min(size, inside // stride))
            rate = min(rate, ports * self.links[index].bytes_per_second * efficiency[1])
        # One step in `ports` crosses; a pipelined ring waits for the slowest.
        return rate, self.links[level].latency_seconds

    def all_reduce_seconds(
        self, size_bytes: float, size: int, stride: int, efficiency: tuple[float, float]
    ) -> float:
        """Seconds of an all-reduce of `size_bytes` over `size` ranks, `stride` apart."""
        return 2 * self.gather_seconds(size_bytes, size, stride, efficiency)

    def gather_seconds(
        self, size_bytes: float, size: int, stride: int, efficiency: tuple[float, float]
    ) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size_bytes` in all."""
        if size <= 1 or size_bytes <= 0:
            return 0.0
        rate, latency = self.ring(size, stride, efficiency)
        # Steps inside a node overlap with those between nodes; a tree's depth bounds the rest.
        steps = min(size - 1, self.node + (size - 1).bit_length())
        return size_bytes * (size - 1) / size / rate + steps * latency

    def send_seconds(
        self, size_bytes: float, stride: int, efficiency: tuple[float, float]
    ) -> float:
        """Seconds to send `size_bytes` to the rank that is `stride` further."""
        link = self.links[self.spans(2, stride)]
        share = efficiency[0] if link is self.links[0] else efficiency[1]
        return link.latency_seconds + size_bytes / (link.bytes_per_second * share)
