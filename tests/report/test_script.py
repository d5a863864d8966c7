"""The switch of the axis in a real browser: points at a wrong place, an axis that is not kept."""

import json
import re
from dataclasses import replace
from pathlib import Path

from k2train.record.events import Spike, Started
from k2train.report.collect import read_run
from k2train.report.figure import LEFT, RIGHT, WIDTH
from k2train.report.page import write_report
from tests.support.browser import open_page
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records

LOOK = """<script>
const seen = {};
const look = name => {
  const svg = document.querySelector("svg");
  seen[name] = {
    points: svg.querySelector("polyline").getAttribute("points"),
    band: +svg.querySelector("rect.band").getAttribute("x"),
    axis: svg.querySelector(".axis").textContent,
    ticks: [...svg.querySelectorAll(".tick")].map(tick => tick.textContent),
  };
};
look("step");
for (const axis of ["tokens", "time", "step"]) {
  const input = document.querySelector(`input[value=${axis}]`);
  input.click();
  look(axis === "step" ? "back" : axis);
}
document.body.dataset.seen = JSON.stringify(seen);
</script>"""


def places(points: str) -> list[float]:
    return [float(pair.split(",")[0]) for pair in points.split()]


def test_every_axis_has_the_points_where_they_belong(tmp_path: Path) -> None:
    """Catches a curve over tokens drawn over steps, marks that stay behind, and a way back that
    ends elsewhere.
    """
    spike = Spike(attempt=1, policy="alert", usual_loss=2.0, kind="level", step=4, onset=3)
    run = tmp_path / "run"
    write_ledger(run, [(0.0, event(Started, attempt=1)), (4.0, spike)])
    # Steps of 1000 tokens, then of 3000; seconds rise the other way.
    tokens, seconds = [1000, 2000, 5000, 8000], [300.0, 100.0, 100.0, 100.0]
    rows = [
        replace(step(n, loss=5.0 - n, seconds=seconds[n - 1]), consumed_tokens=tokens[n - 1])
        for n in range(1, 5)
    ]
    write_records(run, rows)
    path = tmp_path / "report.html"
    write_report(path, read_run(run))
    path.write_text(path.read_text().replace("</body>", f"{LOOK}</body>"))
    dom, console = open_page(path, tmp_path / "browser")
    assert console == [] and '<fieldset class="switch">' in dom

    found = re.search(r'data-seen="(.*?)"', dom)
    assert found is not None
    seen = json.loads(found[1].replace("&quot;", '"'))
    width = WIDTH - RIGHT - LEFT
    shares = {
        "step": [0, 1 / 3, 2 / 3, 1],
        "tokens": [0, 1 / 7, 4 / 7, 1],
        "time": [0, 1 / 3, 2 / 3, 1],
    }
    for axis, expected in shares.items():
        at = places(seen[axis]["points"])
        wanted = [LEFT + width * share for share in expected]
        # Points are drawn to a tenth of a pixel, over steps and again over the other axis.
        assert all(abs(a - b) < 0.6 for a, b in zip(at, wanted, strict=True)), axis
        assert abs(seen[axis]["band"] - wanted[2]) < 0.6
    assert seen["back"]["points"] == seen["step"]["points"]
    assert [seen[axis]["axis"] for axis in ("step", "tokens", "time")] == [
        "step",
        "tokens",
        "minutes of training",
    ]
    assert seen["tokens"]["ticks"] == ["1K", "2K", "3K", "4K", "5K", "6K", "7K", "8K"]
    assert seen["time"]["ticks"][0] == "5" and seen["time"]["ticks"][-1] == "10"
