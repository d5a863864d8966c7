"""`inference/text_stream.py`: catches half characters on a terminal, and text that never comes."""

from k2train.inference.text_stream import TextStream
from tests.support.tiny_generation import tiny_tokenizer


def test_a_character_is_shown_when_it_is_whole() -> None:
    """Catches replacement characters in the middle of an emoji."""
    tokenizer, text = tiny_tokenizer(), "the 猫 sat 🙂é!"
    stream = TextStream(tokenizer)
    shown = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(shown) == text and stream.finish() == ""
    assert "" in shown, "some of its characters take several tokens"
    assert "�" not in "".join(shown)


def test_what_is_cut_off_is_shown_at_the_end() -> None:
    """Catches an answer whose last bytes vanish, and bytes of no character that stop the stream."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a🙂b")
    stream = TextStream(tokenizer)
    shown = "".join(stream.add(token) for token in ids[:3])
    assert shown + stream.finish() == tokenizer.decode(ids[:3])

    broken = [ids[2], *ids]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, broken)) + stream.finish() == tokenizer.decode(broken)
