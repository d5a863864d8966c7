"""Contents of a serialized sentencepiece model, read from its protobuf fields.

- Sentencepiece does not report which pieces are user-defined, and its own reader needs the package
  protobuf.
"""

from collections.abc import Iterator


def model_content(model: bytes) -> tuple[int, list[tuple[str, int]]]:
    """Parse a serialized model: its type, and (piece, type) of its pieces.

    Raises TruncatedError.
    """
    model_kind, pieces = 1, []
    for number, content in _fields(model):
        facts = dict(_fields(content)) if number in (1, 2) and isinstance(content, bytes) else {}
        # Field 3 is the type, of a piece (1) as of the trainer spec (2).
        third = facts.get(3, 1)
        if number == 2 and isinstance(third, int):
            model_kind = third
        elif (
            number == 1 and isinstance(third, int) and isinstance(piece := facts.get(1, b""), bytes)
        ):
            pieces.append((piece.decode("utf-8", "replace"), third))
    return model_kind, pieces


def has_dummy_prefix(model: bytes) -> bool:
    """Whether a model puts a space in front of every text: `normalizer_spec.add_dummy_prefix`.

    Raises TruncatedError.
    """
    # The default of sentencepiece; of several specs the last value counts.
    found = True
    for number, content in _fields(model):
        if number == 3 and isinstance(content, bytes):
            found = next((bool(value) for n, value in _fields(content) if n == 3), found)
    return found


class TruncatedError(Exception):
    """A message ends inside a field, or is not a protobuf message."""


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message.

    Raises TruncatedError when it ends inside a field, or is not a protobuf message.
    """
    offset = 0
    while offset < len(message):
        key, offset = _varint(message, offset)
        kind = key & 7
        # Wire types: 0 varint, 2 length-delimited, 1 and 5 fixed 8 and 4 bytes.
        if kind == 0:
            value, offset = _varint(message, offset)
            yield key >> 3, value
            continue

        size, offset = (
            _varint(message, offset)
            if kind == 2
            else ({1: 8, 5: 4}.get(kind, len(message)), offset)
        )
        if offset + size > len(message):
            raise TruncatedError("ends inside a field")
        yield key >> 3, message[offset : offset + size]
        offset += size


def _varint(message: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    for index in range(offset, min(offset + 10, len(message))):
        value |= (message[index] & 0x7F) << shift
        if message[index] < 0x80:
            return value, index + 1
        shift += 7
    raise TruncatedError("ends inside a number")
