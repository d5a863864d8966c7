"""Export: the weights, what `transformers` makes of the folder, checks that fail, nothing left."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.tokenizer import Tokenizer
from k2train.errors import CheckpointError, RunError, UnavailableError
from k2train.files import OwnFolder
from k2train.hf import export as export_module
from k2train.hf.checkpoint_source import CheckpointSource, checkpoints_to_try
from k2train.hf.export import CheckFailedError, ExportOptions, export
from k2train.hf.names import transformers_name
from tests.support.hugging_face import (
    K2_TEMPLATE,
    LLAMA3,
    MARKERS,
    checkpoint_tensors,
    tensors_of,
)
from tests.support.json_tokenizers import make_json_tokenizer

QUICK = ExportOptions(check=False)


def newest(run: Path) -> Path:
    return checkpoints_to_try(run)[0]


def test_weights_of_four_ranks(trained: Path, tmp_path: Path) -> None:
    """Catches a tensor under another's name, rows of a rank in the wrong place, fp32 that was
    rounded to bf16 before: against the files of the checkpoint, read by their offsets.
    """
    path = newest(trained)
    assert path.name == "ckpt_001" and len(list((path / "model").iterdir())) == 4
    for precision, folder, end in (("bf16", "model", ""), ("fp32", "optimizer", ".master")):
        out = tmp_path / precision
        export(CheckpointSource(path, precision), out, None, replace(QUICK, shard_bytes=9000))
        expected, found = checkpoint_tensors(path, folder), tensors_of(out)
        assert {tensor.dtype for tensor in found.values()} == {
            torch.bfloat16 if precision == "bf16" else torch.float32
        }
        assert len(list(out.glob("model-*.safetensors"))) > 3
        for name in checkpoint_tensors(path):
            values = found[transformers_name(name)].float().numpy()
            assert np.array_equal(values, expected[f"{name}{end}"]), name
        assert len(found) == len(checkpoint_tensors(path))


def test_a_stranger_loads_it(trained: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a field of `config.json` that one version does not read: what transformers says of
    the model must be what the run's config says.
    """
    transformers = pytest.importorskip("transformers")
    done = export(CheckpointSource(newest(trained)), tmp_path / "out", tokenizer, ExportOptions())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}
    assert {key: config.rope_parameters[key] for key in rope} == rope
    assert config.num_key_value_heads == 2 and config.rms_norm_eps == 1e-3
    assert config.dtype == torch.bfloat16 and config.tie_word_embeddings is False
    # The form that version 4 reads.
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["rope_theta"] == 500.0 and content["torch_dtype"] == "bfloat16"
    assert content["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}

    record = json.loads((tmp_path / "out" / "k2train_export.json").read_text())
    manifest = json.loads((newest(trained) / "manifest.json").read_text())
    assert record["state_root"] == manifest["state"]["root"] and record["step"] == 5
    assert record["consumed_tokens"] == manifest["consumed_tokens"] == 5 * 12 * 16
    assert record["checks"]["tokenizer"]["strings"] == 1000
    assert done.model is not None and done.model.logits_apart < 1e-4
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode(
        tokenizer.encode(" spelt 7")
    )
    assert text == " spelt 7"


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and `generation_config.json` of a folder."""
    names = ("config.json", "generation_config.json")
    model, generation = (json.loads((folder / name).read_text()) for name in names)
    return model, generation


def test_a_run_that_has_learned_conversations(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Catches a folder whose answers go on into the next turn, and one that says spare rows."""
    chat = Tokenizer(tokenizer.model, ("<fim_prefix>", *MARKERS))
    options = ExportOptions(chat_template=K2_TEMPLATE)
    said: list[str] = []
    source = CheckpointSource(newest(trained))
    export(source, tmp_path / "out", chat, options, said.append)
    assert "chat template: an answer ends at </s>, <|endofchat|>" in said
    model, generation = contents(tmp_path / "out")
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, None)
    assert generation["eos_token_id"] == [2, chat.special_id("<|endofchat|>")]
    assert generation["suppress_tokens"] == list(range(345, 361))
    record = json.loads((tmp_path / "out" / "k2train_export.json").read_text())
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(record["files"]) == written - {"k2train_export.json"}
    for name, facts in record["files"].items():
        assert sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == facts["sha256"]


