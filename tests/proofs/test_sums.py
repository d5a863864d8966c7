"""Lists of sums."""

import subprocess
from pathlib import Path

from k2train.files import sha256_file
from k2train.proofs.sums import SUMS, read_sums, sum_problems, sums_text


def test_sha256sum_reads_them_and_every_difference_is_named(tmp_path: Path) -> None:
    """Catches a form of our own, and a file that is added, changed or gone unseen."""
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    listed = {name: sha256_file(tmp_path / name) for name in ("b", "a")}
    (tmp_path / SUMS).write_text(sums_text(listed))
    assert read_sums(tmp_path) == listed and sum_problems(tmp_path, "p") == []
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=tmp_path, check=True)

    (tmp_path / "a").write_text("c")
    (tmp_path / "b").unlink()
    (tmp_path / "new").write_text("new")
    assert sum_problems(tmp_path, "p") == [
        "p/a: is not what was written",
        "p/b: is missing",
        "p/new: was added",
    ]
    assert "p/new: was added" not in sum_problems(tmp_path, "p", ("new",))
    (tmp_path / SUMS).write_bytes(b"\xff")
    assert sum_problems(tmp_path, "p") == [f"p/{SUMS}: is no list of sums"]
    (tmp_path / SUMS).unlink()
    assert sum_problems(tmp_path, "p") == [f"p/{SUMS}: is missing"]
