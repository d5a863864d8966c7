"""Presets: files that fell behind, sizes that are not published ones, layouts that do not fit."""

from pathlib import Path

import pytest
from config_presets import PRESETS, preset_text
from config_reference import EXAMPLE, PRESET_FOLDER, ROOT

from k2train.config.load import load_config
from k2train.config.schema import flat_values
from k2train.plan.cost import parameters
from k2train.text import bytes_text
from k2train.train.setup import Setup

LEFT_SHARE = 0.1
"""Of a device, for the communicators, the CUDA context and fragments, which the plan leaves out."""
PUBLISHED = {
    # 12 layers of 4 x 768^2 + 3 x 768 x 2048 + 2 x 768, 2 x 50,304 x 768 and the last norm
    "llama_160m": 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 2 * 50304 * 768 + 768,
    "llama_1b": 1_100_048_384,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    # Llama 3 70B's layers, with an embedding and a head of 250,112 rows
    "k2_v2": 70_553_706_496 + 2 * 8192 * (250_112 - 128_256),
}
"""Parameters as the model cards have them: TinyLlama 1.1B, Llama 3 8B and 70B."""


def file_of(name: str) -> Path:
    return PRESET_FOLDER / f"{name}.yaml"


def test_the_files_are_up_to_date() -> None:
    """Catches a key that was added to the demo alone, and a preset changed by hand."""
    example = EXAMPLE.read_text(encoding="utf-8")
    assert sorted(path.stem for path in PRESET_FOLDER.iterdir()) == sorted(PRESETS)
    for name in PRESETS:
        text = file_of(name).read_text(encoding="utf-8")
        assert text == preset_text(name, example), "run python tools/config_reference.py"


@pytest.mark.parametrize("name", PRESETS)
def test_values_of_a_file_are_those_of_the_preset(name: str) -> None:
    """Catches a value that is lost on its way into the file, and one that the file spells wrong."""
    found = flat_values(load_config(str(file_of(name))))
    for section, values in PRESETS[name].values.items():
        for key, value in values.items():
            written = found[f"{section}.{key}"]
            assert written == (tuple(value) if isinstance(value, list) else value), key
    assert found["run.name"] == name.replace("_", "-") and found["precision"] == "bf16"


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_has_a_comment(name: str) -> None:
    """Catches a comment that is lost, or left over from the demo."""
    lines = file_of(name).read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if line.startswith(("  ", "precision"))]
    assert len(keys) > 70 and not [line for line in keys if not line.partition("  # ")[2]]
    batch = next(line for line in lines if line.startswith("  global_sequences"))
    config = load_config(str(file_of(name)))
    tokens = config.batch.global_sequences * config.data.sequence_length
    assert batch.endswith(f"{tokens:,} tokens"), batch


@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name in PRESETS for world in PRESETS[name].worlds]
)
def test_a_preset_fits_its_devices(name: str, world: int) -> None:
    """Catches a layout that does not divide, one that does not fit, and another model."""
    config = load_config(str(file_of(name)))
    setup = Setup.of(config, world)
    work = setup.work("cuda")
    peaks = [setup.memory(work, pp).total_bytes for pp in range(setup.layout.pipeline)]
    assert max(peaks) <= (1 - LEFT_SHARE) * PRESETS[name].device_gb * 1e9
    if world == min(PRESETS[name].worlds):
        page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}.yaml` |")]
        assert row.endswith(f"| {bytes_text(max(peaks))} |"), bytes_text(max(peaks))
    assert parameters(setup.architecture) == PUBLISHED[name]
    title = file_of(name).read_text(encoding="utf-8").splitlines()[0]
    assert str(max(PRESETS[name].worlds)) in title
