"""File damage between attempts: bit flip, truncation, empty, swapped, missing or extra file."""

import random
import shutil
from pathlib import Path


def flip_bit(path: Path, draw: random.Random) -> str:
    """Flip one random bit; returns its position."""
    content = bytearray(path.read_bytes())
    position, bit = draw.randrange(len(content)), draw.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"byte {position} of {len(content)}, bit {bit}"


def truncate(path: Path, draw: random.Random) -> str:
    """Cut a file at a random length."""
    size = path.stat().st_size
    kept = draw.randrange(size)
    with path.open("r+b") as stream:
        stream.truncate(kept)
    return f"cut from {size} to {kept} bytes"


def empty(path: Path, draw: random.Random) -> str:
    """Make a file empty."""
    path.write_bytes(b"")
    return "made empty"


def remove(path: Path, draw: random.Random) -> str:
    """Delete a file."""
    path.unlink()
    return "removed"


def swap(path: Path, draw: random.Random) -> str:
    """Exchange a file with another one of its folder, of equal size if possible."""
    others = sorted(other for other in path.parent.iterdir() if other != path and other.is_file())
    if not others:
        return flip_bit(path, draw)
    other = min(others, key=lambda file: abs(file.stat().st_size - path.stat().st_size))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return f"exchanged with {other.name}"


def extra(path: Path, draw: random.Random) -> str:
    """Add a stray copy beside the file, which a reader of the folder would read too."""
    shutil.copy(path, path.with_name(f"stray_{path.name}"))
    return "copied beside itself"


KINDS = {
    "flip": flip_bit,
    "cut": truncate,
    "empty": empty,
    "lost": remove,
    "swapped": swap,
    "stray": extra,
}


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints with optimizer states, oldest first."""
    found = (run / "checkpoints").glob("ckpt_*")
    return sorted(
        path
        for path in found
        if (path / "optimizer").is_dir()
        and not (path / "thinned.json").exists()
        and ".tmp" not in path.name
    )


def shards_of(checkpoint: Path) -> list[Path]:
    """Shard files of a checkpoint."""
    return sorted((checkpoint / "model").iterdir()) + loaded_of(checkpoint)


def loaded_of(checkpoint: Path) -> list[Path]:
    """Shard files whose values a load reads."""
    return sorted((checkpoint / "optimizer").iterdir())
