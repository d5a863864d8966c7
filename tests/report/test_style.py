"""The style: a color that the page names and no theme has, and a theme that lacks one."""

import re

from k2train.report.style import CSS
from k2train.report.time_account import KINDS


def test_every_variable_is_set_in_both_themes() -> None:
    """Catches a curve that is invisible in the dark."""
    light, rest = CSS.split("@media screen and (prefers-color-scheme: dark)", 1)
    dark = rest[: rest.index("} }")]
    named = set(re.findall(r"var\((--[a-z0-9]+)\)", CSS))
    for theme in (light, dark):
        assert named <= set(re.findall(r"(--[a-z0-9]+):", theme))


def test_every_kind_of_time_has_a_color() -> None:
    """Catches a part of the bar without one."""
    assert all(f".s-{kind} {{" in CSS for kind in KINDS)
