"""Drawing of planned above measured lanes: the boxes match the times."""

from xml.etree import ElementTree

import pytest

from k2train.plan.draw_lanes import Box, Pair, lanes_svg


def test_the_picture_has_both_lanes_on_one_scale() -> None:
    """Catches lanes of different scales, a rank without its lane, and broken XML."""
    planned = [Box("F", 0.0, 1.0, "0", "0F0 <planned>")]
    measured = [Box("F", 0.0, 2.0, "0", "0F0"), Box("update", 2.0, 2.5, "", "update")]
    text = lanes_svg([Pair("rank 0", planned, measured), Pair("rank 1", planned, [])], "a & b")
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    boxes = [box for box in root.iter(f"{name}rect") if len(box)]
    widths = [float(box.get("width", "nan")) for box in boxes]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.02) and len(boxes) == 4
    assert {box.get("x") for box in boxes if box.get("class") == "box F"} == {boxes[0].get("x")}
    assert len({box.get("y") for box in boxes}) == 3
    assert "prefers-color-scheme: dark" in text
    assert ElementTree.fromstring(lanes_svg([], "nothing")).tag == f"{name}svg"
