"""Picture of a check: its numbers are those of the table."""

from xml.etree import ElementTree

import pytest

from k2train.calibrate.check import check_lines
from k2train.calibrate.check_picture import picture
from tests.calibrate.test_check_file import saved

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_says_what_the_table_says() -> None:
    """Catches a row without the pace of its run, an error of the wrong sign, and a lost layout."""
    check = saved()
    root = ElementTree.fromstring(picture(check))
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert "Predicted and measured steps: configs/x.yaml model.num_layers=2" in texts
    assert "2026-01-01, a CPU, torch 2.0" in texts
    assert {"data=1: 1 rank", "tensor=2,pipeline=2: 4 ranks"} <= set(texts)
    for line in check_lines(check.checked)[2:4]:
        assert line.split("|")[7].strip() in texts

    tooltips = [one.text for one in root.iter(f"{SVG}title")]
    assert "predicted: 1.375 s, 1.1 to 1.65 s" in tooltips
    assert "measured: 1.1 s, 0.99 to 1.32 s" in tooltips
    dots = [float(one.get("cx", "nan")) for one in root.iter(f"{SVG}circle") if len(one)]
    left = 12
    assert (dots[1] - left) / (dots[0] - left) == pytest.approx(1.1 / 0.5123, rel=0.01)
