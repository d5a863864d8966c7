"""Power loss on a real file system: an ext4 image on a loop device, shut down by ioctl.

- After `cut_power` no byte reaches the image. What was not synced is lost, as when a machine loses
  its power. Mounting the image again recovers its journal.
- Two small files are the control of every cut. A synced one must be there afterwards, one that was
  just written must be gone or short.
- A block that the kernel has sent to the device counts as written: the cache of a drive is no part
  of this.

Alternatives considered:
- The device mapper's flakey and log-writes targets, which also drop blocks that were sent but not
  flushed: many kernels are built without the device mapper.
- SIGKILL alone: the page cache survives it, so a missing fsync goes unseen.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Self

EXT4_IOC_SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125
"""`_IOR('X', 125, __u32)` of the kernel's include/uapi/linux/ext4.h."""
NOLOGFLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: neither the journal nor data are written any more."""

MEGABYTES = 256
OPTIONS = "loop,noatime,commit=600"
"""The journal is not committed by time: only a sync makes anything durable."""
SYNCED, UNSYNCED = "control_synced", "control_unsynced"
CONTROL = b"k2train!" * 1024
BUSY_SECONDS = 20.0
TOOLS = ("mkfs.ext4", "mount", "umount")


def cut_power(folder: Path) -> None:
    """Write the unsynced control file, then shut the file system of `folder` down at once.

    Raises OSError when the file system has no such ioctl.
    """
    (folder / UNSYNCED).write_bytes(CONTROL)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(opened, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    finally:
        os.close(opened)


class MountedDisk:
    """Context manager: an ext4 file system at `folder`, or the reason in `problem` why not."""

    def __init__(self, folder: Path, megabytes: int = MEGABYTES):
        self.folder, self.megabytes = folder, megabytes
        self.image = folder.with_suffix(".img")
        self.problem = ""
        self.mounted = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if os.geteuid() != 0:
            self.problem = "mounting needs root"
        elif missing:
            self.problem = f"not installed: {', '.join(missing)}"
        else:
            with self.image.open("wb") as stream:
                stream.truncate(self.megabytes << 20)
            self.problem = _run("mkfs.ext4", "-q", "-F", str(self.image)) or self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted and self._unmount():
            # Processes that still use it must not keep the image alive after the table.
            _run("umount", "--lazy", str(self.folder))
        self.image.unlink(missing_ok=True)

    def remount(self) -> None:
        """Unmount and mount again, which recovers the journal after a cut.

        Raises RuntimeError when that fails, or processes keep the file system busy.
        """
        if problem := self._unmount() or self._mount():
            raise RuntimeError(f"{self.folder}: {problem}")

    def control_problem(self) -> str:
        """What the control files show to be wrong with a cut, after `remount`; "" for nothing."""
        synced, unsynced = self.folder / SYNCED, self.folder / UNSYNCED
        kept = synced.read_bytes() if synced.exists() else b""
        lost = not unsynced.exists() or unsynced.stat().st_size < len(CONTROL)
        unsynced.unlink(missing_ok=True)

        if kept != CONTROL:
            return f"the cut lost a synced file: {len(kept)} of {len(CONTROL)} bytes are left"
        return "" if lost else "the cut lost nothing: a file that was not synced is whole"

    def _mount(self) -> str:
        if problem := _run("mount", "-o", OPTIONS, str(self.image), str(self.folder)):
            return problem
        self.mounted = True

        (self.folder / SYNCED).write_bytes(CONTROL)
        for path in (self.folder / SYNCED, self.folder):
            _sync(path)
        return ""

    def _unmount(self) -> str:
        deadline = time.monotonic() + BUSY_SECONDS
        # A process that was just killed may hold its files for a moment.
        while (problem := _run("umount", str(self.folder))) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.mounted = bool(problem)
        return problem


def _run(*command: str) -> str:
    """Run a command; returns what it complained about, "" when it succeeded."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return done.stderr.strip() or f"{command[0]} ended with {done.returncode}"


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
