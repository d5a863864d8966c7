"""GPU check part `models`: whole models beside the fair peer only, in the bench's own way."""

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.part_models import compare
from benchmarks.gpu.rows import FAIR


def run(bench: Bench) -> None:
    """Measure every model and number of micro-batches while the time lasts."""
    compare(bench, (FAIR,))
