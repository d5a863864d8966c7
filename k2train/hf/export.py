"""Export of a checkpoint to a Hugging Face folder: written, checked, then renamed into place.

- Whatever layout saved it, the same weights give the same bytes.
- Nothing unchecked has the folder's name: a kill or a failed check leaves no folder.
- `k2train_export.json` says what the folder was made of, and what was compared.

Alternatives considered:
- `save_pretrained` of transformers: it needs the whole model in memory.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from k2train.checkpoint.blocks import tensor_bytes
from k2train.checkpoint.disk_space import free_bytes
from k2train.checkpoint.manifest import manifest_sha256
from k2train.data.tokenizer import Tokenizer
from k2train.errors import CheckpointError, RunError, UnavailableError
from k2train.files import OwnFolder, remove_empty, sync_directory
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.hf.config_file import CONFIG, GENERATION, config_json, generation_json
from k2train.hf.folder import RECORD
from k2train.hf.model_check import ModelResult, check_model
from k2train.hf.names import transformers_name
from k2train.hf.shard_writer import (
    INDEX,
    FileTensor,
    Shard,
    WrittenFile,
    index_json,
    plan_shards,
    write_shards,
)
from k2train.hf.tokenizer_check import TokenizerResult, check_tokenizer
from k2train.hf.tokenizer_files import write_tokenizer
from k2train.hf.tokenizer_source import ids_of
from k2train.hf.turn_ends import find_turn_ends
from k2train.retry import exists_retried, list_retried, reason
from k2train.text import bytes_text, counted

SHARD_BYTES = 5 * 10**9
SMALL_FILES_BYTES = 2**26
"""Space for everything but weights."""


@dataclass(frozen=True)
class ExportOptions:
    """What a person asked for."""

    precision: str | None = None
    """fp32, bf16, or None: as the run trained."""
    shard_bytes: int = SHARD_BYTES
    check: bool = True
    chat_template: str | None = None


@dataclass(frozen=True)
class Exported:
    """A folder that was written, and what was found of it."""

    folder: Path
    source: CheckpointSource
    files: tuple[WrittenFile, ...]
    model: ModelResult | None
    tokenizer: TokenizerResult | None
    seconds: float


def plan_tensors(source_shapes: dict[str, tuple[int, ...]], precision: str) -> list[FileTensor]:
    """Return the tensors of a folder, in the order of the forward pass."""
    return [
        FileTensor(name, transformers_name(name), shape, precision)
        for name, shape in source_shapes.items()
    ]


def refuse_existing(folder: Path) -> None:
    """Raise RunError when there is something of the folder's name."""
    if exists_retried(folder):
        raise RunError(f"{folder} exists; name a new folder, an export never overwrites one")


