"""The style: a color that one of the themes lacks, text that is too faint to read."""

import re

from k2train.gallery.style import OWN, STYLE

LEAST_CONTRAST = 4.5
"""Of text, by the Web Content Accessibility Guidelines 2.2, 1.4.3."""


def themes() -> tuple[dict[str, str], dict[str, str]]:
    pairs = re.compile(r"(--[a-z0-9]+):\s*(#[0-9a-f]{6})")
    query = r"@media screen and \(prefers-color-scheme: dark\) \{.*?\} \}"
    dark_part = re.compile(query, re.DOTALL)
    light = dict(pairs.findall(dark_part.sub("", STYLE)))
    return light, light | dict(pairs.findall("".join(dark_part.findall(STYLE))))


def luminance(color: str) -> float:
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_ground() -> None:
    """Catches a mark, a badge or a letter that few can read, in light or in dark."""
    for theme in themes():
        assert set(re.findall(r"var\((--[a-z0-9]+)\)", STYLE)) <= set(theme)
        for ground in ("--page", "--card", "--new", "--gone", "--hit", "--same"):
            assert contrast(theme["--text"], theme[ground]) >= LEAST_CONTRAST, ground
        for text in ("--soft", "--info", "--good", "--bad"):
            assert contrast(theme[text], theme["--page"]) >= LEAST_CONTRAST, text
        assert contrast(theme["--soft"], theme["--same"]) >= LEAST_CONTRAST
    cells = re.findall(r"(?:\.hue\d|\.cell\.\w+) \{ background: (#[0-9a-f]{6})", OWN)
    assert len(cells) >= 8 and all(contrast("#ffffff", one) >= LEAST_CONTRAST for one in cells)


def test_two_themes_differ() -> None:
    """Catches a dark theme that sets nothing."""
    light, dark = themes()
    own = {name for name in re.findall(r"(--[a-z0-9]+):", OWN)}
    assert own == {"--new", "--gone", "--hit", "--same"}
    assert all(light[name] != dark[name] for name in own)
