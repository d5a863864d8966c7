"""File formats: what a recipe cannot read is refused by name before anything is encoded."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import feather, parquet

from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.sources import recognize
from k2train.data.prepare.sources.listing import list_sources
from k2train.data.prepare.sources.recognize import check_formats, problem_of
from k2train.errors import DataError

DOCUMENTS = [{"id": i, "text": f"the document number {i} of a corpus ä"} for i in range(50)]
JSONL = "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode()
TABLE = arrow.table({"text": [document["text"] for document in DOCUMENTS]})


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(write: Callable[[str], Any]) -> bytes:
    """The bytes of a file that a library writes."""
    write("written")
    return Path("written").read_bytes()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(JSONL)
        archive.addfile(member, io.BytesIO(JSONL))
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jsonl", JSONL)
    return stream.getvalue()


def arrow_stream(path: str) -> None:
    with arrow.OSFile(path, "wb") as sink, arrow.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)


PRETTY = json.dumps(DOCUMENTS[0], indent=2).encode()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tar, "tar archive, which kind jsonl does not read; unpack it"),
        (lambda: gzip.compress(tar()), "gzip, and inside of it tar archive"),
        (zipped, "zip archive"),
        (lambda: written(lambda path: feather.write_feather(TABLE, path)), "Arrow IPC"),
        (lambda: written(arrow_stream), "an Arrow stream"),
        (
            lambda: written(lambda path: parquet.write_table(TABLE, path)),
            "Parquet, which kind jsonl does not read; give it a subset of kind parquet",
        ),
        (lambda: JSONL.decode().encode("utf-16"), "UTF-16, which kind jsonl"),
        (lambda: JSONL.decode().encode("utf-16-le"), "UTF-16, which kind jsonl"),
        (lambda: JSONL.decode().encode("utf-16-be"), "UTF-16, which kind jsonl"),
        (lambda: JSONL.decode().encode("utf-32"), "UTF-32, which kind jsonl"),
        (lambda: json.dumps(DOCUMENTS).encode(), "a JSON array, not JSON lines; write one object"),
        (lambda: json.dumps(DOCUMENTS, indent=1).encode(), "a JSON array"),
        (lambda: PRETTY, "JSON over several lines"),
        (lambda: json.dumps({"text": "x" * 9000, "id": 1}, indent=1).encode(), "JSON over several"),
        (lambda: b"\xef\xbb\xbf" + PRETTY, "JSON over several lines"),
        (lambda: zstandard.compress(PRETTY * 99), "zstd, and inside of it JSON over several"),
        (
            lambda: bz2.compress(json.dumps(DOCUMENTS).encode()),
            "bzip2, and inside of it a JSON arr",
        ),
        (lambda: gzip.compress(lzma.compress(JSONL)), "gzip, and inside of it xz, packed twice"),
        (lambda: b"<!DOCTYPE html>\n<html>404</html>", "an HTML or XML page, not JSON lines"),
        (lambda: LFS, "a Git LFS pointer"),
        (lambda: JSONL, ""),
        (lambda: b"", ""),
        (lambda: b'[1]\n{"text": "x"}\n', ""),
        (lambda: b'{"text": "x"\n{"text": "y"}\n', ""),
        (lambda: b'{\n{"text": "y"}\n', ""),
        (lambda: b'{"text": "x\n{"text": "y"}\n', ""),
        (lambda: b'{"text": "x"}\n[\n', ""),
        (lambda: lzma.compress(JSONL), ""),
        (lambda: bz2.compress(JSONL * 3000), ""),
    ],
)
def test_what_a_file_is(make: Callable[[], bytes], words: str) -> None:
    """Catches a container read as a few broken lines, and a good file that is refused."""
    Path("x.jsonl").write_bytes(make())
    found = problem_of("x.jsonl", "jsonl")
    assert found.startswith(words) if words else found == ""


def test_lz4_as_its_own_program_writes_it() -> None:
    """Catches lz4 that is taken for broken lines."""
    done = subprocess.run(["lz4", "-c"], input=JSONL, capture_output=True, check=True)
    Path("x.jsonl.lz4").write_bytes(done.stdout)
    assert problem_of("x.jsonl.lz4", "jsonl").startswith("lz4, which kind jsonl does not read")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".ZSTD", ".bz2", ".xz"])
def test_an_empty_download_is_no_empty_file(suffix: str) -> None:
    """Catches a failed download that counts as a corpus of nothing."""
    Path("x.jsonl" + suffix).write_bytes(b"")
    assert problem_of("x.jsonl" + suffix, "jsonl").startswith("cut off after 0 bytes")
    Path("x.jsonl" + suffix).write_bytes(JSONL)
    assert "file (it does not begin as one); fetch it again" in problem_of(
        "x.jsonl" + suffix, "jsonl"
    )


def test_parquet_is_parquet() -> None:
    """Catches files under the kind parquet that are something else, and a wrong remedy."""
    good = written(lambda path: parquet.write_table(TABLE, path))
    for content, words in (
        (good, ""),
        (b"", "0 bytes, no Parquet file"),
        (gzip.compress(good), "gzip, not Parquet; unpack it"),
        (written(lambda path: feather.write_feather(TABLE, path)), "Arrow IPC (Feather), not Parq"),
        (JSONL, "not a complete Parquet file (it does not begin as one); fetch it again"),
    ):
        Path("x.parquet").write_bytes(content)
        found = problem_of("x.parquet", "parquet")
        assert found.startswith(words) if words else found == ""


def test_text_may_begin_as_it_likes() -> None:
    """Catches a book that is refused because its first letters are those of a format."""
    for text in (
        "PAR1 is a start",
        "BZh9 too",
        "ORC and elf",
        "[1]",
        "{\n",
        "<p>",
        "RRar! ",
        "5\0",
    ):
        Path("x.txt").write_text(text)
        assert problem_of("x.txt", "text") == ""
    Path("x.txt").write_bytes("Ein Buch".encode("utf-16"))
    assert problem_of("x.txt", "text").startswith("UTF-16, which kind text does not read")


def test_all_bad_files_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a corpus that is mended one file a start, and a screen of a thousand names."""
    Path("web").mkdir()
    for i in range(9):
        Path(f"web/{i}.jsonl").write_bytes(tar() if i % 2 else JSONL)
    Path("bad.parquet").write_bytes(JSONL)
    subsets = {
        "web": {"kind": "jsonl", "paths": ["web/*.jsonl"]},
        "also": {"kind": "jsonl", "paths": ["web/*.jsonl"]},
        "books": {"kind": "parquet", "paths": ["bad.parquet"], "origin": "b"},
    }
    tree = {"name": "s", "output": "out", "seed": 5, "sequence_length": 16, "chunks": 1}
    recipe = Recipe.model_validate({**tree, "tokenizer": {"model": "t"}, "subsets": subsets})
    with pytest.raises(DataError) as caught:
        check_formats(recipe, list_sources(recipe))
    lines = str(caught.value).splitlines()
    folder = Path.cwd()
    assert [line.split(": ")[:2] for line in lines] == [
        *(["subsets.web.paths", f"{folder}/web/{i}.jsonl"] for i in (1, 3, 5, 7)),
        ["subsets.books.paths", f"{folder}/bad.parquet"],
    ]
    monkeypatch.setattr(recognize, "NAMED_FILES", 2)
    with pytest.raises(DataError, match=r"3.jsonl: .*\n5 of 10 files cannot be read; these are"):
        check_formats(recipe, list_sources(recipe))
