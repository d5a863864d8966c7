"""Writing proofs: what is there afterwards, what never is, and what a failure leaves."""

import base64
import json
import platform
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from k2train.errors import RunError, UserError
from k2train.files import OwnFolder
from k2train.proofs import write
from k2train.proofs.check import check_proofs
from k2train.proofs.write import UNSIGNED, write_proofs
from tests.proofs.conftest import Made
from tests.support.kills import killed_before_writes
from tests.support.tiny_corpus import tree_of

SIGNED = {
    "SHA256SUMS",
    "bom.cdx.json",
    "croissant.json",
    "model.sig",
    "open.json",
    "provenance.dsse.json",
    "public_key.pem",
    "training_content.json",
    "training_content.md",
}


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "proofs").iterdir()}


@pytest.fixture
def release(made: Made, tmp_path: Path) -> Path:
    """A copy of the release without proofs."""
    return Path(shutil.copytree(made.release, tmp_path / "release"))


def test_all_documents_are_there(signed: Path) -> None:
    """Catches a format that is left out, and a temporary file that stays."""
    assert names(signed) == SIGNED
    assert not [path for path in signed.rglob("*.tmp*")]


def test_without_a_key_nothing_is_signed(release: Path, made: Made) -> None:
    """Catches an open point that nobody hears of, and proofs of before that stay."""
    write_proofs(release, [made.run], made.key)
    points = write_proofs(release, [made.run])
    assert points[0] == UNSIGNED
    assert points == json.loads((release / "proofs" / "open.json").read_text())
    unsigned = {"model.sig", "public_key.pem", "provenance.dsse.json"}
    assert names(release) == SIGNED - unsigned | {"provenance.json"}
    assert check_proofs(release) == []


def test_no_name_of_a_machine_or_person_is_written(signed: Path, made: Made) -> None:
    """Catches a path, an account, a host or a private key in what is published."""
    secrets = [str(made.run.parents[1]), "someone", "PRIVATE KEY"]
    secrets += [str(Path.home())] if str(Path.home()) != "/" else []
    envelope = json.loads((signed / "proofs" / "provenance.dsse.json").read_text())
    texts = [*tree_of(signed / "proofs").values(), base64.b64decode(envelope["payload"])]
    for secret in secrets:
        assert not any(secret.encode() in text for text in texts), secret
    # As a word: a short name may stand within a signature's letters.
    host = re.compile(rb"(?<!\w)" + re.escape(platform.node().encode()) + rb"(?!\w)")
    assert not any(host.search(text) for text in texts), platform.node()


def test_the_same_record_gives_the_same_documents(release: Path, made: Made) -> None:
    """Catches a number that is drawn, or a time that is not of the record."""
    write_proofs(release, [made.run])
    first = tree_of(release / "proofs")
    write_proofs(release, [made.run])
    # The date of the summary may pass midnight between the two.
    dated = {"training_content.json", "training_content.md", "SHA256SUMS"}
    again = tree_of(release / "proofs")
    assert {n: c for n, c in first.items() if n not in dated} == {
        n: c for n, c in again.items() if n not in dated
    }


def test_two_stages_are_one_model(release: Path, made: Made) -> None:
    """Catches a stage whose config, chunks or open points are left out."""
    one = write_proofs(release, [made.run])
    first = json.loads((release / "proofs" / "provenance.json").read_text())
    two = write_proofs(release, [made.run, made.run])
    second = json.loads((release / "proofs" / "provenance.json").read_text())
    counts = []
    for statement in (first, second):
        build = statement["predicate"]["buildDefinition"]
        stages = len(build["externalParameters"]["stages"])
        counts.append((stages, len(build["resolvedDependencies"])))
    assert counts[1] == (2 * counts[0][0], 2 * counts[0][1])
    assert len(two) > len(one)


def test_an_export_alone_is_enough(made: Made, tmp_path: Path) -> None:
    """Catches proofs that need more of a folder than weights."""
    weights = next((made.run / "checkpoints" / "ckpt_002" / "model").iterdir())
    folder = tmp_path / "export"
    folder.mkdir()
    shutil.copy(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    points = write_proofs(folder, [made.run], made.key)
    assert any("data files are not in the folder" in line for line in points)
    assert check_proofs(folder) == []
    bom = json.loads((folder / "proofs" / "bom.cdx.json").read_text())
    assert "version" not in bom["metadata"]["component"], "an export names no checkpoint"


def test_a_run_in_its_own_folder(made: Made, tmp_path: Path) -> None:
    """Catches proofs of a run that make it unusable for its own checks."""
    run = Path(shutil.copytree(made.run, tmp_path / "tiny"))
    write_proofs(run, [run], made.key)
    assert check_proofs(run) == []


def test_mistakes_leave_the_folder_as_it_was(release: Path, made: Made, tmp_path: Path) -> None:
    """Catches proofs that are half written, and a key that is published."""
    inside = release / "key"
    shutil.copy(made.key, inside)
    before = tree_of(release)
    for runs, key, words in (
        ([], None, "give the run"),
        ([made.run], inside, "is inside"),
        ([made.run], tmp_path / "none", "cannot be read"),
        ([made.run], None, "holds a private key"),
        ([tmp_path], None, "ledger.jsonl"),
    ):
        with pytest.raises(UserError, match=words):
            write_proofs(release, runs, key)
    assert tree_of(release) == before


def test_killed_at_any_write_and_again(release: Path, made: Made) -> None:
    """Catches proofs that are whole in part, and what a kill leaves for the next start."""
    before = tree_of(release)
    for number in killed_before_writes(partial(write_proofs, release, [made.run], made.key), 6):
        there = (release / "proofs").exists()
        assert not there or check_proofs(release), number
    assert check_proofs(release) == []
    assert {name for name in tree_of(release) if not name.startswith("proofs/")} == set(before)


def test_two_at_once_do_not_mix(release: Path, made: Made) -> None:
    """Catches documents of two processes in one folder, and a signature of half of them."""
    for name in ("proofs.tmp", "proofs"):
        held = OwnFolder(release / name)
        with pytest.raises(UserError, match=f"{name} is being written by another process"):
            write_proofs(release, [made.run])
        held.close()
    with pytest.raises(RunError, match="is not a folder"):
        write_proofs(release / "none", [made.run])
    assert not (release / "none").exists()


def test_a_kill_before_the_signature_is_found(
    release: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches documents without their signature that pass for unsigned ones."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_signature", killed)
        with pytest.raises(KeyboardInterrupt):
            write_proofs(release, [made.run], made.key)
    assert check_proofs(release) == ["proofs/model.sig: is missing"]

    (release / "proofs.tmp").mkdir()
    (release / "proofs.tmp" / "left").write_text("by a start that was killed")
    write_proofs(release, [made.run], made.key)
    assert check_proofs(release) == [] and not (release / "proofs.tmp").exists()