def test_ids_of_a_tokenizer_json(trained: Path, tmp_path: Path) -> None:
    """Catches the ids of LLaMA's sentencepiece model in a folder with another vocabulary, and in
    one without a tokenizer, where nobody knows them.
    """
    made = load_tokenizer(make_json_tokenizer(tmp_path / "tok", "digits", 330))
    source = CheckpointSource(newest(trained))
    export(source, tmp_path / "a", made, ExportOptions())
    model, generation = contents(tmp_path / "a")
    ids = (None, made.eos_id, made.pad_id)
    assert made.eos_id == 0 and made.pad_id == 1
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == ids
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ids[1:]
    assert generation["suppress_tokens"] == list(range(330, 361))
    export(source, tmp_path / "b", None, QUICK)
    model, generation = contents(tmp_path / "b")
    assert model["bos_token_id"] is None and model["eos_token_id"] is None
    assert generation["eos_token_id"] is None and "suppress_tokens" not in generation


def test_a_large_model_is_checked_in_parts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that passes for small models only, because it has another way for large."""
    monkeypatch.setattr("k2train.hf.model_check.WHOLE_BYTES", 0)
    done = export(CheckpointSource(newest(trained)), tmp_path / "out", None, ExportOptions())
    assert done.model is not None and done.model.by == "its modules, one at a time"
    assert done.model.logits_apart < 1e-4 and done.model.tokens == 2 * 16


@pytest.mark.parametrize("whole", (True, False))
@pytest.mark.parametrize(
    "change",
    (
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rms_norm_eps": 1e-6},
        {"num_key_value_heads": 4},
    ),
    ids=("positions", "norm", "heads"),
)
def test_a_wrong_folder_is_not_left(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    whole: bool,
) -> None:
    """Catches a check that compares nothing: one wrong field of `config.json` must end the export
    and leave no folder.
    """
    right = export_module.config_json
    monkeypatch.setattr(export_module, "config_json", lambda *a: right(*a) | change)
    if not whole:
        monkeypatch.setattr("k2train.hf.model_check.WHOLE_BYTES", 0)
    with pytest.raises((CheckFailedError, CheckpointError)) as caught:
        export(CheckpointSource(newest(trained)), tmp_path / "out", None, ExportOptions())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_differs_is_not_left(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that does not see a tokenizer with a space too many."""
    right = export_module.write_tokenizer

    def wrong(folder: Path, *rest: Any) -> None:
        right(folder, *rest)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "Prepend", "prepend": " "}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    monkeypatch.setattr(export_module, "write_tokenizer", wrong)
    with pytest.raises(CheckFailedError, match=r"encodes 9.. and decodes"):
        export(CheckpointSource(newest(trained)), tmp_path / "out", tokenizer, ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_what_exists_stays(trained: Path, tmp_path: Path) -> None:
    """Catches an export into a folder that holds something."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RunError, match="exists; name a new folder"):
        export(CheckpointSource(newest(trained)), tmp_path / "out", None, QUICK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_flipped_byte_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    """Catches weights that are exported although they are not those saved."""
    path = tmp_path / "ckpt_001"
    shutil.copytree(newest(trained), path)
    file = sorted((path / "model").iterdir())[2]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    source = CheckpointSource(path)
    with pytest.raises(CheckpointError, match=r"model/shard-00003.* ") as caught:
        export(source, tmp_path / "out", None, QUICK)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_001"]


def test_two_at_once_do_not_mix(trained: Path, tmp_path: Path) -> None:
    """Catches a second export that takes away what the first one writes."""
    own = OwnFolder(tmp_path / ".out.export.tmp")
    (own.path / "file").touch()
    with pytest.raises(RunError, match="is being written by another export"):
        export(CheckpointSource(newest(trained)), tmp_path / "out", None, QUICK)
    assert (own.path / "file").exists()
    own.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a folder, and a traceback, when the disk fills up meanwhile or is full."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("k2train.hf.shard_writer._write", full)
        with pytest.raises(UnavailableError, match=r"No space left on device.*; nothing was left"):
            export(CheckpointSource(newest(trained)), tmp_path / "out", None, QUICK)
    monkeypatch.setattr(export_module, "free_bytes", lambda path: 1000)
    with pytest.raises(RunError, match="are free: free space, or name a folder"):
        export(CheckpointSource(newest(trained)), tmp_path / "out", None, QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", (1, 2, 3))
def test_older_formats_are_exported(number: int, tmp_path: Path) -> None:
    """Catches a checkpoint of an earlier version that can no longer be read as a whole."""
    path = Path(__file__).parents[1] / "golden" / f"format_{number}" / "ckpt_001"
    export(CheckpointSource(path), tmp_path / "out", None, QUICK)
    expected, found = checkpoint_tensors(path), tensors_of(tmp_path / "out")
    assert len(found) == len(expected) == 12
    for name, values in expected.items():
        assert np.array_equal(found[transformers_name(name)].numpy(), values), name
