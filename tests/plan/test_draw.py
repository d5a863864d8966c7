"""Pipeline drawing: the picture matches the spans."""

import re
from xml.etree import ElementTree

from k2train.plan.draw import MAX_PANELS, draw, svg
from k2train.plan.schedule import Action, Op, build_programs
from k2train.plan.simulate import Span, simulate

SVG = "{http://www.w3.org/2000/svg}"


def test_a_small_step_by_hand() -> None:
    """Catches spans in the wrong row or column, and forwards that look like backwards."""
    picture = draw(simulate(build_programs("1f1b", 2, 2)), width=25, unit="forwards")
    assert picture.splitlines() == [
        "3- forward of micro-batch 3, 3= backward, . idle; one column = 0.5 forwards",
        "rank 0 0-1-....0===..1===",
        "rank 1 ..0-0===1-1===....",
    ]


def test_stages_of_a_rank_are_told_apart() -> None:
    """Catches two stages drawn alike: a first stage's forward is a, its backward A, the second's b
    and B.
    """
    first = draw(simulate(build_programs("interleaved", 2, 2, 2)), width=80).splitlines()[2]
    assert [word for word in re.split(r"[-=.]+", first.removeprefix("rank 0 ")) if word] == [
        *("a0", "a1", "b0", "b1", "B0", "B1", "A0", "A1")
    ]


def test_a_long_step_goes_on_in_panels_within_the_width() -> None:
    """Catches lines that a terminal breaks, and micro-batches that are dropped from the picture."""
    lines = draw(simulate(build_programs("1f1b", 4, 34)), width=100).splitlines()
    assert max(map(len, lines)) <= 100
    rows = "".join(line.removeprefix("rank 3 ") for line in lines if line.startswith("rank 3"))
    assert re.findall(r"\d+(?==)", rows) == [str(microbatch) for microbatch in range(34)]
    longest = draw(simulate(build_programs("gpipe", 2, 300)), width=60).splitlines()
    assert sum(line.startswith("rank 0") for line in longest) <= MAX_PANELS


def test_where_there_is_no_room_a_backward_keeps_its_mark() -> None:
    """Catches a squeezed backward that reads as a forward: here it has 2 columns for the
    label 10.
    """
    spans = [
        Span(0, Action(Op.FORWARD, 0, 10), 0.0, 3.0),
        Span(0, Action(Op.BACKWARD, 0, 10), 3.0, 5.0),
    ]
    assert draw(spans, width=12).splitlines()[1] == "rank 0 10-0="


def test_measured_spans_are_drawn_by_the_same_function() -> None:
    """Catches a picture that starts at time 0 or wants whole numbers."""
    spans = [
        Span(0, Action(Op.FORWARD, 0, 0), 50.25, 50.5),
        Span(0, Action(Op.BACKWARD, 0, 0), 50.75, 51.25),
    ]
    assert draw(spans, width=15).splitlines()[1] == "rank 0 0-..0==="
    assert draw([]) == "nothing to draw"
    assert (
        draw([Span(0, Action(Op.FORWARD, 0, 0), 1.0, 1.0)])
        == "nothing to draw: the spans take no time"
    )


def test_the_halves_of_a_backward_are_told_apart() -> None:
    """Catches an input gradient drawn as weight gradients, and a key that speaks of what is not in
    the picture.
    """
    picture = draw(simulate(build_programs("zb-h1", 2, 2)), width=25, unit="forwards")
    assert picture.splitlines() == [
        (
            "3- forward of micro-batch 3, 3~ input gradient, 3+ weight gradients, . idle; one "
            "column = 0.5 forwards"
        ),
        "rank 0 0-1-..0~0+1~1+",
        "rank 1 ..0-0~1-1~0+1+",
    ]
    root = ElementTree.fromstring(svg(simulate(build_programs("zb-v", 2, 3, 2))))
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"forward", "input gradient", "weight gradients"} < words and "backward" not in words
    style = str(next(root.iter(f"{SVG}style")).text)
    patterns = {pattern.get("id") for pattern in root.iter(f"{SVG}pattern")}
    assert patterns == {"I-lines", "W-lines"} and all(f"url(#{name})" in style for name in patterns)


def test_svg_has_a_box_for_every_action_at_its_time() -> None:
    """Catches broken XML (a unit with a special character), lost boxes, and boxes whose length is
    not their time.
    """
    spans = simulate(build_programs("1f1b", 2, 3))
    root = ElementTree.fromstring(svg(spans, width=600, unit="<s>"))
    boxes = {str(box[0].text).split(":")[0]: box for box in root.iter(f"{SVG}rect") if len(box)}
    computes = [span for span in spans if span.action.op.is_compute]
    assert set(boxes) == {str(span.action) for span in computes}
    assert {
        boxes[str(span.action)].get("class") for span in computes if span.action.op is Op.BACKWARD
    } == {"B"}
    scale = float(boxes["0F0"].get("width", "nan"))

    for span in computes:
        box = boxes[str(span.action)]
        assert (
            abs(float(box.get("width", "nan")) - scale * (span.end_seconds - span.start_seconds))
            < 0.05
        )
        assert (
            abs(
                float(box.get("x", "nan"))
                - float(boxes["0F0"].get("x", "nan"))
                - scale * span.start_seconds
            )
            < 0.1
        )

    assert len({boxes[str(span.action)].get("y") for span in computes}) == 2
    assert "; the number is the micro-batch<" in svg(spans)
    # A picture without one number says so, in place of the line about numbers.
    many = svg(simulate(build_programs("1f1b", 2, 300)))
    assert "; boxes too narrow for their numbers<" in many and "the number is" not in many
    assert ElementTree.fromstring(svg([])).tag == f"{SVG}svg"
