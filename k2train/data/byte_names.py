"""Characters that stand for bytes in the vocabulary of a byte-level BPE, as in GPT-2."""


def _byte_names() -> list[str]:
    """Characters that stand for the bytes 0 to 255 in a byte-level vocabulary.

    Printable ones of Latin-1 stand for themselves, the others for characters from U+0100 on
    (Radford et al. 2019, `bytes_to_unicode` of GPT-2).
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


BYTE_NAMES = _byte_names()
BYTE_OF = {name: bytes([byte]) for byte, name in enumerate(BYTE_NAMES)}
