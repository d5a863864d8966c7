"""Figures: a value at the wrong place, a name that breaks out of the page, a spike cut away."""

import json
import math
import re
from xml.etree import ElementTree

from k2train.report.figure import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Figure,
    Mark,
    render,
)

EVIL = '</script><script>alert(1)</script>"&'


def svg_of(html: str) -> ElementTree.Element:
    found = re.search(r"<svg.*?</svg>", html, re.DOTALL)
    assert found is not None
    return ElementTree.fromstring(found[0])


def test_a_line_goes_through_its_points() -> None:
    """Catches an axis upside down, and places shifted by the margin."""
    curve = Curve("training", [(1.0, 4.0), (2.0, 3.0), (3.0, 0.0)])
    svg = svg_of(render(Figure("Loss", "nats", [curve])))
    (line,) = [e for e in svg.iter("polyline")]
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert points[0][0] == LEFT and points[-1][0] == WIDTH - RIGHT
    assert points[1][0] == (LEFT + WIDTH - RIGHT) / 2
    # Downwards: 0 is at the bottom, 4 below the room at the top.
    assert points[2][1] == HEIGHT - BOTTOM and TOP < points[0][1] < points[1][1] < points[2][1]
    assert math.isclose((HEIGHT - BOTTOM - points[1][1]) * 4, (HEIGHT - BOTTOM - points[0][1]) * 3,
                        rel_tol=0.01)  # fmt: skip


def test_what_was_done_twice_is_two_lines() -> None:
    """Catches a line drawn back across the picture where a run went back."""
    curve = Curve("undone", [(5.0, 1.0), (6.0, 1.0), (3.0, 2.0), (4.0, 2.0)])
    svg = svg_of(render(Figure("Loss", "nats", [curve])))
    assert [len(e.attrib["points"].split()) for e in svg.iter("polyline")] == [2, 2]


def test_names_cannot_leave_their_place() -> None:
    """Catches markup in a chunk's or a run's name that the browser would run."""
    curve, mark = Curve(EVIL, [(1.0, 1.0), (2.0, 2.0)], dots=True), Mark("benign", 1, 2, EVIL)
    html = render(Figure(EVIL, EVIL, [curve], [mark], note=EVIL, axis=EVIL))
    assert "<script>" not in html and "alert(1)</script>" not in html
    assert html.count("</script>") == 1
    data = re.search(r'<script type="application/json">(.*?)</script>', html)
    assert data is not None and json.loads(data[1])["curves"][0]["name"] == EVIL


def test_marks_are_where_their_steps_are() -> None:
    """Catches the band of a spike beside it."""
    curve = Curve("training", [(0.0, 1.0), (100.0, 2.0)])
    mark = Mark("malignant", 50.0, 75.0, "malignant spike")
    gone = Mark("level", 10.0, 20.0, "level", undone=True)
    svg = svg_of(render(Figure("Loss", "nats", [curve], [mark, gone])))
    rects = [e for e in svg.iter("rect") if "malignant" in e.attrib["class"]]
    width = WIDTH - LEFT - RIGHT
    assert [e.attrib["class"].split()[1] for e in rects] == ["strip", "band"]
    for rect in rects:
        assert float(rect.attrib["x"]) == LEFT + width / 2
        assert float(rect.attrib["width"]) == width / 4
        assert [e.text for e in rect.iter("title")] == ["malignant spike"]
    # What was undone paints nothing over the curve of another branch.
    (strip,) = [e for e in svg.iter("rect") if "level" in e.attrib["class"]]
    assert float(strip.attrib["y"]) + float(strip.attrib["height"]) == TOP


def test_the_table_has_the_last_value_and_no_value_outside_of_a_curve() -> None:
    """Catches a table that ends before the run does, and one that makes values up."""
    long = Curve("training", [(float(n), 10.0 - n / 100) for n in range(1, 1000)])
    short = Curve("held_out", [(100.0, 5.0), (200.0, 4.5)], dots=True)
    html = render(Figure("Loss", "nats", [long, short]))
    rows = re.findall(r"<tr><th>([\d,]+)</th><td>(.*?)</td><td>(.*?)</td></tr>", html)
    # Columns hold the mean of their steps.
    assert rows[-1][0] == "999" and abs(float(rows[-1][1]) - 0.015) < 0.01 and rows[-1][2] == ""
    # Single values stand where they are, and nowhere else.
    single = [(place, value) for place, _, value in rows if value]
    assert single == [("100", "5.000"), ("200", "4.500")] and len(rows) > 20


def test_nothing_to_show_is_nothing() -> None:
    """Catches an empty picture of what a run does not record."""
    assert render(Figure("MFU", "%", [Curve("a", []), Curve("b", [(1.0, math.nan)])])) == ""
