"""In-toto statement with SLSA provenance: from config, chunks and code to files of checkpoints.

- Statement v1 (https://in-toto.io/Statement/v1) with the predicate of SLSA 1.0
  (https://slsa.dev/spec/v1.0/provenance).
- Subjects are the files of the checkpoints. Every other file of the folder is a by-product, and so
  are the records of the runs, whose names begin with `run:`.
- Chunks, tokenizer, data manifests, parent checkpoints and the code's commit are dependencies.

Alternatives considered:
- A subject for each folder: a digest of a folder has no standard form.
- Trees of `in_toto_attestation`: its numbers become floats, and a statement needs no package.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from k2train.data.manifest import MANIFEST_NAME
from k2train.files import sha256_file
from k2train.proofs.facts import Stage, chunk_files, is_sha256
from k2train.proofs.folder import CoveredFile, checkpoint_files
from k2train.record.events import Resumed, Started, of_kind
from k2train.retry import is_file_retried

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:k2train:pretraining:v1"
BUILDER = "urn:k2train:train"
DATA = "data"
RUN_PREFIX = "run:"
RECORDS = ("ledger.jsonl", "metrics.jsonl", "state_roots.jsonl", "held_out.jsonl", "config.yaml")
"""Files of a run's record."""

Json = dict[str, Any]


def provenance_statement(files: Sequence[CoveredFile], stages: Sequence[Stage]) -> Json:
    """Return the statement of a folder's files and the runs that made them.

    Raises RunError for a folder without weights; OSError, UnavailableError.
    """
    subjects = checkpoint_files(files)
    others = sorted({*files} - {*subjects})
    byproducts = [_file(file) for file in others]
    for stage in stages:
        byproducts.extend(_records(stage))
        byproducts.extend(_manifests(stage))

    return {
        "_type": STATEMENT_TYPE,
        "subject": [_file(file) for file in subjects],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "stages": [{"run": s.name, "config": s.config[0]} for s in stages]
                },
                "internalParameters": {"stages": [_internals(stage) for stage in stages]},
                "resolvedDependencies": [one for s in stages for one in _dependencies(s)],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": _builder_versions(stages)},
                "metadata": {
                    "invocationId": "+".join(stage.started.run_id for stage in stages),
                    "startedOn": stages[0].began,
                    "finishedOn": stages[-1].ended,
                },
                "byproducts": byproducts,
            },
        },
    }


def covered_digests(statement: Any) -> dict[str, str]:
    """Return name -> SHA-256 of the folder's files that a statement covers.

    Raises ValueError for another kind of statement, one without subjects, and a name that is there
    twice: readers would differ about which digest holds.
    """
    try:
        kinds = statement["_type"], statement["predicateType"]
        listed = [*statement["subject"], *statement["predicate"]["runDetails"]["byproducts"]]
        found = {str(one["name"]): str(one["digest"]["sha256"]) for one in listed}
    except (TypeError, LookupError):
        raise ValueError("is no statement of provenance") from None
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError(f"is no statement of provenance, but {str(kinds)[:100]!a}")
    if not statement["subject"]:
        raise ValueError("has no subject: it is about nothing")
    if len(found) != len(listed):
        raise ValueError("names a file twice")
    return {name: digest for name, digest in found.items() if not name.startswith(RUN_PREFIX)}


def lacking_subjects(statement: Any, files: Sequence[CoveredFile]) -> list[str]:
    """Return the files of checkpoints that are no subjects of a statement that was read.

    A verifier that looks at subjects alone does not see these.
    """
    subjects = {str(one["name"]) for one in statement["subject"]}
    return [file.name for file in checkpoint_files(files) if file.name not in subjects]


def _file(file: CoveredFile) -> Json:
    return _descriptor(file.name, file.sha256, {"bytes": file.bytes})


def _descriptor(name: str, sha256: str, annotations: Mapping[str, Any] | None = None) -> Json:
    found: Json = {"name": name, "digest": {"sha256": sha256}}
    return found | ({"annotations": dict(annotations)} if annotations else {})


def _records(stage: Stage) -> Iterator[Json]:
    for name in RECORDS:
        path = stage.view.directory / name
        if is_file_retried(path):
            yield _descriptor(f"{RUN_PREFIX}{stage.name}/{name}", sha256_file(path))


def _manifests(stage: Stage) -> Iterator[Json]:
    for event, root in stage.checkpoints:
        facts = {"step": event.step, "consumedTokens": event.consumed_tokens}
        yield _descriptor(
            f"{RUN_PREFIX}{stage.name}/checkpoints/{event.checkpoint}/manifest.json",
            event.manifest_sha256,
            facts | ({"stateRoot": root} if root else {}),
        )


def _internals(stage: Stage) -> Json:
    starts: list[Started | Resumed] = [stage.started, *of_kind(stage.view.entries, Resumed)]
    environment = stage.started.environment
    found = {
        "run": stage.name,
        "withheldKeys": stage.config[1],
        "configSha256": stage.started.config_sha256,
        "totalSteps": stage.started.total_steps,
        "parameters": stage.started.parameters,
        "precision": stage.started.precision,
        "packages": stage.packages,
        "machine": environment.get("machine"),
        "attempts": [
            {
                "attempt": start.attempt,
                "layout": start.layout,
                "processes": start.world_size,
                "kernels": start.kernels,
                "deterministic": start.deterministic,
            }
            for start in starts
        ],
    }
    return {key: value for key, value in found.items() if value is not None}


def _dependencies(stage: Stage) -> Iterator[Json]:
    commit, dirty = stage.commit
    if commit is not None:
        yield {
            "name": "k2train",
            "digest": {"gitCommit": commit},
            "annotations": {"changedFiles": dirty},
        }

    moved = stage.transition
    if moved is not None and moved.parent_manifest_sha256 is not None:
        yield _descriptor(
            f"{stage.name}/parent checkpoint",
            moved.parent_manifest_sha256,
            {"step": moved.parent_step, "consumedTokens": moved.parent_consumed_tokens},
        )

    data = stage.data
    if data is None:
        return
    yield _descriptor(f"{stage.name}/{DATA}/{MANIFEST_NAME}", data.sha256)
    if is_sha256(data.tokenizer_sha256):
        meaning = {"hashed": "model, special tokens and the prefix of a text"}
        yield _descriptor(f"{stage.name}/tokenizer", data.tokenizer_sha256, meaning)
    for info, name, digest in chunk_files(stage):
        facts = {"rows": info.rows, "tokens": info.tokens} if name == info.file else {}
        yield _descriptor(f"{stage.name}/{DATA}/{name}", digest, facts)


def _builder_versions(stages: Iterable[Stage]) -> dict[str, str]:
    found = {stage.packages.get("k2train") for stage in stages} - {None}
    return {"k2train": ", ".join(sorted(map(str, found)))} if found else {}
