"""Import of a Hugging Face folder as a checkpoint of weights, from which a run can start.

- The bytes stay: each tensor keeps its dtype, and is only cut out of one file and put into another.
  So an export in that dtype gives the same files again.
- The checkpoint has no moments, like one that was thinned. It starts a run (`run.init_from`), and
  cannot be continued.
- A head that is tied to the embedding becomes a tensor of its own, and is trained apart from it.
- Memory holds a few tensors. Nothing needs torch.

Alternatives considered:
- Reading the folder at each start of a run: its files have no hashes, and may change meanwhile.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from k2train.checkpoint.disk_space import BLOCK_FACTS_BYTES, MANIFEST_BYTES, free_bytes
from k2train.checkpoint.manifest import (
    FACTS,
    FOLDERS,
    FORMAT,
    MANIFEST,
    CheckpointManifest,
    DataFacts,
    DataPosition,
    FileFacts,
    SaveFacts,
    manifest_text,
    mark_thinned,
    read_manifest,
    seal,
)
from k2train.checkpoint.moments import ORIGIN
from k2train.checkpoint.shards import Block, write_shard
from k2train.checkpoint.side_files import write_pieces
from k2train.data.inspect.trained_tokenizer import write_beside
from k2train.errors import RunError, UnavailableError
from k2train.files import OwnFolder, remove_empty, sync_directory, write_synced
from k2train.hf.config_file import LLAMA3
from k2train.hf.folder import HuggingFaceFolder, StoredTensor
from k2train.hf.tokenizer_source import tokenizer_of_folder, why_not_compared
from k2train.model.architecture import Architecture
from k2train.retry import exists_retried, reason
from k2train.text import bytes_text

NAME = "ckpt_000"
FILE_BYTES = 5 * 10**9
"""Bytes of tensors in a shard file; one that is larger has a file of its own."""


def model_section(a: Architecture) -> dict[str, Any]:
    """Return the config's `model` section of an architecture."""
    section: dict[str, Any] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_heads": a.num_heads,
        "num_kv_heads": a.num_kv_heads,
        "vocab_size": a.vocab_size,
        "rope_theta": a.rope_theta,
        "norm_eps": a.norm_eps,
        "init_std": a.init_std,
    }
    if a.rope_scaling is not None:
        values = {key: getattr(a.rope_scaling, key) for key in LLAMA3}
        section["rope_scaling"] = {"type": "llama3", **values}
    return section


def notes_of(folder: HuggingFaceFolder) -> list[str]:
    """Say what an import changes, and what of it nobody can compare."""
    tied = (
        "tie_word_embeddings is true: the head becomes a tensor of its own, equal to the "
        "embedding, and is trained apart from it"
    )
    why = why_not_compared(folder.path)
    unknown = (
        f"the tokenizer is not compared, so a run must allow it (run.allow=[tokenizer]): {why}"
    )
    return [*([tied] if folder.model.tied else []), *([unknown] if why else [])]


def save_facts(folder: HuggingFaceFolder) -> SaveFacts:
    """Return what the manifest says of an imported checkpoint.

    Raises DataError when the folder's tokenizer cannot be used.
    """
    tokenizer, a = tokenizer_of_folder(folder.path), folder.model.architecture
    length = folder.model.max_positions
    return SaveFacts.model_validate(
        {
            "step": 0,
            "adam_steps": 0,
            "consumed_tokens": 0,
            "chunks": DataPosition(consumed=0),
            "config": {"model": model_section(a), "data": {"sequence_length": length}},
            "data": DataFacts(
                tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
                vocab_size=None if tokenizer is None else tokenizer.vocab_size,
                sequence_length=length,
            ),
            ORIGIN: {
                "folder": str(folder.path),
                "fingerprint": folder.fingerprint,
                "tied": folder.model.tied,
                "token_ids": asdict(folder.model.ids),
            },
        }
    )


def unwritten_manifest(folder: HuggingFaceFolder) -> CheckpointManifest:
    """Return the manifest of a checkpoint that is still to be imported, without its files."""
    return CheckpointManifest.model_validate(_content(folder, {}))


