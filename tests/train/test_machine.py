"""What a machine is, read from files as Linux writes them."""

import resource
from pathlib import Path

import pytest

from k2train.train.machine import FreeMemory, cpu_has_bf16, free_memory, has_accelerator

GIB = 2**30
PLAIN = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 avx2 avx512f bmi2\n"
KINDS = {
    PLAIN: False,
    PLAIN.replace("avx512f", "avx512f avx512_bf16"): True,
    PLAIN.replace("avx512f", "amx_tile amx_bf16"): True,
    "processor\t: 0\nFeatures\t: fp asimd i8mm bf16 sve\n": True,
    "processor\t: 0\nFeatures\t: fp asimd crc32\n": False,
    "processor\t: 0\n": None,
}


@pytest.mark.parametrize(("text", "expected"), KINDS.items(), ids=map(str, KINDS.values()))
def test_bf16_instructions(text: str, expected: bool | None, tmp_path: Path) -> None:
    """Catches a note on a machine that has them, or where nobody knows."""
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is expected
    assert cpu_has_bf16(tmp_path / "none") is None


def test_an_accelerator_shows_a_device_file(tmp_path: Path) -> None:
    assert not has_accelerator(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert has_accelerator(tmp_path)


def machine(root: Path, group: str, files: dict[str, str]) -> Path:
    """A root with 8 GiB available, 1 GiB of swap, and these files of a cgroup."""
    files = files | {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"
        "SwapTotal: 2097152 kB\nSwapFree: 1048576 kB\n",
        "proc/self/cgroup": group,
        "proc/self/statm": "1000 1 1 1 0 1 0\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def group_files(folder: str, limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(used),
        # Of what the kernel can drop, a quarter is slab.
        f"{folder}/memory.stat": (
            f"anon 5\nfile {cached // 4 * 3}\nslab_reclaimable {cached // 4}\n"
        ),
    }


def test_the_cgroup_of_a_parent_counts(tmp_path: Path) -> None:
    """Catches a job's limit that is set one level above its process, and cache taken for used."""
    files = group_files("sys/fs/cgroup/job", str(4 * GIB), 3 * GIB, 2 * GIB)
    files |= group_files("sys/fs/cgroup/job/step", "max", 3 * GIB, 0)
    found = free_memory(machine(tmp_path, "0::/job/step\n", files))
    assert FreeMemory(3 * GIB, 4 * GIB, "left in this job's cgroup", True) in found
    assert found[0] == FreeMemory(
        9 * GIB, 18 * GIB, "available on this machine (MemAvailable)", True
    )


def test_every_limit_of_the_groups_counts(tmp_path: Path) -> None:
    """Catches one that can never be met hidden by one that others use up now."""
    files = group_files("sys/fs/cgroup/job", str(8 * GIB), 8 * GIB, 0)
    files |= group_files("sys/fs/cgroup/job/step", str(2 * GIB), 0, 0)
    found = free_memory(machine(tmp_path, "0::/job/step\n", files))
    groups = [(one.free_bytes, one.total_bytes) for one in found if "cgroup" in one.limit]
    assert groups == [(2 * GIB, 2 * GIB), (0, 8 * GIB)]


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/job"
    files = {
        f"{folder}/memory.limit_in_bytes": str(2 * GIB),
        f"{folder}/memory.usage_in_bytes": str(GIB),
        f"{folder}/memory.stat": "total_cache 0\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
        "sys/fs/cgroup/memory/memory.stat": "total_cache 0\n",
    }
    found = free_memory(machine(tmp_path, "5:cpu:/\n4:memory:/job\n", files))
    assert [one.free_bytes for one in found if "cgroup" in one.limit] == [GIB]


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    """Catches a refusal on a system without /proc."""
    assert free_memory(tmp_path) == []


def test_ulimit_counts_for_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    (limit,) = (one for one in free_memory(machine(tmp_path, "", {})) if "ulimit" in one.limit)
    assert not limit.shared and limit.free_bytes == GIB - 1000 * resource.getpagesize()
