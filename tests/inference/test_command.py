"""Options that generate.py and chat.py share: a layout of other processes, a mistake said twice."""

import pytest

from k2train.command_line import Parser
from k2train.errors import ConfigError, UserError
from k2train.inference import command
from k2train.launch.environment import Launch


def options(*given: str) -> object:
    parser = Parser(prog="tool")
    command.add_options(parser, 7, "answer")
    return parser.parse_args(given)


def test_a_layout_must_be_that_of_the_processes() -> None:
    """Catches ranks that wait for others which were never started."""
    asked = options("--tensor", "2", "--pipeline", "3")
    command.check_ranks(asked, Launch(0, 6, 0, launched=True))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="= 6 processes, and 4 were started"):
        command.check_ranks(asked, Launch(0, 4, 0, launched=True))  # type: ignore[arg-type]


def test_options_reach_the_draws() -> None:
    """Catches an option that is read and not used, and a default that draws."""
    sampling = command.sampling_of(
        options("--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--seed", "4")  # type: ignore[arg-type]
    )
    found = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
    assert found == (0.5, 3, 0.9, 4)
    assert command.sampling_of(options()).temperature == 0.0  # type: ignore[arg-type]


def test_rank_0_speaks_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mistake that every rank prints, and a note that none does."""
    slept: list[float] = []
    monkeypatch.setattr(command.time, "sleep", slept.append)

    def fail() -> int:
        raise UserError("wrong")

    for rank in (0, 1):
        launch = Launch(rank, 2, rank, launched=True)
        with pytest.raises(UserError):
            command.with_one_voice(fail, launch)
        command.note(launch)(f"rank {rank}")
    assert slept == [0, command.OTHER_RANKS_DELAY_SECONDS]
    assert capsys.readouterr().err == "rank 0\n"
