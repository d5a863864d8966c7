"""State root recomputed from checkpoint files with NumPy: no torch, no model, no layout.

- It equals the manifest's root only if every value is stored where its header says. Hashes of files
  cannot see a block that was written under the wrong name or offset.
- Blocks are read one at a time.
"""

from pathlib import Path
from typing import Any

import numpy as np

from k2train.checkpoint.manifest import CheckpointManifest, is_thinned
from k2train.checkpoint.shards import DTYPES, read_header
from k2train.checkpoint.side_files import FileTable
from k2train.errors import CheckpointError
from k2train.retry import read_retried
from k2train.state_digest import LANES, MASK, block_sums, digest_text, state_root

_ELEMENTS: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 2: np.dtype("<i2")}


def digests_of_files(path: Path, manifest: CheckpointManifest) -> dict[str, str]:
    """Digests {NAME.state: digest} of the optimizer files.

    Raises CheckpointError when a file does not match its header.
    """
    shapes = manifest.shapes("optimizer")
    sums = {name: [0] * LANES for name in shapes}
    for file in FileTable(path, manifest).all("optimizer"):
        try:
            for extent in read_header(path / file)[1]:
                dtype = _ELEMENTS[DTYPES[extent.dtype][1]]
                count = (extent.stop - extent.start) // dtype.itemsize
                content = read_retried(path / file, extent.start, count * dtype.itemsize)
                values = np.frombuffer(content, dtype).reshape(extent.shape)
                # The sums of a tensor's blocks add up to those of the whole, modulo 2**64.
                added = block_sums(values, extent.offsets, shapes[extent.name])
                sums[extent.name] = [
                    (a + b) & MASK for a, b in zip(sums[extent.name], added, strict=True)
                ]
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: {file} cannot be read as a shard ({error})") from None

    return {name: digest_text(lanes) for name, lanes in sums.items()}


def verify_root(path: Path, manifest: CheckpointManifest) -> str:
    """Recompute the state root and compare it with the manifest's.

    Returns "" when there is none to compare: format 1 has no root, and a thinned checkpoint no
    longer has the states. Raises CheckpointError naming what differs.
    """
    known = manifest.state
    if known is None or is_thinned(path):
        return ""

    digests = digests_of_files(path, manifest)
    # Compared by tensor before the root, so that the error names one.
    for name in sorted({*digests, *known.digests}):
        if digests.get(name) != known.digests.get(name):
            raise CheckpointError(
                f"{path}: {name} has digest {digests.get(name)}, the manifest's is "
                f"{known.digests.get(name)}"
            )

    root = state_root(digests, manifest.step, manifest.adam_steps)
    if root != known.root:
        raise CheckpointError(f"{path}: the state's root is {root}, the manifest's is {known.root}")

    return root
