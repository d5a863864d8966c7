"""Seccomp filter of the code sandbox: system calls that no program of a model may make.

- Memory that limits of a process do not see: System V segments and queues, files in memory.
- Keys of the user, such as Kerberos tickets: a keyring is inherited and has no namespace.
- Calls that no answer to a task needs, and in which many holes of the kernel were.
- Numbers are of x86-64 and aarch64. Elsewhere the filter is empty, and namespaces are the wall.

Alternatives considered:
- libseccomp: a library more, for one list that does not change.
- A list of allowed calls: another interpreter or libc needs another one.

Source: seccomp(2); include/uapi/linux/{filter,seccomp,audit}.h and the tables of system calls of
Linux.
"""

import struct
from collections.abc import Mapping

REFUSED: Mapping[str, tuple[int, int]] = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_secret": (447, 447),
}
"""Name -> number on x86-64 and on aarch64."""
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Name of a machine -> column above, and what the kernel calls it."""
X32 = 0x40000000
"""Calls of the x32 interface have numbers from here on: the same calls once more."""
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4
ALLOW, NOT_PERMITTED = 0x7FFF0000, 0x00050001


def refused_calls(machine: str) -> bytes:
    """Return the filter of a machine (`platform.machine()`); empty for one that is not known."""
    if machine not in ARCHITECTURES:
        return b""
    column, architecture = ARCHITECTURES[machine]
    numbers = sorted(pair[column] for pair in REFUSED.values())
    # A jump counts the instructions that it leaves out; the last instruction refuses.
    end = 4 + len(numbers) + 1
    program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (IF_EQUAL, 0, end - 2, architecture),
        (LOAD, 0, 0, NUMBER_AT),
        (IF_AT_LEAST, end - 4, 0, X32),
        *((IF_EQUAL, end - 5 - at, 0, number) for at, number in enumerate(numbers)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NOT_PERMITTED),
    ]
    return b"".join(struct.pack("HBBI", *one) for one in program)
