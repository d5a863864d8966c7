"""Publication of a finished preparation: the results of the tasks become a data folder, atomically.

- The chunks are in `<output>.tmp` already. Sources, rejected lines and tokenizer are added, the
  manifest is written last, and the folder is renamed.
- Alternatives considered: writing into the final folder from the start; a partial folder looks
  complete to everything that lists files.
"""

import os
import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2train.data.chunk import ChunkInfo, Manifest
from k2train.data.load_tokenizer import load_tokenizer, save_tokenizer
from k2train.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from k2train.data.prepare.allocate.text_flags import seen_texts
from k2train.data.prepare.sources.rejected import REJECTED_NAME, rejected_lines
from k2train.data.prepare.workspace import HELD_OUT, Workspace, read_json, write_json
from k2train.data.prepare.write.text_files import merge_texts
from k2train.data.source_record import SOURCES_NAME
from k2train.data.text_record import TEXTS_NAME
from k2train.errors import DataError
from k2train.files import AtomicFile, sha256_file, sync_directory
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, list_retried


def finish(workspace: Workspace, inputs_sha256: str, version: int) -> Manifest:
    """Complete and rename the target folder; `inputs_sha256` identifies the documents."""
    recipe, target, plan = (
        workspace.recipe,
        workspace.target,
        read_json(workspace.folder / "plan" / "plan.json"),
    )
    records = {name: read_json(workspace.chunk_record(name)) for name in workspace.chunk_names}
    infos = {name: ChunkInfo(**record["info"]) for name, record in records.items()}
    held_out = infos.pop(HELD_OUT, None)
    # Files that join the chunks, each with its hash in the manifest.
    sources = _write_sources(
        workspace, plan["sources"], {name: r["sources"] for name, r in records.items()}
    )
    rejected = _write_rejected(workspace)
    texts = _write_texts(workspace)
    tokenizer = workspace.tokenizer
    save_tokenizer(target, tokenizer)

    facts: dict[str, Any] = {
        "name": recipe.name,
        "recipe_sha256": recipe.sha256,
        "recipe": recipe.identity,
        "inputs_sha256": inputs_sha256,
        "listing_sha256": workspace.listing_sha256,
        "sources_sha256": sources,
        "rejected_sha256": rejected,
        "texts": texts,
        # A plan of an older version does not say what it left out.
        "seen": plan["seen"] if "seen" in plan else list(seen_texts(recipe)),
        "tokenizer": {"file": next(iter(tokenizer.files)), **tokenizer.facts},
        "road": version,
        "python": platform.python_version(),
        "seed": recipe.seed,
        "dropped_tail_tokens": {
            name: entry["tail_tokens"] for name, entry in plan["account"].items()
        },
        "account": plan["account"],
        "document_keys": plan["document_keys"],
    }

    chunks = [info for info in (*infos.values(), held_out) if info is not None]
    sweep(target, chunks, {SOURCES_NAME, REJECTED_NAME, *tokenizer.files, TEXTS_NAME})
    # The manifest is last: it makes the folder a data folder.
    write_manifest(
        target,
        tokenizer_sha256=tokenizer.sha256,
        sequence_length=recipe.sequence_length,
        vocab_size=tokenizer.vocab_size,
        chunks=list(infos.values()),
        held_out=held_out,
        facts=facts,
    )

    swap_in(target, recipe.output)
    return read_manifest(recipe.output)


def _write_sources(workspace: Workspace, keys: Sequence[str], used: Mapping[str, str]) -> str:
    """Write `sources.json`: what was read, with size and hash, and which sources were used.

    Lists sources trained on, held-out sources, and the shares of sources that were split inside.
    """
    # Each chunk recorded its used sources as a bit per source.
    bits = {
        name: np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[: len(keys)]
        for name, text in used.items()
    }
    groups = {
        "training": [name for name in bits if name != HELD_OUT],
        HELD_OUT: [name for name in bits if name == HELD_OUT],
    }

    shares, text_shares = (_split_sources(workspace, by) for by in ("document", "text"))
    split = shares | text_shares
    content: dict[str, Any] = {}
    for group, names in groups.items():
        used_bits = (
            np.bitwise_or.reduce([bits[name] for name in names])
            if names
            else np.zeros(len(keys), np.uint8)
        )
        content[group] = sorted(
            key for key, bit in zip(keys, used_bits, strict=True) if bit and key not in split
        )

    content["shares"], content["text_shares"] = shares, text_shares
    files: dict[str, dict[str, Any]] = {}
    for number in range(len(workspace.tasks)):
        for source in read_json(workspace.encode_record(number))["sources"]:
            files[source["key"]] = {"bytes": source["bytes"], "sha256": source["sha256"]}

    content["files"] = dict(sorted(files.items()))
    write_json(workspace.target / SOURCES_NAME, content)
    return sha256_file(workspace.target / SOURCES_NAME)


