"""Statements of provenance: in-toto's own types read them, and they name what was used."""

import copy
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message

from k2train.proofs.facts import read_stages
from k2train.proofs.folder import covered_files
from k2train.proofs.statement import covered_digests, lacking_subjects, provenance_statement
from k2train.record.ledger import read_ledger
from tests.proofs.conftest import TOKENIZER, UNREAD, Made, used_files


@pytest.fixture(scope="module")
def statement(made: Made) -> Any:
    """The statement of the release, once through JSON."""
    found = provenance_statement(covered_files(made.release), read_stages([made.run]))
    return json.loads(json.dumps(found))


def digest_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_in_totos_types_read_it(statement: Any) -> None:
    """Catches a key that the standards do not know: their messages refuse one."""
    message = json_format.ParseDict(statement, Message())
    Statement.copy_from_pb(message).validate()
    predicate = json_format.ParseDict(statement["predicate"], Provenance())
    assert predicate.build_definition.build_type and predicate.run_details.builder.id
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"


def test_subjects_are_the_checkpoints(statement: Any, made: Made) -> None:
    """Catches weights that no subject names, and a digest of other bytes."""
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    files = {
        path.relative_to(made.release).as_posix(): digest_of(path)
        for path in made.release.glob("ckpt_*/**/*")
        if path.is_file()
    }
    assert subjects == files and any(name.endswith(".safetensors") for name in files)
    everything = [path for path in made.release.rglob("*") if path.is_file()]
    assert len(covered_digests(statement)) == len(everything)


def test_dependencies_are_what_was_read(statement: Any, made: Made) -> None:
    """Catches a chunk, tokenizer or commit that is left out."""
    listed = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    found = {one["name"]: one["digest"] for one in listed}
    for path in (made.data.path, *used_files(made.data)):
        assert found[f"tiny/data/{path.name}"] == {"sha256": digest_of(path)}
    assert found["tiny/tokenizer"] == {"sha256": TOKENIZER}
    assert not [name for name in found if UNREAD in name], "what no step read is no dependency"
    entries = read_ledger(made.run / "ledger.jsonl")
    start = next(entry.event for entry in entries if entry.event.name == "started")
    assert found["k2train"] == {"gitCommit": start.environment["code"]["commit"]}  # type: ignore[attr-defined]


def test_the_record_says_when_and_how(statement: Any, made: Made) -> None:
    """Catches times and roots that are not those of the ledger and the manifests."""
    details = statement["predicate"]["runDetails"]
    entries = read_ledger(made.run / "ledger.jsonl")
    assert details["metadata"]["startedOn"] == entries[0].time
    assert details["metadata"]["finishedOn"] == entries[-1].time
    records = {one["name"]: one for one in details["byproducts"]}
    assert records["run:tiny/ledger.jsonl"]["digest"]["sha256"] == digest_of(
        made.run / "ledger.jsonl"
    )
    manifest = made.run / "checkpoints" / "ckpt_002" / "manifest.json"
    checkpoint = records["run:tiny/checkpoints/ckpt_002/manifest.json"]
    assert checkpoint["digest"]["sha256"] == digest_of(manifest)
    root = json.loads(manifest.read_text())["state"]["root"]
    assert checkpoint["annotations"]["stateRoot"] == root
    assert checkpoint["annotations"]["step"] == 10


def test_what_is_no_statement_is_one_line() -> None:
    """Catches a traceback for a file from elsewhere."""
    for broken in (None, [], {}, {"subject": [1], "predicate": {}}):
        with pytest.raises(ValueError, match="is no statement"):
            covered_digests(broken)


def test_a_statement_about_less_is_refused(statement: Any, made: Made) -> None:
    """Catches a signed statement of another kind, about nothing, or with weights that a verifier of
    subjects alone never compares.
    """
    files = covered_files(made.release)
    assert lacking_subjects(statement, files) == []
    moved = copy.deepcopy(statement)
    away = moved["subject"].pop()
    moved["predicate"]["runDetails"]["byproducts"].append(away)
    assert covered_digests(moved) == covered_digests(statement)
    assert lacking_subjects(moved, files) == [away["name"]]

    for key, value, says in (
        ("predicateType", "https://in-toto.io/attestation/vulns", "is no statement of provenance"),
        ("_type", "https://in-toto.io/Statement/v0.1", "is no statement of provenance"),
        ("subject", [], "has no subject"),
        ("subject", [*statement["subject"], away], "names a file twice"),
    ):
        with pytest.raises(ValueError, match=says):
            covered_digests({**statement, key: value})
