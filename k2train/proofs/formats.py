"""Format checks of proofs by the projects that define them: CycloneDX, Croissant, in-toto, DSSE.

- These packages have never heard of this project: a document that they take, others can read.
- They look at the form and the signature. That hashes are those of the files is for `check`.

Alternatives considered:
- Part of every check: they take seconds to import, and need packages that a reader may lack.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2train.proofs.folder import PROOFS
from k2train.proofs.keys import read_public_key
from k2train.proofs.optional import package
from k2train.proofs.write import BOM, CROISSANT, ENVELOPE, PUBLIC_KEY, STATEMENT
from k2train.retry import is_file_retried
from k2train.safe_json import parse_json, read_plain_file


def format_problems(folder: Path) -> list[str]:
    """Check the form of all documents with their projects' packages; one line per problem.

    Raises UserError for a missing package; OSError, UnavailableError.
    """
    place = folder / PROOFS
    checks = {
        BOM: _bill_problem,
        CROISSANT: _description_problem,
        ENVELOPE: _envelope_problem,
        STATEMENT: _statement_file_problem,
    }
    found = []
    for name, check in checks.items():
        # Signed and unsigned provenance exclude each other, and a run may have no data.
        if is_file_retried(place / name) and (problem := check(place / name)):
            found.append(f"{PROOFS}/{name}: {' '.join(problem.split())[:600]}")
    return found


def _bill_problem(path: Path) -> str | None:
    with package("cyclonedx-python-lib"):
        import jsonschema  # noqa: F401
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text("utf-8"))
    return None if problem is None else str(problem.data)


def _description_problem(path: Path) -> str | None:
    with package("mlcroissant"):
        from mlcroissant import Dataset, ValidationError
    try:
        with _quiet():
            Dataset(jsonld=str(path))
    except ValidationError as error:
        return str(error)
    return None


def _envelope_problem(path: Path) -> str | None:
    with package("securesystemslib"):
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import VerificationError
        from securesystemslib.signer import SSlibKey
    content = parse_json(read_plain_file(path))
    key = read_public_key(path.parent / PUBLIC_KEY)
    try:
        # Reading an envelope takes it apart.
        named = content["signatures"][0]["keyid"]
        envelope = Envelope.from_dict(content)
        envelope.verify([SSlibKey.from_crypto(key, keyid=named)], 1)
    except (VerificationError, LookupError, TypeError, ValueError) as error:
        return str(error) or "is no envelope"
    return _statement_problem(envelope.payload)


def _statement_file_problem(path: Path) -> str | None:
    return _statement_problem(read_plain_file(path))


def _statement_problem(content: bytes) -> str | None:
    with package("in-toto-attestation"):
        from google.protobuf import json_format
        from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
        from in_toto_attestation.v1.statement import Statement
        from in_toto_attestation.v1.statement_pb2 import Statement as Message
    try:
        statement = Statement.copy_from_pb(json_format.Parse(content, Message()))
        statement.validate()
        predicate = json_format.MessageToDict(statement.pb.predicate)
        json_format.Parse(json.dumps(predicate), Provenance())
    except (json_format.ParseError, ValueError) as error:
        return str(error)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the notes of a library about recommended keys off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
