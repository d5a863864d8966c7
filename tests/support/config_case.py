"""Shared by the tests of the config modules: a small config, and the message of a faulty one."""

from collections.abc import Callable

import pytest

from k2train.config.load import load_config
from k2train.errors import ConfigError

MINIMAL = """\
run:
  name: small
  seed: 1
model:
  num_layers: 8
  hidden_size: 128
  ffn_hidden_size: 352
  num_heads: 4
  vocab_size: 4128
data:
  manifest: data/manifest.json
  sequence_length: 256
batch:
  global_sequences: 32
  micro_sequences: 4
lr:
  kind: cosine
  peak: 3e-3
"""

Write = Callable[[str], str]


def mistakes(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(path, "c.yaml").split("\n")


def only(path: str, *overrides: str) -> str:
    lines = mistakes(path, *overrides)
    assert len(lines) == 1, lines
    return lines[0]