def _split_sources(workspace: Workspace, split_by: str) -> dict[str, list[float]]:
    """Sources of which only a share of the documents or texts may be used, with that share.

    Their names alone do not say what was seen.
    """
    shares: dict[str, list[float]] = {}
    for task in workspace.tasks:
        subset = workspace.recipe.subsets[task.subsets[0]]
        if subset.split_by == split_by:
            shares |= {source.key: list(subset.share) for source in task.sources}
    return dict(sorted(shares.items()))


def _write_texts(workspace: Workspace) -> dict[str, Any]:
    """Write `texts.npy`: the texts of all chunks. Returns its facts."""
    path = workspace.target / TEXTS_NAME
    chunks = [workspace.chunk_texts(name) for name in workspace.chunk_names]
    count = merge_texts(chunks, path)
    return {"file": path.name, "sha256": sha256_file(path), "count": count}


def _write_rejected(workspace: Workspace) -> str:
    with AtomicFile(workspace.target / REJECTED_NAME) as stream:
        for line in rejected_lines(workspace):
            stream.write(line)
    return sha256_file(workspace.target / REJECTED_NAME)


def sweep(target: Path, infos: Sequence[ChunkInfo], others: Collection[str]) -> None:
    """Remove what killed attempts left beside the files of the chunks and the `others`."""
    kept = {*others}
    for info in infos:
        kept |= {name for name in (info.file, info.provenance, info.borders) if name}
    for path in list_retried(target):
        if path.name not in kept:
            path.unlink()


def swap_in(target: Path, output: Path) -> None:
    """Rename a complete folder to its final name.

    An existing folder of that name is removed once the new one is in place.
    """
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if exists_retried(output):
        os.replace(output, old)
    os.replace(target, output)
    sync_directory(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_data_folder(folder: Path) -> bool:
    """Whether `folder` may be replaced: it is a data folder, or empty.

    Nothing else is ever deleted.
    """
    return is_folder_retried(folder) and (
        is_file_retried(folder / MANIFEST_NAME) or not any(list_retried(folder))
    )


def damaged(manifest: Manifest) -> list[str]:
    """Files of a data folder that are missing or differ from the hash in the manifest."""
    expected: dict[str, str] = {}
    for info in manifest.all_chunks():
        expected[info.file] = info.sha256
        if info.provenance:
            expected[info.provenance] = str(info.provenance_sha256)
        if info.borders:
            expected[info.borders] = str(info.borders_sha256)
        if info.loss_mask:
            expected[info.loss_mask] = str(info.loss_mask_sha256)

    facts = manifest.facts
    for name, recorded in (
        (SOURCES_NAME, facts.sources_sha256),
        (REJECTED_NAME, facts.rejected_sha256),
        (TEXTS_NAME, facts.texts.sha256 if facts.texts else None),
        (facts.chat.file if facts.chat else "", facts.chat.sha256 if facts.chat else None),
    ):
        if recorded is not None:
            expected[name] = recorded

    paths = {name: manifest.folder / name for name in expected}
    broken = [
        name
        for name, path in paths.items()
        if not is_file_retried(path) or sha256_file(path) != expected[name]
    ]
    return broken + _damaged_tokenizer(manifest)


def _damaged_tokenizer(manifest: Manifest) -> list[str]:
    recorded = manifest.facts.tokenizer
    if recorded is None:
        return []
    path = manifest.folder / recorded.file
    try:
        found = load_tokenizer(path, recorded.specials, recorded.prefix).sha256
    except DataError:
        found = ""
    return [] if found == manifest.tokenizer_sha256 else [recorded.file]
