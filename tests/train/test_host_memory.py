"""malloc settings, observed in processes of their own.

malloc keeps what it was set to, so one process can test one setting only.
"""

import gc
import os
import platform
import subprocess
import sys

import pytest

from k2train.train.host_memory import (
    keep_freed_memory,
    malloc_settings,
    startup_objects_frozen,
)

GLIBC = platform.libc_ver()[0] == "glibc"

# The page faults of 30 blocks of 40 MB taken, filled and freed one after another: larger than what
# malloc by itself would ever learn to keep (32 MiB).
FAULTS = """
import ctypes, resource, sys
from k2train.train.host_memory import keep_freed_memory
print(keep_freed_memory(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
size, faults = 40 * 1024**2, []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[1:]))
"""


def faults(device_type: str, **variables: str) -> tuple[str, int]:
    """Return the message of a new process, and its page faults after the first block."""
    clean = {
        name: value for name, value in os.environ.items() if name not in malloc_settings(os.environ)
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, device_type],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    message, count = done.stdout.splitlines()
    return message, int(count)


@pytest.mark.skipif(not GLIBC, reason="asks glibc")
def test_memory_is_kept_on_a_cpu_only() -> None:
    """Catches a parameter that malloc does not know, and host memory held back where a device
    computes.
    """
    kept, untouched = faults("cpu"), faults("cuda")
    assert (kept[0], untouched[0]) == ("malloc: freed memory is kept", "malloc: default settings")
    assert untouched[1] >= 29, "the machine gives no pages back, so this shows nothing"
    assert kept[1] < 0.1 * untouched[1]


@pytest.mark.skipif(not GLIBC, reason="asks glibc")
@pytest.mark.parametrize(
    ("name", "value"),
    (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.rtld.nns=4")),
)
def test_what_the_user_set_stays(name: str, value: str) -> None:
    """Catches a setting made by hand, for a measurement perhaps, that is silently overruled."""
    message, count = faults("cpu", **{name: value})
    assert message == f"malloc: set by {name}"
    assert count >= 29


def test_other_tunables_are_not_mallocs() -> None:
    """Catches a variable of another part of glibc that is taken for the user's wish."""
    assert (
        malloc_settings({"GLIBC_TUNABLES": "glibc.rtld.nns=4", "PATH": "/bin", "MALLOCATE": "1"})
        == []
    )


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches numbers that mean something else to musl."""
    for name in malloc_settings(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory("cpu") == "malloc: default settings (not glibc)"


def test_a_collection_skips_what_a_start_has_made() -> None:
    """Catches a full collection that looks at every object of the imports while a run trains, and
    objects that are never collected after it.
    """
    # What the tests have frozen themselves.
    gc.unfreeze()
    with pytest.raises(KeyError), startup_objects_frozen():
        assert gc.get_freeze_count() > 1000 and len(gc.get_objects()) < 1000
        raise KeyError("the run failed")
    assert gc.get_freeze_count() == 0 and len(gc.get_objects()) > 1000
    gc.freeze()


def test_what_a_caller_has_frozen_stays_frozen() -> None:
    """Catches the objects of a program that forks its runs, looked at again after each run."""
    gc.freeze()
    before = gc.get_freeze_count()
    # Another thread may drop some of them at any time.
    with startup_objects_frozen():
        assert before // 2 < gc.get_freeze_count() <= before
    assert 1000 < before // 2 < gc.get_freeze_count() <= before
