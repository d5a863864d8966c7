"""Picture of a check: the predicted interval of every layout beside its measured steps, as SVG.

- All times are those at the pace of their runs, as in the table.
- Each row has the error of its prediction, with its sign.
"""

from k2train.calibrate.check import Checked
from k2train.calibrate.check_file import SavedCheck
from k2train.plan.draw_intervals import Row, Span, intervals_svg
from k2train.text import clean, counted


def picture(check: SavedCheck) -> str:
    """SVG of a check, its layouts from top to bottom."""
    facts = check.facts
    title = f"Predicted and measured steps: {' '.join((facts.config, *facts.overrides))}"
    source = f"{facts.when[:10]}, {facts.processor}, torch {facts.torch}"
    return intervals_svg([_row(one) for one in check.checked], clean(title), clean(source))


def _row(one: Checked) -> Row:
    predicted = (one.predicted.low, one.predicted.seconds, one.predicted.high)
    return Row(
        f"{clean(one.case.text)}: {counted(one.case.world_size, 'rank')}",
        f"{one.error:+.1%}",
        Span(*(one.pace * seconds for seconds in predicted)),
        Span(*(one.pace * seconds for seconds in (one.low, one.seconds, one.high))),
    )
