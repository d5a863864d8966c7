"""The emulation itself: what it refuses, counts and computes.

Would catch an emulation that lets a fault of the code pass: one that computes mixed devices,
misses a wait, hands out clean memory, or has a wrong twin of a GPU's kernel.
"""

from typing import Any

import pytest

from tests.emulated_cuda.jobs import run_all_job
from tests.support.gloo_pool import GlooPool

MIXED = "RuntimeError: Expected all tensors to be on the same device: aten::"
COPY = "copy to cpu (pageable) 1"
UPLOAD = "copy to cuda (pageable) 1"


@pytest.fixture(scope="module")
def found(cuda_pool: GlooPool) -> dict[str, Any]:
    (made,) = cuda_pool.run(1, run_all_job, "tests.emulated_cuda.checks")
    assert isinstance(made, dict)
    return made


def test_mixed_devices_are_refused(found: dict[str, Any]) -> None:
    mixed = dict(found["mixed_devices"])
    assert mixed.pop("scalar") == ""
    for what, error in mixed.items():
        assert error.startswith(MIXED) and "cpu, cuda:0" in error, what


def test_every_wait_is_counted(found: dict[str, Any]) -> None:
    """Catches a wait that is missed, and work that is called a wait."""
    read = "read (aten::_local_scalar_dense) 1"
    assert found["waits"] == {
        "item": [read],
        "tolist": [COPY],
        "truth": [read],
        "equal": ["read (aten::equal) 1"],
        "nonzero": ["read (aten::nonzero) 1"],
        "mask": ["read (aten::index) 1"],
        "cpu": [COPY],
        "upload": [UPLOAD],
        "late upload": ["copy to cuda (pageable, asynchronous) 1"],
        "tensor": ["stream synchronize 1"],
        "blocking copy": ["copy to cpu (pinned) 1"],
        "synchronize": ["device synchronize 1"],
        "stream": ["stream synchronize 1"],
        "pinned download": [],
        "pinned upload": [],
        "computing": [],
        "filling": [],
    }


def test_device_memory_holds_what_was_written(found: dict[str, Any]) -> None:
    """Catches results in another memory than the tensor's, fresh memory that is clean, and an
    allocation beyond the device's memory.
    """
    memory = found["memory"]
    x = [[0.0, 10.0, 20.0, 30.0], [4.0, 5.0, 6.0, 7.0], [8.0, 90.0, 100.0, 110.0]]
    assert memory["x"] == x
    assert memory["out"] == [[value + 1 for value in row] for row in x]
    assert memory["same"] and memory["strides"] == (1, 4)
    assert memory["bytes"] == 4 << 20
    assert memory["fresh"], "memory that nobody has written is NaN"
    assert memory["full"].startswith("OutOfMemoryError: CUDA out of memory")
    assert memory["pinned"] == (True, False)
    assert memory["capability"] == (9, 0)
    assert memory["devices"] == ("cuda:1", 4)


def test_a_kernel_that_would_run_is_an_error(found: dict[str, Any]) -> None:
    """Catches an operation that gets around the emulation, and one that no GPU has."""
    assert "CUDA error" in found["launches"]["around"]
    assert found["launches"]["integers"].startswith("NotImplementedError: aten::mm")


def test_backward_threads_are_emulated(found: dict[str, Any]) -> None:
    assert found["threads"] == ["cuda:0", "[6.0, 6.0, 6.0]", "True"]


def test_a_collective_that_is_not_waited_for_is_seen(found: dict[str, Any]) -> None:
    """Catches an emulation in which a result is there at once, or in which an input may be
    written while NCCL reads it.
    """
    exchanges = found["exchanges"]
    assert str(exchanges["early"]) == "[nan, nan]"
    assert exchanges["late"] == [1.0, 1.0]
    assert exchanges["changed"] == (
        "RuntimeError: c10d::_allgather_base_: its input was written while it was under way"
    )
    assert exchanges["whole"] == [1, 1]


def test_events_tell_the_time(found: dict[str, Any]) -> None:
    milliseconds, error = found["events"]
    assert milliseconds >= 20.0
    assert error, "an event that was not recorded has no time"


def test_twins_of_attention_compute_attention(found: dict[str, Any]) -> None:
    """bf16 rounds inputs of products to 2^-9 of values of about 1 to 5; fp32 to 2^-24."""
    for name, differences in found["attention"].items():
        bound = 5e-6 if name.startswith("efficient") else 4e-2
        assert max(differences) < bound, (name, differences)
        assert max(differences) > 0, f"{name} ran on the host"


def test_documents_have_twins(found: dict[str, Any]) -> None:
    """Catches a twin that looks over a border. bf16 as above; what is beyond one is of order 1."""
    documents = dict(found["documents"])
    assert min(documents.pop("mistaken")) > 0.3
    for name, differences in documents.items():
        assert 0 < max(differences) < 4e-2, (name, differences)


def test_documents_that_a_gpu_does_not_take_are_refused(found: dict[str, Any]) -> None:
    """Catches a call that would leave rows unwritten on a device, or raise there."""
    refused = dict(found["refused_documents"])
    assert refused.pop("right") == ""
    assert "said to have 11 at most" in refused.pop("short")
    assert "contiguous int32, not torch.int64" in refused.pop("wide")
    assert "are not those of 32 tokens" in refused.pop("few")
    assert refused.pop("host").startswith("RuntimeError: Expected all tensors to be on the same")
    assert "heads of 12" in refused.pop("narrow")
    assert not refused


def test_other_twins_compute_what_the_host_computes(found: dict[str, Any]) -> None:
    assert max(found["kernels"].values()) < 3e-6, found["kernels"]
