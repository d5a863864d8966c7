"""YAML text to values and back. Each test names its bug."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.config.scalars import format_value, parse_scalar
from k2train.config.yaml_source import read_source
from k2train.errors import ConfigError


def only(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_source(path)
    return str(caught.value).replace(path, "c.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e6", 3e6),
        ("1_000", 1000),
        ("-7", -7),
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("no", "no"),
        ("on", "on"),
        ("012", "012"),
        ("12:30", "12:30"),
        (".nan", ".nan"),
        (".inf", ".inf"),
        ("0x10", "0x10"),
        ("1f1b", "1f1b"),
        ("2024-01-01", "2024-01-01"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    """The traps of YAML 1.1: text read as number, number as text, `no` as false, 012 as ten.

    And the digit limit.
    """
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [1, 2", r"c.yaml:1: not YAML: "),
        (b"run:\n\tname: x", r"c.yaml:2: not YAML: "),
        (b"- a\n- b\n", r"c.yaml:1: a config is a mapping of sections"),
        (b"a: 1\n---\nb: 2\n", r"c.yaml:2: not YAML: "),
        (b"a: 1\nb: \xff\n", r"c.yaml:2: not UTF-8 text \(byte 8\)"),
        (b"a: \x00\n", r"c.yaml: not YAML: "),
        (b"a: " + b"[" * 20_000, r"c.yaml:1: not YAML: nested more than 8 deep"),
        (b"# " + b"x" * 1_000_001, r"c.yaml: larger than 1000000 bytes"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    """Catches a traceback, a recursion error or an endless read instead of one line."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert re.match(message, only(str(path)))
    assert re.search(r": cannot be read: No such file", only(str(tmp_path / "missing.yaml")))


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    """Catches a file saved by an editor that puts U+FEFF first, whose first key then is unknown."""
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun: 1\r\n")
    assert read_source(str(path)).tree == {"run": 1}


def test_aliases_are_refused(tmp_path: Path) -> None:
    """The billion-laughs file: each level of aliases multiplies what is read."""
    path = tmp_path / "c.yaml"
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 9))
    path.write_text("l0: &l0 [x]\n" + levels)
    # Of this thread: neither other programs nor what earlier tests have left count.
    start = time.thread_time()
    source = read_source(str(path))
    assert time.thread_time() - start < 2
    assert source.tree == {"l0": ["x"]}
    assert len(source.mistakes) == 8 * 9
    assert (
        str(source.mistakes[-1])
        == f"{path}:9: l8[8]: YAML alias *l7 is not accepted; write the value out"
    )


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20).filter(str.isprintable),
    st.sampled_from(
        [
            "no",
            "on",
            "1e6",
            "1_000",
            "null",
            "~",
            "-",
            "a: b",
            "#x",
            "012",
            "'",
            '"',
            "*a",
            "é",
            "🙂",
            "a b",
        ]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(SCALARS, st.lists(SCALARS, max_size=4)))
def test_any_value_written_reads_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    """Catches text that turns into a number, a boolean or a comment on its way through a file."""
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(f"key: {format_value(value)}\n", encoding="utf-8")
    back = read_source(str(path)).tree["key"]
    assert back == value
    assert type(back) is type(value)
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["key"] == value


def test_a_pipe_is_no_config(tmp_path: Path) -> None:
    """Catches a start that waits for ever for somebody to write."""
    os.mkfifo(tmp_path / "c.yaml")
    assert only(str(tmp_path / "c.yaml")).endswith("c.yaml: not a plain file; is it a config?")
