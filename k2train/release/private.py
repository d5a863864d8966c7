"""Redaction of a run's record: absolute paths, and the names of machines and of their users.

- A path becomes `<path>/NAME` with its last part; a machine `<host>`, a user `<user>`.
- Machines are those of the run's own leases and heartbeats, and this one.
- Only the record is redacted. Other files that hold one of the known folders are refused.

Alternatives considered:
- Refusing every record with a path in it: most runs on a cluster have an absolute one.
"""

import os
import pwd
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.retry import is_folder_retried, list_retried
from k2train.safe_json import read_json

_PATH = re.compile(r"(?<![\w.:/>~-])(?:~|/[\w.+@~-]+)(?:/[\w.+@~-]+)+/?")
_COMMON = {"", "root", "localhost", "user"}
"""Names that say nothing of anybody."""


class Private:
    """What must not leave: `hosts` and `users` as whole words, `roots` wherever they are."""

    def __init__(self, hosts: Iterable[str], users: Iterable[str], roots: Iterable[Path]) -> None:
        named = [(host, "<host>") for host in hosts] + [(user, "<user>") for user in users]
        self._words = [
            (re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])"), sign)
            for word, sign in sorted(set(named), key=lambda pair: -len(pair[0]))
            if word not in _COMMON
        ]
        # A short folder such as / or /tmp names nobody, and is part of many texts.
        texts = {str(root) for root in roots if len(root.parts) > 2}
        self.roots: Sequence[str] = sorted(texts, key=len, reverse=True)
        self.count = 0
        """Values that were replaced so far."""

    @classmethod
    def of(cls, runs: Sequence[Path]) -> "Private":
        """Return what is private of these runs, and of this machine."""
        hosts = {socket.gethostname(), *(host for run in runs for host in _hosts(run))}
        known = pwd.getpwuid(os.getuid())
        roots = {Path.home(), Path.cwd()}
        for run in runs:
            roots |= {run.absolute(), run.absolute().parent, run.resolve(), run.resolve().parent}
        return cls(hosts, {known.pw_name, Path.home().name}, roots)

    def text(self, value: str) -> str:
        """Return a text without what is private."""
        found = value
        if found.startswith("/") and "\n" not in found and len(Path(found).parts) > 2:
            # A value that is a path as a whole, spaces included.
            found = f"<path>/{Path(found).name}"
        for root in self.roots:
            found = found.replace(root, "<path>")
        found = _PATH.sub(lambda path: f"<path>/{Path(path[0]).name}", found)
        for word, sign in self._words:
            found = word.sub(sign, found)
        self.count += found != value
        return found

    def lines(self, value: str) -> str:
        """Return a text of many lines, each without what is private."""
        return "".join(self.text(line) for line in value.splitlines(keepends=True))

    def value(self, value: Any) -> Any:
        """Return a JSON value, every text in it without what is private."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value

    def left_in(self, content: bytes) -> str:
        """Return a known folder that these bytes still hold; "" without one."""
        return next((root for root in self.roots if root.encode() in content), "")


def _hosts(run: Path) -> set[str]:
    """Names of the machines that a run's leases and heartbeats have."""
    found: set[str] = set()
    for folder in (run, run / "watch"):
        for path in list_retried(folder) if is_folder_retried(folder) else ():
            if not path.name.startswith(("lease_", "rank_")) or path.suffix != ".json":
                continue
            try:
                content = read_json(path)
            except (OSError, ValueError):
                # Half a heartbeat of a killed process.
                continue
            content = content if isinstance(content, dict) else {}
            process = content.get("process")
            named = (content, process if isinstance(process, dict) else {})
            found |= {host for one in named if isinstance(host := one.get("host"), str)}
    return found
