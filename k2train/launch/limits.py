"""Limit of open files: raised to what the system allows, and compared with what a start needs.

- Every process of a large job is connected with every other one, and each connection is an open
  file. The usual limit, 1,024 files, is passed at about 500 processes.
- The soft limit is raised to the hard one, which needs no right. The hard limit is the system's.
- A start that needs more is refused before the processes meet: gloo's error would come on any rank,
  minutes later, as "Too many open files".

Alternatives considered:
- `ulimit -n` in a script alone: a start by hand has the shell's limit.
"""

import resource
from contextlib import suppress

from k2train.errors import RunError

USUAL = 4096
"""Files that a launcher asks for where it does not know the world."""


def raise_open_files(needed: int = USUAL) -> int | None:
    """Raise this process's limit of open files as far as it may; return it, None for no limit.

    Processes started from here inherit it. Some systems name a hard limit that they do not grant:
    there the `needed` files are asked for.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, needed):
        if soft == hard or soft == resource.RLIM_INFINITY:
            break
        if wanted == hard or wanted > soft:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                break
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def require_open_files(needed: int, world_size: int) -> None:
    """Raise RunError where a process may not open the `needed` files of a world of this size.

    Raises the limit first.
    """
    limit = raise_open_files(needed)
    if limit is not None and needed > limit:
        raise RunError(
            f"a world of {world_size} processes needs up to {needed} open files a process (each is "
            f"connected with every other one), the limit here is {limit}, and no process may raise "
            "it by itself; raise the hard limit: `ulimit -Hn` as root, LimitNOFILE= in the unit of "
            "slurmd or sshd, /etc/security/limits.conf; `srun --propagate=NOFILE` hands on the one "
            "of the submitting shell"
        )
