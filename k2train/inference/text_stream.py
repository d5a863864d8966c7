"""Text of a growing list of token ids: characters are shown when all of their bytes are there.

- A token may end in the middle of a UTF-8 character, so the bytes wait for the rest.
- Bytes that can never become a character are shown as U+FFFD, as in `Tokenizer.decode`.
"""

import codecs

from k2train.data.tokenizer import Tokenizer


class TextStream:
    """Text of one answer. `add` returns what a token adds to it, `finish` what still waited.

    With `drop_space` the space that begins the text is left out.
    """

    def __init__(self, tokenizer: Tokenizer, drop_space: bool = False) -> None:
        self._tokenizer, self._drop_space = tokenizer, drop_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the characters that are complete with this token."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character that was cut off."""
        return self._decoder.decode(b"", final=True)
