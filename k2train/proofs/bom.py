"""Machine-learning bill of materials of a model: CycloneDX 1.6 with a model card, as JSON.

- The model with its parameters, metrics and energy; chunks as data with hashes; the software that
  trained it; the files of its checkpoints with hashes. https://cyclonedx.org/docs/1.6/json/
- The serial number is made of the content, so the same record gives the same document.

Alternatives considered:
- `cyclonedx-python-lib` as the writer: its model of a component has no model card. Its validator
  checks what is written here.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from k2train.proofs.facts import Stage, chunk_files
from k2train.proofs.folder import CoveredFile, checkpoint_files

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
PYPI = frozenset({"torch", "numpy", "safetensors"})
"""Packages that are known by these names in the Python Package Index."""
FILE_PREFIX = "file:"

Json = dict[str, Any]


def bill_of_materials(files: Sequence[CoveredFile], stages: Sequence[Stage]) -> Json:
    """Return the bill of materials of a folder and its runs. Raises RunError without weights."""
    last = stages[-1]
    data = [one for stage in stages for one in _chunks(stage)]
    software = _software(stages)
    listed = [_file(file) for file in checkpoint_files(files)]
    refs = [one["bom-ref"] for one in (*data, *software)]

    content: Json = {
        "metadata": {
            "timestamp": last.ended,
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": last.name,
                **_version(files, last),
                "modelCard": _card(stages, [one["bom-ref"] for one in data]),
                "properties": _properties(stages),
            },
        },
        "components": [*data, *software, *listed],
        "dependencies": [
            {"ref": "model", "dependsOn": refs},
            *({"ref": one["bom-ref"], "dependsOn": ["model"]} for one in listed),
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(content, sort_keys=True))
    head = {"$schema": SCHEMA, "bomFormat": "CycloneDX", "specVersion": "1.6"}
    return head | {"serialNumber": f"urn:uuid:{serial}", "version": 1} | content


def bom_digests(bom: Any) -> dict[str, str]:
    """Return name -> SHA-256 of the folder's files that a bill lists. Raises ValueError."""
    try:
        return {
            str(one["name"]): str(one["hashes"][0]["content"])
            for one in bom["components"]
            if one["bom-ref"].startswith(FILE_PREFIX)
        }
    except (TypeError, LookupError, AttributeError):
        raise ValueError("is no bill of materials with files") from None


def _version(files: Sequence[CoveredFile], stage: Stage) -> Json:
    """Name the last checkpoint of the folder; an export of one does not say which."""
    parts = {part for file in files for part in file.name.split("/")}
    names = [one.event.checkpoint for one in stage.checkpoints if one.event.checkpoint in parts]
    return {"version": names[-1]} if names else {}


def _hashes(sha256: str) -> list[Json]:
    return [{"alg": "SHA-256", "content": sha256}]


def _file(file: CoveredFile) -> Json:
    return {
        "type": "file",
        "bom-ref": f"{FILE_PREFIX}{file.name}",
        "name": file.name,
        "hashes": _hashes(file.sha256),
    }


def _chunks(stage: Stage) -> Iterator[Json]:
    for info, name, digest in chunk_files(stage):
        counts = {"rows": info.rows, "tokens": info.tokens} | {
            f"tokens of {subset}": count for subset, count in info.tokens_per_subset.items()
        }
        found: Json = {
            "type": "data",
            "bom-ref": f"data:{stage.name}/{name}",
            "name": f"{stage.name}/{name}",
            "hashes": _hashes(digest),
            "data": [{"type": "dataset", "name": name}],
        }
        if name == info.file:
            found["properties"] = [_property(key, count) for key, count in counts.items()]
        yield found


def _software(stages: Sequence[Stage]) -> list[Json]:
    pairs = sorted({pair for stage in stages for pair in stage.packages.items()})
    found = []
    for name, version in pairs:
        kind = {"python": "platform", "k2train": "application"}.get(name, "library")
        one = {"type": kind, "bom-ref": f"{name}@{version}", "name": name, "version": version}
        if name in PYPI:
            one["purl"] = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
        found.append(one)
    return found


def _property(name: str, value: Any) -> Json:
    return {"name": f"k2train:{name}", "value": str(value)}


def _properties(stages: Sequence[Stage]) -> list[Json]:
    found = []
    for stage in stages:
        view = stage.view
        facts = {
            "parameters": stage.started.parameters,
            "precision": stage.started.precision,
            "steps": view.last_step,
            "trained tokens": view.kept[-1].consumed_tokens if view.kept else None,
            "commit": stage.commit[0],
        } | {
            key: value
            for key, value in stage.config[0].items()
            if key.startswith(("model.", "batch.", "optimizer.", "lr."))
        }
        found += [
            _property(f"{stage.name}/{key}", value)
            for key, value in facts.items()
            if value is not None
        ]
    return found


def _card(stages: Sequence[Stage], datasets: Sequence[str]) -> Json:
    card: Json = {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": "decoder-only transformer in the style of LLaMA",
            "datasets": [{"ref": ref} for ref in datasets],
            "inputs": [{"format": "token ids of text"}],
            "outputs": [{"format": "token ids of text"}],
        }
    }
    if metrics := list(_metrics(stages)):
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    if energy := list(_energy(stages)):
        card["considerations"] = {"environmentalConsiderations": {"energyConsumptions": energy}}
    return card


def _metrics(stages: Sequence[Stage]) -> Iterator[Json]:
    for stage in stages:
        if not stage.checkpoints:
            continue
        last = stage.checkpoints[-1].event
        where = f"{stage.name}/{last.checkpoint}"
        if last.loss is not None:
            yield {"type": "training loss", "value": repr(last.loss), "slice": where}
        if last.held_out_loss is not None:
            yield {"type": "held-out loss", "value": repr(last.held_out_loss), "slice": where}
        for result in stage.results:
            of = f"{stage.name}/{result.checkpoint}: {result.task}, {result.harness}"
            for metric, score in result.scores.items():
                yield {"type": metric, "value": repr(score), "slice": of}


def _energy(stages: Sequence[Stage]) -> Iterator[Json]:
    for stage in stages:
        energy = stage.energy
        if energy is None:
            continue
        found: Json = {
            "activity": "training",
            # The provider is not on record. A list without one says so.
            "energyProviders": [],
            "activityEnergyCost": {"value": energy.kwh, "unit": "kWh"},
            "properties": [_property("run", stage.name), _property("how", energy.how)],
        }
        if energy.tonnes is not None:
            found["co2CostEquivalent"] = {"value": energy.tonnes, "unit": "tCO2eq"}
        yield found
