"""Drawing of predicted beside measured times: marks lie where the numbers are."""

from xml.etree import ElementTree

import pytest

from k2train.plan.draw_intervals import LEFT, WIDTH, Row, Span, intervals_svg

SVG = "{http://www.w3.org/2000/svg}"


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name, "nan"))


def test_marks_lie_on_one_scale_from_zero() -> None:
    """Catches a row on a scale of its own, an axis that does not begin at 0, a prediction drawn as
    the measurement, and a name that breaks the file."""
    rows = [
        Row("a<b&c", "+0.0%", Span(0.5, 1.0, 2.0), Span(0.9, 1.0, 1.1)),
        Row("two", "-25.0%", Span(1.0, 1.5, 2.0), Span(1.5, 2.0, 3.0)),
    ]
    root = ElementTree.fromstring(intervals_svg(rows, 'of "x" & y', "somewhere"))
    bars = [one for one in root.iter(f"{SVG}rect") if len(one)]
    dots = [one for one in root.iter(f"{SVG}circle") if len(one)]
    spreads = [one for one in root.iter(f"{SVG}line") if len(one)]

    pixel = number(bars[0], "width") / 1.5
    assert [number(one, "x") for one in bars] == pytest.approx(
        [LEFT + 0.5 * pixel, LEFT + pixel], abs=0.1
    )
    assert number(bars[1], "width") == pytest.approx(pixel, abs=0.1)
    assert [number(one, "cx") for one in dots] == pytest.approx(
        [LEFT + pixel, LEFT + 2 * pixel], abs=0.1
    )
    ends = [(number(one, "x1"), number(one, "x2")) for one in spreads]
    assert ends[1] == pytest.approx((LEFT + 1.5 * pixel, LEFT + 3 * pixel), abs=0.1)
    # The farthest is a measurement, and still inside.
    assert pixel * 3 < WIDTH - LEFT and number(dots[0], "cy") < number(bars[1], "y")
    middles = [one for one in root.iter(f"{SVG}line") if one.get("class") == "middle-line"]
    assert number(middles[2], "x1") == pytest.approx(LEFT + 1.5 * pixel, abs=0.1)

    tooltips = [one.findtext(f"{SVG}title") for one in (bars[0], dots[1])]
    assert tooltips == ["predicted: 1 s, 0.5 to 2 s", "measured: 2 s, 1.5 to 3 s"]
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert {"a<b&c", "+0.0%", "-25.0%", 'of "x" & y', "0 s", "1 s"} <= set(texts)


def test_long_texts_end_at_the_edge() -> None:
    """Catches a title, a processor or a layout that runs out of the picture, and colors that do
    not follow the reader's setting."""
    row = Row("l" * 500, "+1.0%", Span(1, 1, 1), Span(1, 1, 1))
    text = intervals_svg([row], "t" * 500, "s" * 500)
    shown = [one.text or "" for one in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert max(map(len, shown)) < 80 and sum(one.endswith("...") for one in shown) == 3
    assert "prefers-color-scheme: dark" in text
    assert ElementTree.fromstring(intervals_svg([], "nothing", "")).tag == f"{SVG}svg"
