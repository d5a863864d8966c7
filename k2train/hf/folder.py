"""A folder of safetensors in Hugging Face's form: its tensors by name, checked before one is read.

- Safetensors only. A pickle is a program, so it is refused by name.
- Names, shapes and dtypes are compared with what `config.json` makes of them. Every byte range is
  inside its file, and no tensor is missing, unknown or there twice.
- Links are followed: the cache of Hugging Face's hub is made of them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from k2train.data.inspect.trained_tokenizer import JSON_MODEL
from k2train.errors import CheckpointError
from k2train.files import sha256_file
from k2train.hf.config_file import FolderModel, read_config
from k2train.hf.names import transformers_name
from k2train.hf.shapes import tensor_shapes
from k2train.hf.shard_writer import INDEX, SINGLE_FILE
from k2train.hf.tokenizer_settings import FAST, MODEL
from k2train.retry import is_file_retried, list_retried, open_retried, retried
from k2train.safe_json import parse_json, read_json

DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
"""Dtype in a file -> its name in a checkpoint, and bytes per element."""
TOKENIZERS = (MODEL, FAST, JSON_MODEL)
RECORD = "k2train_export.json"
"""What an export by this project says of itself."""
MAX_HEADER_BYTES = 1 << 28
BUFFERS = (".inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".masked_bias")
"""Ends of names that older versions saved and nothing reads."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of the folder: bytes `start` to `stop`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """Its name in a checkpoint's manifest: float32, bfloat16 or float16."""
    start: int
    stop: int

    def read(self) -> bytearray:
        """Read its bytes. Raises CheckpointError, UnavailableError."""
        content = bytearray(self.stop - self.start)
        try:
            with open_retried(self.file) as stream:
                stream.seek(self.start)
                count = stream.readinto(content)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read ({error.strerror})") from None
        if count != len(content):
            raise CheckpointError(f"{self.file} ends inside {self.name}; copy it again")
        return content


