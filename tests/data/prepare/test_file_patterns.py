"""Patterns of source files: the same files as `glob`, and none left out because of a hiccup."""

import errno
import glob
import os
from pathlib import Path
from typing import Any

import pytest

from k2train import retry
from k2train.data.prepare.source import Contents, Source
from k2train.data.prepare.sources.file_patterns import files_below, matching_paths
from k2train.errors import DataError, UnavailableError

FILES = (
    *("a.jsonl", "b.txt", ".hidden.jsonl", "web/a.jsonl", "web/b.jsonl", "web/.c.jsonl"),
    *("web/deep/er/a.jsonl", "web/deep/[x].jsonl", ".git/a.jsonl", "books/1.txt"),
)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files, hidden ones, and links to a folder and to a file."""
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "linked").symlink_to("web", target_is_directory=True)
    (tmp_path / "books" / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "books" / "gone.txt").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    return tmp_path


PATTERNS = (
    *("*.jsonl", "*", "**", "**/*.jsonl", "web/**", "web/**/*.jsonl", "*/*.jsonl", ".*", ".*/*"),
    *(
        "we?/[ab].jsonl",
        "[!w]*/*",
        "**/deep/**/a.jsonl",
        "**/er",
        "nothing/*",
        "books/gone.txt",
        "boo*/gone.txt",
        "a.jsonl/*",
        "web/*",
    ),
    *("**/**/a.jsonl", "./web/*.jsonl", "web/../*.txt", "web/deep/[[]x].jsonl", "books/*", "b.txt"),
)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", (False, True))
def test_the_same_as_glob(corpus: Path, pattern: str, absolute: bool) -> None:
    """Catches a pattern that means something else than users of a shell expect."""
    pattern = str(corpus / pattern) if absolute else pattern
    expected = {Path(path) for path in glob.glob(pattern, recursive=True)}
    # A dangling link is there for a listing; whoever opens it is told.
    found = matching_paths(pattern)
    assert {path for path in found if path != Path()} == expected - {Path()}
    assert len(found) == len(set(found))


def test_files_below_a_folder(corpus: Path) -> None:
    """Without hidden ones, and without what a link to a folder leads to."""
    found = {path.relative_to(corpus).as_posix() for path in files_below(corpus)}
    visible = {name for name in FILES if not any(p.startswith(".") for p in name.split("/"))}
    assert found == visible | {"books/link.txt", "books/gone.txt"}


class Hiccups:
    """`os.listdir` and `os.stat` of the folder `name` fail so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
        self.left = times

        def failing(real: Any) -> Any:
            def call(path: Any = ".", *rest: Any, **more: Any) -> Any:
                if Path(str(path)).name == name and self.left:
                    self.left -= 1
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
                return real(path, *rest, **more)

            return call

        for function in ("listdir", "stat", "scandir"):
            monkeypatch.setattr(os, function, failing(getattr(os, function)))


@pytest.mark.parametrize("pattern", ("**/*.jsonl", "web/**/*.jsonl", "web/deep/*/*.jsonl"))
def test_a_hiccup_leaves_nothing_out(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """`glob` skips a folder that it cannot list, and the data lack it without a word."""
    whole = set(matching_paths(pattern))
    hiccups = Hiccups(monkeypatch, "deep", 3)
    assert set(matching_paths(pattern)) == whole and hiccups.left == 0
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.01)
    Hiccups(monkeypatch, "deep", 10**9)
    with pytest.raises(UnavailableError, match="deep: Stale file handle"):
        matching_paths(pattern)


def test_a_source_is_read_through_a_hiccup(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a preparation of days that ends because a read failed once."""
    real, calls = os.preadv, [0]

    def preadv(*given: Any) -> int:
        calls[0] += 1
        if calls[0] % 2:
            raise OSError(errno.EIO, "away")
        return real(*given)

    path = corpus / "web" / "a.jsonl"
    contents = Contents(Source("o", "a.jsonl", str(path), path.stat().st_size))
    monkeypatch.setattr(os, "preadv", preadv)
    assert contents.read_all() == b"web/a.jsonl" and calls[0] > 1
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(os, "preadv", lambda *_: _away())
    with pytest.raises(UnavailableError, match="Input/output error"):
        Contents(Source("o", "a.jsonl", str(path), 0)).read_all()
    gone = Source("o", "gone", str(corpus / "gone"), 0)
    with pytest.raises(DataError, match="it existed when the sources were listed"):
        Contents(gone).read_all()


def _away() -> int:
    raise OSError(errno.EIO, "away")
