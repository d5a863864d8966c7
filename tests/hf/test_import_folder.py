"""Import: there and back bit for bit, what differs from us is refused by name, nothing left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.checkpoint.manifest import is_thinned
from k2train.checkpoint.verify import verify_checkpoint
from k2train.data.tokenizer import Tokenizer
from k2train.errors import CheckpointError, DataError, RunError, UserError
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.hf.export import ExportOptions, export
from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.import_folder import import_folder, is_import_of, notes_of
from k2train.hf.model_check import check_model, our_logits
from k2train.hf.names import transformers_name
from k2train.hf.tokenizer_files import write_tokenizer
from k2train.hf.tokenizer_source import tokenizer_of, tokenizer_of_folder
from tests.support.hugging_face import LLAMA3, checkpoint_tensors, edit, llama, saved, tensors_of

pytest.importorskip("transformers")
QUICK = ExportOptions(check=False, shard_bytes=3000)


def imported(folder: Path, run: Path) -> Path:
    path = run / "checkpoints" / "ckpt_000"
    import_folder(HuggingFaceFolder(folder), path)
    return path


MODELS: dict[str, dict[str, Any]] = {
    "all heads": {},
    "grouped heads": {"num_key_value_heads": 2},
    "one key head, another base": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama 3": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
    },
    "tied": {"tie_word_embeddings": True},
    "another epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", MODELS)
def test_our_model_computes_theirs(name: str, tmp_path: Path) -> None:
    """Catches a part of the architecture that is read otherwise than transformers means it: logits
    of a random model of theirs, by our forward pass over the imported checkpoint.
    """
    model = llama(**MODELS[name])
    path = imported(saved(tmp_path / "hf", model), tmp_path / "run")
    source = CheckpointSource(path)
    tokens = torch.randint(61, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
        ours = our_logits(source.architecture, source.read, tokens)
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("llama 3", "all heads"))
def test_there_and_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches a value, a name or a byte that changes on the way: import, export, import, export."""
    model = llama(**MODELS[name])
    first = imported(saved(tmp_path / "hf", model, dtype, max_shard_size="4KB"), tmp_path / "one")
    export(CheckpointSource(first), tmp_path / "a", None, QUICK)
    for key, value in tensors_of(tmp_path / "hf").items():
        assert torch.equal(tensors_of(tmp_path / "a")[key], value), key
    second = imported(tmp_path / "a", tmp_path / "two")
    export(CheckpointSource(second), tmp_path / "b", None, QUICK)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert len(names) > 5 and names == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in set(names) - {"k2train_export.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_run_and_back(trained: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a checkpoint of four ranks that comes back as another one."""
    path = trained / "checkpoints" / "ckpt_001"
    export(CheckpointSource(path), tmp_path / "a", tokenizer, QUICK)
    back = imported(tmp_path / "a", tmp_path / "run")
    before, after = checkpoint_tensors(path), checkpoint_tensors(back)
    assert list(before) != [] and {k: v.tobytes() for k, v in before.items()} == {
        k: v.tobytes() for k, v in after.items()
    }
    assert verify_checkpoint(back).step == 0 and is_thinned(back)
    source = CheckpointSource(back)
    carried = tokenizer_of(back, source.manifest, None)
    assert carried is not None and carried.sha256 == tokenizer.sha256
    export(source, tmp_path / "b", carried, QUICK)
    for name in ("tokenizer.json", "tokenizer.model", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_tied_head_becomes_one_of_its_own(tmp_path: Path) -> None:
    """Catches a tied model that is imported without a word, or without a head."""
    folder = saved(tmp_path / "hf", llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in tensors_of(folder)
    assert "the head becomes a tensor of its own" in notes_of(HuggingFaceFolder(folder))[0]
    path = imported(folder, tmp_path / "run")
    found = checkpoint_tensors(path)
    assert (found["head.weight"] == found["embedding.weight"]).all()
    export(CheckpointSource(path), tmp_path / "out", None, QUICK)
    assert "lm_head.weight" in tensors_of(tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_mistral_is_the_same_model(tmp_path: Path) -> None:
    """Catches Mistral refused where it is equal, and taken where its window is shorter."""
    import transformers

    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        sliding_window=None,
    )
    model = transformers.MistralForCausalLM(config).eval()
    saved(tmp_path / "hf", model)
    source = CheckpointSource(imported(tmp_path / "hf", tmp_path / "run"))
    tokens = torch.arange(32).view(1, 32)
    with torch.no_grad():
        ours = our_logits(source.architecture, source.read, tokens)
        assert (ours - model(input_ids=tokens).logits).abs().max() < 1e-5
    edit(tmp_path / "hf" / "config.json", sliding_window=16)
    with pytest.raises(CheckpointError, match="sliding_window is 16; supported is null, or all"):
        HuggingFaceFolder(tmp_path / "hf")


REFUSED = (
    ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'; supported is llama and mistral"),
    ({"architectures": ["LlamaModel"]}, r"architectures is \['LlamaModel'\]; supported is Llama"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; supported is False"),
    ({"head_dim": 8}, r"head_dim is 8; supported is hidden_size / heads \(4\)"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; supported is default and"),
    ({"rope_theta": 7.0}, r"rope_theta is 7.0; supported is that of rope_parameters \(10000.0\)"),
    (
        {"rope_scaling": {"rope_type": "llama3"}},
        "rope_scaling.rope_type is 'llama3'; supported is that of rope_parameters",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config is .*; supported is None"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4"),
    ({"hidden_size": "16"}, "hidden_size is '16'; supported is a whole number from 1"),
    ({"intermediate_size": 25}, r"mlp.gate_proj.weight has shape \[24, 16\], config.json makes it"),
    ({"num_hidden_layers": 3}, "model.layers.2.* is in no file"),
    ({"num_hidden_layers": 1}, "model.layers.1.* is no tensor of this architecture"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("hf") / "model", llama(), max_shard_size="4KB")


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(c)[:40] for c, _ in REFUSED])
def test_another_architecture_is_refused_by_name(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Catches a model that is loaded and computes something else."""
    shutil.copytree(folder, tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        HuggingFaceFolder(tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    """Catches a shard that is missing, cut, a pickle or no safetensors file at all."""
    shutil.copytree(folder, tmp_path / "hf")
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    content = files[1].read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            import_folder(HuggingFaceFolder(tmp_path / "hf"), tmp_path / "run" / "ckpt_000")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []

    files[1].unlink()
    refused(f"{files[1].name} is missing, of {len(files)} files; copy it again")
    files[1].write_bytes(content[:-8])
    refused("ends inside '")
    files[1].write_bytes(b"\xff" * 64)
    refused("is no safetensors file")
    files[1].write_bytes(content)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    refused("outside of the folder")
    for file in (tmp_path / "hf").glob("model*"):
        file.unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"x")
    refused("pytorch_model.bin is a pickle, which is not read")
    (tmp_path / "hf" / "config.json").unlink()
    refused("is no Hugging Face folder: it has no config.json")


def test_a_changed_value_of_an_export_is_found(folder: Path, tmp_path: Path) -> None:
    """Catches a bit that flipped after an export, which no header shows."""
    export(CheckpointSource(imported(folder, tmp_path / "one")), tmp_path / "a", None, QUICK)
    file = min((tmp_path / "a").glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not match its hash in k2train_export\.json"):
        imported(tmp_path / "a", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_an_import_never_overwrites(folder: Path, tmp_path: Path) -> None:
    """Catches an import over a run, and a folder taken for the one that was imported before."""
    path = imported(folder, tmp_path)
    with pytest.raises(RunError, match="a checkpoint is never overwritten"):
        imported(folder, tmp_path)
    assert is_import_of(path, HuggingFaceFolder(folder))
    other = saved(tmp_path / "other", llama(rms_norm_eps=1e-3), max_shard_size="4KB")
    assert not is_import_of(path, HuggingFaceFolder(other))


def test_the_tokenizer_of_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches special tokens that are lost, which would make it another tokenizer."""
    assert tokenizer_of_folder(tmp_path) is None
    write_tokenizer(tmp_path, tokenizer, 64)
    found = tokenizer_of_folder(tmp_path)
    assert found is not None and found.sha256 == tokenizer.sha256
    # As transformers' own LlamaTokenizer saves: no rules appended, names in two files.
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / "tokenizer.json").unlink()
    again = tokenizer_of_folder(tmp_path)
    assert again is not None and again.sha256 == tokenizer.sha256
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del content["added_tokens_decoder"][str(tokenizer.base_size + 3)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="the special tokens behind them leave gaps"):
        tokenizer_of_folder(tmp_path)


def test_the_check_sees_one_value(folder: Path, tmp_path: Path) -> None:
    """Catches a tolerance that hides a single changed weight."""
    source = CheckpointSource(imported(folder, tmp_path / "run"))
    export(source, tmp_path / "out", None, QUICK)

    def changed(name: str) -> torch.Tensor:
        values = source.read(name)
        if name == "layers.1.attention.key.weight":
            values[2, 3] += 0.1
        return values

    right = check_model(source.architecture, source.read, tmp_path / "out", 32)
    wrong = check_model(source.architecture, changed, tmp_path / "out", 32)
    assert right.problem == "" and "computes other logits" in wrong.problem
    assert transformers_name("layers.1.attention.key.weight") in tensors_of(folder)


def test_a_failed_import_leaves_no_folder(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Catches a traceback of a strange tokenizer file, and an empty run directory."""
    shutil.copytree(folder, tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", tokenizer, 64)
    for content in ('{"added_tokens_decoder": {"x": 3}}', '{"added_tokens_decoder": {"7": 3}}'):
        (tmp_path / "hf" / "tokenizer_config.json").write_text(content)
        with pytest.raises(
            DataError, match=r"tokenizer\.model: the added tokens beside it are none"
        ):
            imported(tmp_path / "hf", tmp_path / "runs" / "r")
    assert not (tmp_path / "runs").exists()


def test_ids_of_a_folder_without_a_tokenizer_come_back(folder: Path, tmp_path: Path) -> None:
    """Catches LLaMA's ids in an export of a model with other ones."""
    shutil.copytree(folder, tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", bos_token_id=7, eos_token_id=[9, 8], pad_token_id=None)
    export(
        CheckpointSource(imported(tmp_path / "hf", tmp_path / "run")), tmp_path / "out", None, QUICK
    )
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "out" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (7, 9)
        assert content.get("pad_token_id") is None
