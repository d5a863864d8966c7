"""Verification of the tensors of a release: Hugging Face folders and checkpoints, with NumPy alone.

- fp32 weights have the digest of the master weights, which the state root of the manifest covers.
- bf16 weights have the digest of the weights in the run's own shards, where these are released.
- The state root of a checkpoint with states is computed again from its shards.

Alternatives considered:
- Loading both with torch and comparing: a verifier should not need it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2train.checkpoint.file_digest import verify_root
from k2train.checkpoint.manifest import MANIFEST, CheckpointManifest, read_manifest
from k2train.checkpoint.shards import DTYPES, read_header
from k2train.checkpoint.side_files import FileTable
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError, UnavailableError, UserError
from k2train.files import sha256_file
from k2train.hf.folder import RECORD, HuggingFaceFolder
from k2train.hf.shapes import architecture_of
from k2train.release.data_copy import manifest_place
from k2train.retry import is_file_retried, list_retried, read_retried
from k2train.safe_json import parse_json, read_json, read_plain_file
from k2train.state_digest import LANES, MASK, block_sums, digest_text

_ELEMENTS: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 2: np.dtype("<i2")}


@dataclass
class Found:
    """What a verification found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    models: int = 0
    roots: int = 0
    steps: int = 0
    gaps: int = 0
    signer: str | None = None
    """Identifier of the key that signed the proofs; None where nothing is signed."""

    def check(self, where: str, problems: Callable[[], Iterable[str]]) -> None:
        """Add the problems of a check; one that cannot be done is a problem, too.

        Raises UnavailableError where the file system does not answer.
        """
        try:
            self.problems += problems()
        except UnavailableError:
            raise
        except (OSError, UserError) as error:
            self.problems.append(str(error))
        except Exception as error:
            # A hostile file may hold anything that its format can: it is not whole, and the checks
            # of other files go on.
            what = " ".join(f"{type(error).__name__} {error}".split())
            self.problems.append(f"{where}: cannot be checked ({what:.120})")


def released_manifest(path: Path) -> CheckpointManifest:
    """Read a manifest of a release, with its states or alone. Raises CheckpointError."""
    if path.name == MANIFEST:
        return read_manifest(path.parent, fresh=True)
    try:
        return CheckpointManifest.model_validate(parse_json(read_plain_file(path)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no manifest ({str(error).splitlines()[0]})") from None


def check_checkpoint(path: Path, found: Found) -> None:
    """Check a checkpoint with its own files, and its state root."""

    def problems() -> Iterable[str]:
        manifest = verify_checkpoint(path)
        found.roots += bool(verify_root(path, manifest))
        return ()

    found.check(str(path), problems)


def check_model(folder: Path, run: Path, found: Found) -> None:
    """Check a Hugging Face folder against its record, and its weights against the run's states."""

    def problems() -> Iterator[str]:
        model = HuggingFaceFolder(folder)
        place = manifest_place(run, folder.name)
        manifest = released_manifest(place)
        if model.model.architecture != architecture_of(place.parent, manifest):
            yield f"{folder / 'config.json'}: is not the model that {place} describes"
        yield from _weight_problems(folder, model, run, manifest, found)
        found.models += 1

    found.check(str(folder), lambda: _record_problems(folder, run))
    found.check(str(folder), problems)


def _record_problems(folder: Path, run: Path) -> Iterator[str]:
    """Compare the files of a folder, and the checkpoint that it was made of, with its record."""
    place = folder / RECORD
    try:
        record = read_json(place)
        files = {name: facts["sha256"] for name, facts in record["files"].items()}
        made_of = record["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{place}: is no record of an export ({error!r:.80})"
        return
    there = {path.name for path in list_retried(folder)} - {RECORD}
    for name in sorted({*files, *there}):
        if name not in there:
            yield f"{folder / name}: is missing, {RECORD} names it"
        elif name not in files:
            yield f"{folder / name}: is not in {RECORD}"
        elif sha256_file(folder / name) != files[name]:
            yield f"{folder / name}: is not the file that {RECORD} names"
    manifest = manifest_place(run, folder.name)
    if not is_file_retried(manifest):
        yield f"{manifest}: is missing, {folder.name} was made of it"
    elif sha256_file(manifest) != made_of:
        yield f"{place}: names another manifest than {manifest}"


def _weight_problems(
    folder: Path, model: HuggingFaceFolder, run: Path, manifest: CheckpointManifest, found: Found
) -> Iterator[str]:
    masters = {} if manifest.state is None else manifest.state.digests
    own: Mapping[str, str] | None = None
    for name, tensor in model.tensors.items():
        width = 4 if tensor.dtype == "float32" else 2
        values = np.frombuffer(tensor.read(), _ELEMENTS[width]).reshape(tensor.shape)
        digest = digest_text(block_sums(values, [0] * len(tensor.shape), tensor.shape))
        if width == 4:
            known = masters.get(f"{name}.master")
        else:
            own = _digests_of_weights(run, folder.name, manifest) if own is None else own
            known = own.get(name)
        if known is None:
            found.notes.append(
                f"{folder}: weights not compared with the run's, whose shards are not released"
            )
            return
        if digest != known:
            yield f"{tensor.file}: {name} is not what the run saved: digest {digest}, not {known}"


def _digests_of_weights(run: Path, name: str, manifest: CheckpointManifest) -> dict[str, str]:
    """Digests of the weights in a released checkpoint's own shards; none where it has none."""
    path = run / "checkpoints" / name
    if not is_file_retried(path / MANIFEST):
        return {}
    shapes = manifest.shapes("model")
    sums = {tensor: [0] * LANES for tensor in shapes}
    for file in FileTable(path, manifest).all("model"):
        for extent in read_header(path / file)[1]:
            dtype = _ELEMENTS[DTYPES[extent.dtype][1]]
            content = read_retried(path / file, extent.start, extent.stop - extent.start)
            values = np.frombuffer(content, dtype).reshape(extent.shape)
            added = block_sums(values, extent.offsets, shapes[extent.name])
            sums[extent.name] = [
                (a + b) & MASK for a, b in zip(sums[extent.name], added, strict=True)
            ]
    return {tensor: digest_text(lanes) for tensor, lanes in sums.items()}
