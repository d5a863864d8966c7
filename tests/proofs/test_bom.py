"""Bills of materials: CycloneDX's schema takes them, sha256sum checks what they list."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from k2train.proofs.bom import bill_of_materials, bom_digests
from k2train.proofs.facts import read_stages
from k2train.proofs.folder import covered_files
from tests.proofs.conftest import Made, used_files


@pytest.fixture(scope="module")
def bom(made: Made) -> Any:
    """The bill of the release, once through JSON."""
    found = bill_of_materials(covered_files(made.release), read_stages([made.run]))
    return json.loads(json.dumps(found))


def problem_of(bom: Any) -> Any:
    """What CycloneDX's own validator says."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))


def test_cyclonedx_takes_it(bom: Any) -> None:
    """Catches a key in the wrong place; the validator must see one."""
    assert problem_of(bom) is None
    card = bom["metadata"]["component"]["modelCard"]
    card["parameters"] = card.pop("modelParameters")
    assert problem_of(bom) is not None


def test_every_reference_leads_somewhere(made: Made) -> None:
    """Catches a data set of the model card that no component is, and a name that is there twice."""
    bom = bill_of_materials(covered_files(made.release), read_stages([made.run]))
    refs = [one["bom-ref"] for one in bom["components"]]
    assert len(refs) == len({*refs})
    card = bom["metadata"]["component"]["modelCard"]
    named = {one["ref"] for one in card["modelParameters"]["datasets"]}
    wanted = {one for entry in bom["dependencies"] for one in entry["dependsOn"]}
    assert named and named <= {*refs} and wanted <= {*refs, "model"}
    assert named == {f"data:tiny/{path.name}" for path in used_files(made.data)}


def test_it_says_what_the_run_knows(made: Made) -> None:
    """Catches a number of another run, and software that did not train it."""
    (stage,) = read_stages([made.run])
    bom = bill_of_materials(covered_files(made.release), [stage])
    software = {one["name"]: one.get("version") for one in bom["components"]}
    assert software["torch"] == stage.started.environment["packages"]["torch"]
    component = bom["metadata"]["component"]
    assert (component["name"], component["version"]) == ("tiny", "ckpt_002")
    properties = {one["name"]: one["value"] for one in component["properties"]}
    assert properties["k2train:tiny/model.hidden_size"] == "32"
    metrics = component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"training loss", "held-out loss"} == {one["type"] for one in metrics}
    (energy,) = component["modelCard"]["considerations"]["environmentalConsiderations"][
        "energyConsumptions"
    ]
    assert stage.energy is not None
    assert energy["activityEnergyCost"] == {"value": stage.energy.kwh, "unit": "kWh"}


def test_sha256sum_checks_it(own: Path) -> None:
    """Catches a hash of other bytes; one changed byte of the weights must show."""
    bom = json.loads((own / "proofs" / "bom.cdx.json").read_text())
    sums = "".join(f"{digest}  {name}\n" for name, digest in bom_digests(bom).items())

    def holds() -> bool:
        done = subprocess.run(
            ["sha256sum", "-c"], cwd=own, input=sums.encode(), capture_output=True
        )
        return done.returncode == 0

    assert sums.count(".safetensors") == 4 and holds()
    weights = next((own / "ckpt_002").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not holds()


def test_what_is_no_bill_is_one_line() -> None:
    """Catches a traceback for a file from elsewhere."""
    for broken in (None, [], {}, {"components": [1]}, {"components": [{"bom-ref": 1}]}):
        with pytest.raises(ValueError, match="is no bill"):
            bom_digests(broken)
