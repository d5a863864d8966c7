"""Facts of a run's record."""

import shutil
from pathlib import Path

import pytest
import yaml

from k2train.checkpoint.manifest import manifest_sha256, read_manifest
from k2train.errors import RunError
from k2train.proofs.facts import is_path, read_stages
from k2train.record.metrics import read_metrics
from tests.proofs.conftest import READ, TOKENIZER, WATTS, Made
from tests.support.tiny_corpus import GLOBAL, SEQUENCE


def test_facts_are_those_of_the_files(made: Made) -> None:
    """Catches a root of another checkpoint, and a config that is not the run's."""
    (stage,) = read_stages([made.run])
    assert [one.event.checkpoint for one in stage.checkpoints] == [
        "ckpt_000",
        "ckpt_001",
        "ckpt_002",
    ]
    for event, root in stage.checkpoints:
        path = made.run / "checkpoints" / event.checkpoint
        state = read_manifest(path).state
        assert state is not None and root == state.root
        assert event.manifest_sha256 == manifest_sha256(path)
    config = yaml.safe_load((made.run / "config.yaml").read_text())
    assert stage.config[0]["optimizer.clip_norm"] == config["optimizer"]["clip_norm"]
    assert stage.data is not None and stage.data.tokenizer_sha256 == TOKENIZER
    assert [info.name for info in stage.chunks] == [*READ]
    assert any("1 of 3 chunks of the data were not read" in line for line in stage.open)
    assert stage.view.kept[-1].consumed_tokens == 10 * GLOBAL * SEQUENCE


def test_energy_is_power_times_time(made: Made) -> None:
    """Catches joules for kilowatt-hours, and energy of nothing."""
    (stage,) = read_stages([made.run])
    energy = stage.energy
    assert energy is not None and energy.how == "assumed"
    seconds = energy.kwh * 3.6e6 / WATTS
    trained = sum(record.seconds or 0.0 for record in read_metrics(made.run / "metrics.jsonl"))
    # Steps, and what is between the first and the last event.
    times = [entry.time for entry in stage.view.entries]
    assert times == sorted(times)
    assert trained <= seconds < trained + 600
    assert energy.tonnes == pytest.approx(energy.kwh / 1000 * 0.4)


def test_names_and_paths_are_withheld(made: Made, tmp_path: Path) -> None:
    """Catches a path of the machine, or an account, that is published with the config."""
    run = Path(shutil.copytree(made.run, tmp_path / "tiny"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    # A key that no list names: its value alone tells.
    config["data"]["held_out_sets"] = {"other": str(made.run.parent / "other")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (stage,) = read_stages([run])
    shown, withheld = stage.config
    assert {"data.manifest", "run.directory", "wandb.entity"} <= {*withheld}
    assert "data.held_out_sets.other" in withheld
    assert not {*withheld} & shown.keys()
    assert "someone" not in repr(shown) and str(made.run.parent) not in repr(shown)
    assert is_path("a/b") and is_path("~me") and is_path("C:\\x") and not is_path("1f1b")
    assert not is_path("https://letters.example/a")


def test_other_data_is_not_described(made: Made, tmp_path: Path) -> None:
    """Catches hashes of chunks that the run never read."""
    run = Path(shutil.copytree(made.run, tmp_path / "tiny"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = Path(shutil.copytree(made.data.folder, tmp_path / "data"))
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"text"', '"jsonl"'))
    config["data"]["manifest"] = str(manifest)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (stage,) = read_stages([run])
    assert stage.view.data is not None and stage.data is None
    assert any("another one than at the start" in line for line in stage.open)


def test_what_is_not_known_is_open(made: Made, tmp_path: Path) -> None:
    """Catches a gap of the record that no line names."""
    run = Path(shutil.copytree(made.run, tmp_path / "tiny"))
    (run / "config.yaml").unlink()
    shutil.rmtree(run / "checkpoints" / "ckpt_001")
    (stage,) = read_stages([run])
    text = "\n".join(stage.open)
    for words in ("the config cannot be read", "energy was neither", "data manifest", "ckpt_001"):
        assert words in text
    assert "ckpt_002" not in text
    with pytest.raises(RunError):
        read_stages([tmp_path])
