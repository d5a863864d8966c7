"""Config sections of what a run shows: W&B, TensorBoard, lines of the log, profile.

- None of them changes what is computed, so each start may have other values.
"""

from typing import Literal

from k2train.config.section import Section
from k2train.config.values import Flag, Positive, Ranks, Text


class WandbConfig(Section):
    """Mirror of the record in Weights & Biases.

    `system_stats`: whether W&B samples utilisation, memory and power of rank 0's machine.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: Text = "k2train"
    entity: Text | None = None
    group: Text | None = None
    tags: tuple[Text, ...] = ()
    notes: Text | None = None
    system_stats: Flag = False


class TrackingConfig(Section):
    """Other mirrors of the record: event files of TensorBoard in the run directory."""

    tensorboard: Flag = False


class LogConfig(Section):
    """Lines on the screen and in a log file.

    `detail`: quiet has no step lines and no progress, verbose a line of every step with all it has.
    """

    every_steps: Positive = 1
    color: Literal["auto", "on", "off"] = "auto"
    detail: Literal["normal", "quiet", "verbose"] = "normal"


class ProfileConfig(Section):
    """Profile of the steps from the first to the last of `steps`, both included.

    `actions`: the same of the steps whose actions every rank records, beside the plan's.
    """

    steps: tuple[Positive, Positive] | None = None
    ranks: Ranks = 0
    actions: tuple[Positive, Positive] | None = None
