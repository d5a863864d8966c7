"""The formats' own validators."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from k2train.errors import UserError
from k2train.proofs.formats import format_problems
from k2train.proofs.write import write_proofs
from tests.proofs.conftest import Made


def test_all_take_our_documents(signed: Path) -> None:
    """Catches a document that only this project reads."""
    assert format_problems(signed) == []


@pytest.mark.parametrize(
    ("document", "old", "new"),
    [
        ("bom.cdx.json", '"modelParameters"', '"modelParameter"'),
        ("croissant.json", '"cr:RecordSet"', '"cr:Recordset"'),
        ("croissant.json", '"sc:Integer"', '"sc:Nothing"'),
        ("provenance.dsse.json", '"payload": "ew', '"payload": "eW'),
        ("provenance.dsse.json", '"keyid"', '"keyId"'),
    ],
)
def test_each_sees_a_fault(own: Path, document: str, old: str, new: str) -> None:
    """Catches a validator that is asked, and not heard."""
    path = own / "proofs" / document
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    (line,) = format_problems(own)
    assert line.startswith(f"proofs/{document}: ") and "\n" not in line


def test_an_unsigned_statement_is_read(made: Made, tmp_path: Path) -> None:
    """Catches a statement that is only looked at inside an envelope."""
    release = Path(shutil.copytree(made.release, tmp_path / "release"))
    write_proofs(release, [made.run])
    assert format_problems(release) == []
    path = release / "proofs" / "provenance.json"
    statement = json.loads(path.read_text())
    for change in ({"subject": []}, {"predicate": {"buildDefinitions": {}}}, {"other": 1}):
        path.write_text(json.dumps(statement | change))
        (line,) = format_problems(release)
        assert line.startswith("proofs/provenance.json: ")


def test_a_missing_package_names_the_extra(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that passes because its validator is not there."""
    monkeypatch.setitem(sys.modules, "mlcroissant", None)
    with pytest.raises(UserError, match=r"mlcroissant.*k2train\[release\]"):
        format_problems(signed)
