"""Rules on `profile`: steps in order, few enough for a trace that opens, and inside the run.

- `k2train.config.rules` registers those between keys; what needs the data or the number of
  processes is called where these are known.
"""

from collections.abc import Callable

from k2train.config.nearest import Values
from k2train.errors import ConfigError

Check = Callable[[Values], str | None]
MOST_STEPS = 100
"""Steps of one profile: a trace of more is larger than what a browser opens."""


def _steps_in_order(values: Values) -> str | None:
    return _in_order("profile.steps", values)


def _actions_in_order(values: Values) -> str | None:
    return _in_order("profile.actions", values)


def _in_order(key: str, values: Values) -> str | None:
    """The first step is not behind the last, and there are not too many."""
    if (steps := values[key]) is None:
        return None
    first, last = steps
    if first > last:
        return (
            f"{key} ([{first}, {last}]) must be [first, last], the last not before the "
            f"first; nearest is [{last}, {first}]"
        )
    if last - first >= MOST_STEPS:
        return (
            f"{key} ([{first}, {last}]) are {last - first + 1} steps, at most {MOST_STEPS}"
            f"; nearest is [{first}, {first + MOST_STEPS - 1}]"
        )
    return None


def _apart(values: Values) -> str | None:
    """Steps under torch's profiler are slower, so their actions say nothing of other steps."""
    steps, actions = values["profile.steps"], values["profile.actions"]
    if steps is None or actions is None or steps[1] < actions[0] or actions[1] < steps[0]:
        return None
    behind = [steps[1] + 1, steps[1] + 1 + actions[1] - actions[0]]
    return (
        f"profile.actions ([{actions[0]}, {actions[1]}]) must not share a step with profile.steps "
        f"([{steps[0]}, {steps[1]}]), which torch's profiler slows down; nearest is {behind}"
    )


PROFILE_RULES: list[tuple[tuple[str, ...], Check]] = [
    (("profile.steps",), _steps_in_order),
    (("profile.actions",), _actions_in_order),
    (("profile.steps", "profile.actions"), _apart),
]


def profile_world_mistake(values: Values, world_size: int) -> str | None:
    """Return why the rank to profile is none of `world_size`; None if it is one."""
    rank = values["profile.ranks"]
    if values["profile.steps"] is None or rank == "all" or rank < world_size:
        return None
    return (
        f"profile.ranks ({rank}) must be below the world size ({world_size}), or all; "
        f"nearest is {world_size - 1}"
    )


def check_profile_steps(
    steps: tuple[int, int] | None, total_steps: int, key: str = "profile.steps"
) -> None:
    """Raise ConfigError for a profile of steps that the run does not have."""
    if steps is not None and steps[1] > total_steps:
        raise ConfigError(
            f"{key} ([{steps[0]}, {steps[1]}]) must lie within the {total_steps} steps of "
            f"this run: lower the last to {total_steps} or less, or set {key}=null"
        )