def _content(folder: HuggingFaceFolder, files: dict[str, FileFacts]) -> dict[str, Any]:
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": tensor.dtype}
        for name, tensor in folder.tensors.items()
    }
    return seal(
        {
            "format": FORMAT,
            "name": NAME,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            **save_facts(folder).model_dump(exclude_unset=True),
            "tensors": {"model": tensors, "optimizer": {}},
            "files": files,
        }
    )


def is_import_of(path: Path, folder: HuggingFaceFolder) -> bool:
    """Whether checkpoint `path` was imported from this very folder. Raises CheckpointError."""
    origin = (read_manifest(path).model_extra or {}).get(ORIGIN)
    return isinstance(origin, dict) and origin.get("fingerprint") == folder.fingerprint


def import_folder(
    folder: HuggingFaceFolder, path: Path, progress: Callable[[], None] = lambda: None
) -> CheckpointManifest:
    """Import a folder as the checkpoint `path`, whose name must be `NAME`; returns its manifest.

    Raises RunError when it exists or there is no room, CheckpointError when a file of the folder
    cannot be read, UnavailableError when the disk refuses. Nothing is left then.
    """
    assert path.name == NAME, "a checkpoint has the name in its manifest"
    if exists_retried(path):
        raise RunError(f"{path} exists; a checkpoint is never overwritten, name another run")
    _check_room(folder, path)
    folder.check_files()
    tokenizer = tokenizer_of_folder(folder.path)
    made = [one for one in path.parents if not exists_retried(one)]
    temporary = path.parent / f"{path.name}.import.tmp"
    own: OwnFolder | None = None
    try:
        own = OwnFolder(temporary)
        for inner in (*FOLDERS, FACTS):
            (temporary / inner).mkdir()
        files = dict(_write_files(temporary, folder, progress))
        content = _content(folder, files)
        if tokenizer is not None:
            write_beside(temporary, tokenizer)
        write_synced(temporary / MANIFEST, manifest_text(content))
        mark_thinned(temporary, CheckpointManifest.model_validate(content))
        for inner in (*FOLDERS, FACTS):
            sync_directory(temporary / inner)
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    except BlockingIOError:
        raise RunError(
            f"{path} is being written by another import: wait for it, or name another run"
        ) from None
    except OSError as error:
        raise UnavailableError(
            f"{path} could not be written ({reason(error, path.parent)}); nothing was left"
        ) from None
    finally:
        if own is not None:
            own.close()
        remove_empty(made)
    return read_manifest(path)


def _check_room(folder: HuggingFaceFolder, path: Path) -> None:
    needed = folder.num_bytes + MANIFEST_BYTES + BLOCK_FACTS_BYTES * len(folder.tensors)
    free = free_bytes(path.parent.absolute())
    if needed > free:
        raise RunError(
            f"{path} needs {bytes_text(needed)}, {bytes_text(free)} are free: free space, or name "
            "a run on another disk"
        )


def _write_files(
    temporary: Path, folder: HuggingFaceFolder, progress: Callable[[], None]
) -> Iterator[tuple[str, FileFacts]]:
    """Write the tensors in files of a bounded size; yield their names and facts."""
    groups: list[list[Block]] = [[]]
    filled = 0
    for name, tensor in folder.tensors.items():
        size = tensor.stop - tensor.start
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        content = partial(_content_of, tensor, progress)
        origin = (0,) * len(tensor.shape)
        groups[-1].append(Block(name, origin, tensor.shape, tensor.dtype, content))
        filled += size

    for number, blocks in enumerate(groups, 1):
        name = f"model/shard-{number:05d}-model-00001-of-00001.safetensors"
        facts, pieces = write_shard(temporary / name, blocks)
        yield name, write_pieces(temporary, name, facts, pieces)


def _content_of(tensor: StoredTensor, progress: Callable[[], None]) -> memoryview:
    progress()
    return memoryview(tensor.read())
