"""Offline files of W&B, read back: its records are protobuf messages in a log like LevelDB's.

The frames are those of LevelDB's log format (`doc/log_format.md` of its sources)
behind a header of seven bytes; the messages are parsed by W&B's own package.
"""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = b":W&B"
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_records(path: Path) -> list[Any]:
    """Return all records of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(HEADER), f"{path} is no file of W&B"
    found, parts, at = [], b"", 7
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            # A frame does not begin at the end of a block.
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def history_row(record: Any) -> dict[str, Any]:
    """Return the keys and values of a row; {} for other records."""
    if record.WhichOneof("record_type") != "history":
        return {}
    return {
        "/".join(item.nested_key) if item.nested_key else item.key: json.loads(item.value_json)
        for item in record.history.item
    }