class HuggingFaceFolder:
    """Model and tensors of a folder. Reads the headers only.

    Raises CheckpointError when it holds another architecture, or not exactly its tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: FolderModel = read_config(path)
        self._headers: list[bytes] = []
        self._named: dict[str, str] = {}
        """Name of a tensor -> its file, as an index says it."""
        stored: dict[str, StoredTensor] = {}
        for file in self._files():
            for tensor in self._tensors(file):
                self._check_place(tensor, stored.get(tensor.name))
                stored[tensor.name] = tensor
        self.tensors: dict[str, StoredTensor] = {}
        """By our names, in the order of the forward pass; a tied head is the embedding."""
        self._take(stored)

    @property
    def fingerprint(self) -> str:
        """Hash of `config.json`, and of the sizes and headers of all files: which folder it is."""
        content = read_json((self.path / "config.json").resolve())
        return sha256(repr(content).encode() + b"".join(self._headers)).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, a tied one twice."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    def check_files(self) -> None:
        """Compare the files with the hashes that an export has recorded; nothing without a record.

        Raises CheckpointError, UnavailableError.
        """
        record = self.path / RECORD
        if not is_file_retried(record):
            return
        try:
            files = read_json(record.resolve())["files"]
            known = {name: facts["sha256"] for name, facts in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{record} is no record of an export ({error!r:.100})") from None
        # Not the settings, which a person may change.
        spelling = (self.path / name for name in TOKENIZERS)
        weights = (tensor.file for tensor in self.tensors.values())
        for file in dict.fromkeys((*weights, *filter(is_file_retried, spelling))):
            if file.name in known and sha256_file(file.resolve()) != known[file.name]:
                raise CheckpointError(
                    f"{file} does not match its hash in {RECORD}; it was changed or damaged"
                )

    def _files(self) -> list[Path]:
        index = self.path / INDEX
        if not is_file_retried(index):
            if is_file_retried(self.path / SINGLE_FILE):
                return [self.path / SINGLE_FILE]
            pickles = [file.name for file in list_retried(self.path) if file.suffix in PICKLES]
            raise CheckpointError(
                f"{self.path} has no {SINGLE_FILE} and no {INDEX}"
                + (f"; {pickles[0]} is a pickle, which is not read: convert it" if pickles else "")
            )
        try:
            self._named = dict(read_json(index.resolve())["weight_map"])
            names = sorted(set(self._named.values()))
        except OSError as error:
            raise CheckpointError(f"{index} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors ({error!r:.100})") from None
        for name in names:
            # Names come from the file: none may lead out of the folder.
            if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                raise CheckpointError(f"{index} names {ascii(name)[:100]}, outside of the folder")
            if not is_file_retried(self.path / name):
                raise CheckpointError(
                    f"{self.path}: {name} is missing, of {len(names)} files; copy it again"
                )
        return [self.path / name for name in names]

    def _tensors(self, file: Path) -> Iterator[StoredTensor]:
        try:
            text, size = retried(lambda: _read_header(file), file)
            content = parse_json(text)
            content.pop("__metadata__", None)
            self._headers.append(f"{file.name} {size} ".encode() + text)
            begin = 8 + len(text)
            found = [_stored(file, name, facts, begin, size) for name, facts in content.items()]
            _check_ranges(file, found, begin, size)
            yield from found
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} is no safetensors file ({error!r:.150})") from None

    def _check_place(self, tensor: StoredTensor, other: StoredTensor | None) -> None:
        """Raise CheckpointError for a tensor that is in another file than the index says."""
        shown = ascii(tensor.name[:100])
        if other is not None:
            raise CheckpointError(f"{self.path}: {shown} is in {other.file.name} and in another")
        named = self._named.get(tensor.name, tensor.file.name)
        if named != tensor.file.name:
            raise CheckpointError(
                f"{self.path}: {shown} is in {tensor.file.name}, {INDEX} says {named}"
            )

    def _take(self, stored: dict[str, StoredTensor]) -> None:
        layers = self.model.architecture.num_layers
        # A number from a file must not decide how much is made of it.
        if layers > len(stored):
            raise CheckpointError(
                f"{self.path}: num_hidden_layers is {layers}, the files hold {len(stored)} tensors"
            )
        wanted = tensor_shapes(self.model.architecture)
        for ours, shape in wanted.items():
            name = transformers_name(ours)
            if ours == "head.weight" and self.model.tied:
                # What transformers computes with, whatever else is stored.
                stored.pop(name, None)
                name = transformers_name("embedding.weight")
                self.tensors[ours] = self.tensors["embedding.weight"]
                continue
            tensor = stored.pop(name, None)
            if tensor is None:
                raise CheckpointError(f"{self.path}: {name} is in no file")
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.file}: {name} has shape {list(tensor.shape)}, config.json makes it "
                    f"{list(shape)}"
                )
            self.tensors[ours] = tensor
        left = [name for name in stored if not name.endswith(BUFFERS)]
        if left:
            raise CheckpointError(
                f"{stored[left[0]].file}: {left[0][:100]!a} is no tensor of this architecture"
            )


def _read_header(file: Path) -> tuple[bytes, int]:
    with file.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        size = int.from_bytes(stream.read(8), "little")
        # A damaged length must not make the reader allocate it.
        if size > min(MAX_HEADER_BYTES, total):
            raise ValueError(f"the header claims {size} bytes")
        return stream.read(size), total


def _check_ranges(file: Path, tensors: list[StoredTensor], begin: int, size: int) -> None:
    """Raise CheckpointError unless the tensors are the bytes of the file, each byte of one."""
    at = begin
    for tensor in sorted(tensors, key=lambda one: (one.start, one.stop)):
        if tensor.start != at:
            raise CheckpointError(
                f"{file}: {tensor.name[:100]!a} begins at byte {tensor.start}, the one before ends "
                f"at {at}: a header of another file, or a damaged one"
            )
        at = tensor.stop
    if at != size:
        raise CheckpointError(f"{file}: {size - at} bytes behind the last tensor; copy it again")


def _stored(file: Path, name: str, facts: Any, begin: int, size: int) -> StoredTensor:
    if facts["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: {name[:100]!a} has dtype {str(facts['dtype'])[:20]}; supported are "
            f"{', '.join(DTYPES)}"
        )
    dtype, width = DTYPES[facts["dtype"]]
    numbers = [*facts["shape"], *facts["data_offsets"]]
    if any(type(number) is not int for number in numbers):
        raise CheckpointError(f"{file}: {name[:100]!a} has a size that is no whole number")
    shape = tuple(facts["shape"])
    start, stop = (begin + offset for offset in facts["data_offsets"])
    if min(shape, default=0) < 0 or stop - start != prod(shape) * width:
        raise CheckpointError(f"{file}: {name[:100]!a} has {stop - start} bytes, shape {shape}")
    if start < begin or stop > size:
        raise CheckpointError(f"{file} ends inside {name[:100]!a}; copy it again")
    return StoredTensor(file, name, shape, dtype, start, stop)
