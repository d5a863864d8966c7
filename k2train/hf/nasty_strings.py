"""Strings on which tokenizers differ: spaces, scripts, emoji, control characters, quoted tokens.

- Seeded: the same strings in every check.
- Each is valid Unicode; a lone surrogate has no bytes.
"""

import random
from collections.abc import Sequence

_SPACES = (" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\u2581")
_TEXT = """the The training na\u00efve Stra\u00dfe don't e.g. x_1 3.14159 1,000,000 \\frac{a}{b}
def return == != -> {} [[]] </div> f(x): https://a.b/c?d=e Привет мир こんにちは 世界 한국어
العربية שלום हिन्दी ไทย ελληνικά"""
_WORDS = tuple(_TEXT.split())
_ODD = (
    # Emoji of several code points, and marks that combine.
    *(
        "\U0001f600",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\U0001f3f3\ufe0f\u200d\U0001f308",
    ),
    *(
        "\U0001f1e9\U0001f1ea",
        "\u2764\ufe0f",
        "e\u0301",
        "A\u030a",
        "o\u0308\u0323",
        "Z\u0300\u0301",
    ),
    # Control characters, and such without a width.
    *("\0", "\x01", "\x07", "\x1b[31m", "\x7f", "\u200b", "\u200d", "\ufeff", "\u202e", "\ufffd"),
    # What a normalization would change, and letters whose case is odd.
    *("\ufb01", "\uff21", "\U0001d518", "\U0001d7d9", "\u337f", "\U0010fffd", "\ue000"),
    *("\u00df", "\u0131", "\u0130", "\u01c4"),
)
_QUOTED = ("<s>", "</s>", "<unk>", "<0x41>", "<0xE2>", "<|endoftext|>", "[INST]", "<pad>")


def nasty_strings(count: int, specials: Sequence[str] = (), seed: int = 16) -> list[str]:
    """Return `count` strings; `specials` are quoted in some of them."""
    draw = random.Random(seed)
    quoted = (*_QUOTED, *specials)
    fixed = [
        *("", " ", "  ", "\n", "\u2581", " \u2581 \u2581", "a", "\0", "</s>", " </s> <s>"),
        *("a" * 3000, " " * 3000, "ab" * 1500, "\n" * 500),
        *("\U0001f600" * 300, "0" * 1000, "\u2581" * 300),
        *quoted,
    ]
    found = fixed[:count]
    while len(found) < count:
        found.append(_one(draw, quoted))
    return found


def _one(draw: random.Random, quoted: Sequence[str]) -> str:
    parts = []
    for _ in range(draw.randint(1, 14)):
        kind = draw.random()
        if kind < 0.40:
            parts.append(draw.choice(_WORDS))
        elif kind < 0.65:
            parts.append(draw.choice(_SPACES) * draw.choice((1, 1, 1, 2, 7)))
        elif kind < 0.80:
            parts.append(draw.choice(_ODD))
        elif kind < 0.90:
            parts.append(draw.choice(quoted))
        elif kind < 0.95:
            # Runs, where the order of merges matters.
            parts.append(draw.choice("aeo01 -=.\n") * draw.randint(2, 40))
        else:
            parts.append("".join(chr(_character(draw)) for _ in range(draw.randint(1, 8))))
    return "".join(parts)


def _character(draw: random.Random) -> int:
    while True:
        number = draw.randrange(draw.choice((0x300, 0x3000, 0x110000)))
        if not 0xD800 <= number < 0xE000:
            return number
