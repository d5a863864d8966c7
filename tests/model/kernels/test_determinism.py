"""Table of deterministic kernels: complete against the config, and nothing undeclared passes."""

from typing import Any, get_args

import pytest

from k2train.config.rules import cross_field_mistakes
from k2train.config.schema import KernelsConfig
from k2train.errors import ConfigError
from k2train.model.kernels.determinism import DETERMINISTIC, REASONS, require_deterministic
from k2train.model.kernels.select import choose_kernels


def names_of(key: str) -> set[str]:
    """Implementations that the config knows for a key."""
    return set(get_args(KernelsConfig.model_fields[key].annotation)) - {"auto"}


def test_every_kernel_is_declared() -> None:
    """Catches a new kernel that nobody examined, and a declaration of one that is gone."""
    assert set(choose_kernels().names()) == set(DETERMINISTIC)
    for key, declared in DETERMINISTIC.items():
        refused = {name for of, name in REASONS if of == key}
        assert declared | refused == names_of(key) and not declared & refused


def test_an_undeclared_kernel_is_refused() -> None:
    """Catches a list of what is forbidden in place of one of what is allowed."""
    require_deterministic({"attention": "flash", "norm": "torch"})
    with pytest.raises(ConfigError, match=r"kernels\.norm \(new\) is not deterministic: nobody"):
        require_deterministic({"attention": "flash", "norm": "new"})


def values_of(attention: str, deterministic: bool) -> dict[str, Any]:
    return {"kernels.attention": attention, "kernels.deterministic": deterministic}


def test_the_config_refuses_the_same_without_a_device() -> None:
    """Catches a config accepted before torch starts that no GPU can run, and the reverse."""
    for name in (*names_of("attention"), "auto"):
        found = cross_field_mistakes(values_of(name, deterministic=True))
        assert bool(found) == (("attention", name) in REASONS), name
        assert not cross_field_mistakes(values_of(name, deterministic=False))
    ((keys, line),) = cross_field_mistakes(values_of("cudnn", deterministic=True))
    assert keys == ("kernels.attention", "kernels.deterministic")
    with pytest.raises(ConfigError) as caught:
        require_deterministic({"attention": "cudnn"})
    assert str(caught.value) == line