def export(
    source: CheckpointSource,
    folder: Path,
    tokenizer: Tokenizer | None,
    options: ExportOptions,
    log: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export an open checkpoint to `folder`.

    Raises CheckpointError when the checkpoint is not whole, RunError when the folder exists or has
    no room, and CheckFailedError when a check fails. Nothing is left then.
    """
    refuse_existing(folder)
    _require_transformers(tokenizer, options)
    began = time.monotonic()
    shards = plan_shards(plan_tensors(source.shapes, source.precision), options.shard_bytes)
    made = [one for one in folder.parents if not exists_retried(one)]
    temporary = folder.parent / f".{folder.name}.export.tmp"
    own: OwnFolder | None = None
    try:
        _check_room(folder, shards)
        own = OwnFolder(temporary)
        files = _write(temporary, source, shards, tokenizer, options, log)
        size = bytes_text(sum(file.bytes for file in files))
        log(f"written: {counted(len(files), 'file')}, {size}")
        model, spelling = _check(temporary, source, tokenizer, options, log)
        done = Exported(folder, source, tuple(files), model, spelling, time.monotonic() - began)
        small = _small_files(temporary, files)
        _write_json(temporary / RECORD, record_json(done, tokenizer, small))
        sync_directory(temporary)
        # A folder that appeared meanwhile is no empty one, so the rename refuses it.
        temporary.rename(folder)
        sync_directory(folder.parent)
        return done
    except BlockingIOError:
        raise RunError(
            f"{folder} is being written by another export: wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise UnavailableError(
            f"{folder} could not be written ({reason(error, folder.parent)}); nothing was left"
        ) from None
    finally:
        if own is not None:
            own.close()
        remove_empty(made)


def _require_transformers(tokenizer: Tokenizer | None, options: ExportOptions) -> None:
    if find_spec("transformers") is not None:
        return
    setup = "pip install 'k2train[eval]'"
    if options.check:
        raise RunError(
            f"the checks of an export need transformers: {setup}; or leave them out (--no-check)"
        )
    if tokenizer is not None and options.chat_template is not None:
        raise RunError(f"a chat template is rendered by transformers: {setup}")


class CheckFailedError(UnavailableError):
    """The written folder does not give what the checkpoint gives. Ends with exit code 1."""


def _check_room(folder: Path, shards: list[Shard]) -> None:
    needed = sum(shard.num_bytes for shard in shards) + SMALL_FILES_BYTES
    free = free_bytes(folder.parent.absolute())
    if needed > free:
        raise RunError(
            f"{folder} needs {bytes_text(needed)}, {bytes_text(free)} are free: free space, or "
            "name a folder on another disk"
        )


def _max_positions(source: CheckpointSource) -> int:
    data = source.manifest.config.get("data")
    length = data.get("sequence_length") if isinstance(data, dict) else None
    found = source.manifest.data.sequence_length or length
    if not isinstance(found, int):
        raise CheckpointError(f"{source.path} does not say data.sequence_length")
    return found


def _write(
    temporary: Path,
    source: CheckpointSource,
    shards: list[Shard],
    tokenizer: Tokenizer | None,
    options: ExportOptions,
    log: Callable[[str], None],
) -> list[WrittenFile]:
    positions = _max_positions(source)
    ids = ids_of(source.path, source.manifest, tokenizer)
    config = config_json(source.architecture, positions, source.precision, ids)
    _write_json(temporary / CONFIG, config)
    _write_json(temporary / INDEX, index_json(shards))
    stops: tuple[int, ...] = ()
    spare = range(0)
    if tokenizer is not None:
        spare = range(tokenizer.vocab_size, source.architecture.vocab_size)
        write_tokenizer(temporary, tokenizer, positions, options.chat_template)
        if options.chat_template is not None:
            stops = _turn_ends(temporary, tokenizer, log)
    _write_json(temporary / GENERATION, generation_json(ids, stops, spare))
    return write_shards(temporary, shards, lambda tensor: tensor_bytes(source.read(tensor.source)))


def _turn_ends(
    temporary: Path, tokenizer: Tokenizer, log: Callable[[str], None]
) -> tuple[int, ...]:
    """Return the ids that end an answer of a conversation. Raises RunError, CheckFailedError."""
    ends = find_turn_ends(temporary, tokenizer)
    if ends.problem:
        raise CheckFailedError(f"check failed: {ends.problem}; nothing was left")
    end = tokenizer.decode([tokenizer.eos_id])
    names = ", ".join(dict.fromkeys([end, *ends.names]))
    log(f"chat template: an answer ends at {names}")
    return ends.ids


def _check(
    temporary: Path,
    source: CheckpointSource,
    tokenizer: Tokenizer | None,
    options: ExportOptions,
    log: Callable[[str], None],
) -> tuple[ModelResult | None, TokenizerResult | None]:
    if not options.check:
        return None, None
    try:
        spelling = None if tokenizer is None else check_tokenizer(temporary, tokenizer)
        if spelling is not None:
            _require(
                spelling.problem + ("; or export with --tokenizer none" if spelling.problem else "")
            )
            also = f", {spelling.sentencepiece_strings} in sentencepiece"
            log(
                f"tokenizer: {spelling.strings} strings encode and decode alike in transformers"
                f"{also if spelling.sentencepiece_strings else ''}"
            )
        model = check_model(source.architecture, source.read, temporary, _max_positions(source))
        _require(model.problem)
    except RunError as error:
        raise CheckFailedError(f"check failed: {error}; nothing was left") from None
    log(
        f"model: logits at most {model.logits_apart:.2g} apart (of {model.largest_logit:.3g}), "
        f"the same likeliest token at {model.tokens} of {model.tokens} positions, loss "
        f"{model.loss:.6f} and {model.their_loss:.6f} (transformers)"
    )
    return model, spelling


def _require(problem: str) -> None:
    if problem:
        raise RunError(problem)


def _small_files(temporary: Path, shards: list[WrittenFile]) -> list[WrittenFile]:
    """Everything but weights, whose hashes are known already."""
    known = {shard.file for shard in shards}
    contents = [
        (path.name, path.read_bytes())
        for path in sorted(list_retried(temporary))
        if path.name not in known
    ]
    return [WrittenFile(name, len(data), sha256(data).hexdigest()) for name, data in contents]


def record_json(
    done: Exported, tokenizer: Tokenizer | None, small: Sequence[WrittenFile]
) -> dict[str, Any]:
    """Return the content of `k2train_export.json`; `small` are the files that hold no weights."""
    files = (*done.files, *small)
    source, manifest = done.source, done.source.manifest
    return {
        "checkpoint": str(source.path),
        "manifest_sha256": manifest_sha256(source.path),
        "state_root": None if manifest.state is None else manifest.state.root,
        "step": manifest.step,
        "consumed_tokens": manifest.consumed_tokens,
        "dtype": source.precision,
        "values_from": source.folder,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "dummy_prefix": None if tokenizer is None else tokenizer.dummy_prefix,
        "specials": None if tokenizer is None else list(tokenizer.specials),
        "files": {file.file: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
        "checks": {
            "model": None if done.model is None else asdict(done.model),
            "tokenizer": None if done.tokenizer is None else asdict(done.tokenizer),
        },
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
