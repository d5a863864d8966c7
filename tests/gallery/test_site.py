"""Files of a gallery: pages that name data which are gone, and a folder of something else."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2train.errors import RunError
from k2train.gallery import site as site_module
from k2train.gallery.site import data_script, write_site

PAGES = [("index.html", "<p>{files}</p>"), ("other.html", "{files}")]
HOSTILE = "</script><!-- \u2028\u202e\x00\ud800 \" ' \\ `${x}` \U0001f600"


def folders(site: Path) -> list[str]:
    return sorted(path.name for path in site.iterdir() if path.is_dir())


def test_pages_name_what_is_there(tmp_path: Path) -> None:
    """Catches old data that stay, and a page that still loads them."""
    site = tmp_path / "new" / "site"
    first = write_site(site, PAGES, [("a", 1)])
    old = folders(site)
    assert first.page == site / "index.html" and len(old) == 1
    assert (site / "index.html").read_text() == f"<p>{old[0]}</p>"
    write_site(site, PAGES, [("a", 2)])
    assert folders(site) != old and (site / "other.html").read_text() == folders(site)[0]
    assert first.bytes >= sum(path.stat().st_size for path in (site / folders(site)[0]).iterdir())


def test_the_same_content_has_the_same_name(tmp_path: Path) -> None:
    """Catches a gallery that differs from itself: a name by the clock."""
    write_site(tmp_path / "a", PAGES, [("a", HOSTILE)])
    write_site(tmp_path / "b", PAGES, [("a", HOSTILE)])
    write_site(tmp_path / "b", PAGES, [("a", HOSTILE)])
    assert folders(tmp_path / "a") == folders(tmp_path / "b")


def test_a_failure_leaves_the_old_gallery(tmp_path: Path) -> None:
    """Catches pages that are replaced before their data are whole, and half a folder left."""
    write_site(tmp_path / "site", PAGES, [("a", 1)])
    before = {p: p.read_bytes() for p in (tmp_path / "site").rglob("*") if p.is_file()}

    def broken() -> Iterator[tuple[str, Any]]:
        yield "a", 2
        raise RunError("an answer is damaged")

    with pytest.raises(RunError, match="damaged"):
        write_site(tmp_path / "site", PAGES, broken())
    assert {p: p.read_bytes() for p in (tmp_path / "site").rglob("*") if p.is_file()} == before


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    """Catches a container, where each start has the number of the one that was killed."""
    write_site(tmp_path / "site", PAGES, [("a", 1)])
    left = tmp_path / "site" / f"files_new_{os.getpid()}.tmp"
    left.mkdir()
    (left / "data_a.js").write_text("gallery.take(")
    write_site(tmp_path / "site", PAGES, [("a", 2)])
    assert len(folders(tmp_path / "site")) == 1 and not left.exists()


def test_two_at_once_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one that removes the folder that the other one fills, or names."""
    monkeypatch.setattr(site_module.os, "getpid", threading.get_ident)
    site = tmp_path / "site"
    second = threading.Thread(target=write_site, args=(site, PAGES, [("a", 2)]))

    def data() -> Iterator[tuple[str, Any]]:
        second.start()
        # Time enough to do the damage; none is lost where it waits.
        second.join(0.5)
        yield "a", 1

    write_site(site, PAGES, data())
    second.join()
    assert (site / "other.html").read_text() == folders(site)[0]
    assert (site / folders(site)[0] / "data_a.js").read_bytes() == data_script("a", 2)


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    """Catches a home folder that is filled with pages."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is no gallery; name a new folder"):
        write_site(tmp_path / "mine", PAGES, [])
    with pytest.raises(RunError, match="is no folder"):
        write_site(tmp_path / "mine" / "letter.txt", PAGES, [])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "empty").mkdir()
    write_site(tmp_path / "empty", PAGES, [])


def test_data_are_plain_ascii() -> None:
    """Catches a text that ends its script, or that no encoder can write."""
    script = data_script("a", {"text": HOSTILE})
    assert script.isascii() and script.count(b"\n") == 1 and b"\0" not in script
    start, end = b'gallery.take("a",', b");\n"
    assert script.startswith(start) and script.endswith(end)
    assert json.loads(script[len(start) : -len(end)]) == {"text": HOSTILE}
    with pytest.raises(ValueError):
        data_script("a", float("nan"))
