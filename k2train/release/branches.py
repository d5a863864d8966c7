"""Git branches of released checkpoints: a repository for each stage, with a branch for each one.

- `OUT.branches/STAGE.git`, bare and beside the release: `git clone -b ckpt_NNN` makes the folder
  that transformers loads. `main` is the newest. It can be pushed to a hub of models.
- A branch is one commit without history, so a clone of one branch has the bytes of one checkpoint.
  Its date is that of the save, and the same release makes the same commits.
- `.gitattributes` names the weights for LFS, as hubs expect; the files themselves are in git.
- After writing, git's hash of every file is compared with the file in the release.

Alternatives considered:
- Branches inside the release: every byte of the models would be there twice.
- Pointers of LFS: a clone would need a server that has the files.
"""

import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from hashlib import sha1
from pathlib import Path
from shutil import which
from typing import IO

from k2train.errors import RunError, UnavailableError
from k2train.files import OwnFolder, sync_directory
from k2train.record.events import CheckpointSaved
from k2train.release.stage import Stage
from k2train.retry import exists_retried, list_retried, open_retried, stat_retried

MAIN = "main"
ATTRIBUTES = ".gitattributes"
_ATTRIBUTES = b"".join(
    b"*.%b filter=lfs diff=lfs merge=lfs -text\n" % kind
    for kind in (b"safetensors", b"model", b"bin")
)
_BLOCK_BYTES = 2**22


def branches_of(out: Path) -> Path:
    """Return the folder of the repositories of the release `out`."""
    return out.with_name(f"{out.name}.branches")


def require_git(out: Path) -> None:
    """Raise RunError without git, and where another release's repositories are."""
    if which("git") is None:
        raise RunError("--branches needs git, which is not installed: leave the option out")
    place = branches_of(out)
    if exists_retried(place) and not exists_retried(out.with_name(f"{out.name}.unfinished")):
        raise RunError(f"{place} exists; name another folder, or remove it")


def write_branches(release: Path, stages: Sequence[Stage], place: Path) -> None:
    """Write the repositories of a release's checkpoints to `place`, or find them there.

    Raises RunError where `place` has others, or is being written; UnavailableError, OSError.
    """
    if not exists_retried(place):
        growing = place.with_name(f"{place.name}.unfinished")
        try:
            own = OwnFolder(growing)
        except BlockingIOError:
            raise RunError(f"{growing} is being written by another release: wait for it") from None
        try:
            for stage in stages:
                _write(release / stage.name, stage, growing / f"{stage.name}.git")
            sync_directory(growing)
            growing.rename(place)
            sync_directory(place.absolute().parent)
        finally:
            own.close()
    for stage in stages:
        for path in stage.checkpoints:
            repository = place / f"{stage.name}.git"
            if _blobs(repository, path.name) != dict(_hashes(release / stage.name / path.name)):
                raise RunError(f"{repository}: {path.name} is not that of the release; remove it")


def _git(repository: Path, *arguments: str) -> list[str]:
    return ["git", f"--git-dir={repository.absolute()}", "-c", "core.fsync=all", *arguments]


def _run(command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UnavailableError(_why(command, done.returncode, done.stderr))
    return done.stdout


def _why(command: Sequence[str], code: int, said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines() or ["no reason given"]
    return f"git {command[4]} ended with {code}: {lines[-1]:.200}"


def _write(folder: Path, stage: Stage, repository: Path) -> None:
    """Write the repository of a stage, whose folder in the release is `folder`."""
    # Without the user's template, which may hold hooks.
    made = ("init", "--quiet", "--bare", "--template=", "--object-format=sha1", "-b", MAIN)
    _run(_git(repository, *made))
    command = _git(repository, "fast-import", "--quiet", "--done")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stderr is not None, "both are pipes"
        try:
            for number, path in enumerate(stage.checkpoints, 1):
                _commit(process.stdin, number, folder / path.name, _saved(stage, path.name))
            process.stdin.write(b"reset refs/heads/%b\nfrom :%d\ndone\n" % (MAIN.encode(), number))
            process.stdin.close()
        except BrokenPipeError:
            # It says why below.
            pass
        said = process.stderr.read()
    if process.returncode:
        raise UnavailableError(_why(command, process.returncode, said))


def _saved(stage: Stage, name: str) -> int:
    """Return when a checkpoint was saved, in seconds since 1970."""
    times = [
        entry.time
        for entry in stage.entries
        if isinstance(entry.event, CheckpointSaved) and entry.event.checkpoint == name
    ]
    return int(datetime.fromisoformat(times[-1]).timestamp())


def _commit(stream: IO[bytes], mark: int, folder: Path, seconds: int) -> None:
    """Write a commit of a folder's files to the stream of `git fast-import`."""
    message = f"{folder.parent.name} {folder.name}\n".encode()
    stream.write(b"commit refs/heads/%b\nmark :%d\n" % (folder.name.encode(), mark))
    stream.write(b"committer k2train <> %d +0000\n" % seconds)
    stream.write(b"data %d\n%b\n" % (len(message), message))
    for path in list_retried(folder):
        _file(stream, path)
    stream.write(b"M 100644 inline %b\ndata %d\n" % (ATTRIBUTES.encode(), len(_ATTRIBUTES)))
    stream.write(_ATTRIBUTES + b"\n")


def _file(stream: IO[bytes], path: Path) -> None:
    facts = stat_retried(path)
    assert facts is not None and path.name.isprintable(), "a folder that was just exported"
    stream.write(b"M 100644 inline %b\ndata %d\n" % (path.name.encode(), facts.st_size))
    with open_retried(path) as content:
        while block := content.read(_BLOCK_BYTES):
            stream.write(block)
    stream.write(b"\n")


def _blobs(repository: Path, branch: str) -> dict[str, str]:
    """Return git's hashes of the files of a branch, by name; none without the branch."""
    listed = _run(_git(repository, "ls-tree", "-r", "-z", f"refs/heads/{branch}"))
    lines = [line.partition("\t") for line in listed.decode().split("\0") if line]
    return {name: facts.split()[2] for facts, _, name in lines}


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield names and git's hashes of the files that the branch of a folder must have."""
    yield ATTRIBUTES, sha1(b"blob %d\0" % len(_ATTRIBUTES) + _ATTRIBUTES).hexdigest()
    for path in list_retried(folder):
        facts = stat_retried(path)
        assert facts is not None, "a folder that was just exported"
        digest = sha1(b"blob %d\0" % facts.st_size)
        with open_retried(path) as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
        yield path.name, digest.hexdigest()
