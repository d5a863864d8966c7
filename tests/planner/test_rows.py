"""Rows of a CSV as workloads: what cells mean, and what empty ones do."""

import pytest

from k2train.errors import ConfigError
from k2train.plan.hardware import Cluster
from k2train.planner import rows as rows_module
from k2train.planner.rows import case_of, cases_of

ROW = {
    "layers": "32",
    "hidden": "4096",
    "ffn": "14336",
    "heads": "32",
    "kv_heads": "8",
    "vocab": "128256",
    "seq": "8192.0",
    "tp": "2",
    "pp": "2",
    "vpp": "1",
    "dp": "4",
    "cp": "1",
    "mbs": "1",
    "gbs": "32",
    "sp": "1.0",
    "recompute": "full",
    "zero": "1",
    "gpu": "H100-80GB",
    "n_gpus": "16",
    "precision": "bf16",
    "mlp": "swiglu",
    "tied": "0",
    "attn": "flash/TE",
    "overlap": "dp+tp+pp",
    "schedule": "1f1b",
    "notes": "",
}


def test_a_whole_row_is_read() -> None:
    """Catches a column that is read under another meaning."""
    work = case_of(ROW).work
    assert (work.tensor, work.pipeline, work.data, work.num_microbatches) == (2, 2, 4, 8)
    assert (work.attention, work.recompute, work.sequence_parallel) == ("newest", "full", True)
    assert work.overlap_data and work.overlap_tensor and not work.tied and work.gated
    assert case_of(ROW).cluster.device.name == "H100-80GB"


def test_a_fused_loss_is_read() -> None:
    """Catches a program's loss kernel that is taken for plain operators, or the other way."""
    assert case_of({**ROW, "loss": "fused"}).work.fused_loss
    assert not case_of({**ROW, "loss": ""}).work.fused_loss and not case_of(ROW).work.fused_loss


def test_what_a_program_keeps_is_read() -> None:
    """Catches states that a page states, taken for the usual ones, and fp8 of a program that does
    not keep its casts.
    """
    usual = case_of(ROW).work
    assert (usual.gradient_bytes, usual.weight_bytes, usual.optimizer_bytes) == (4, 2, 12)
    cells = {"grad_dtype": "bf16", "weight_bytes": "4", "optimizer_bytes": "10"}
    work = case_of({**ROW, **cells, "offload_layers": "20"}).work
    assert (work.gradient_bytes, work.weight_bytes, work.optimizer_bytes) == (2, 4, 10)
    assert work.offloaded_layers == 20
    assert case_of({**ROW, "overlap": "", "grad_dtype": "fp32"}).work.gradient_bytes == 4

    fp8 = {**ROW, "precision": "fp8"}
    assert case_of(fp8).work.narrow_inputs and not usual.narrow_inputs
    assert not case_of({**fp8, "attn": "sdpa-flash"}).work.narrow_inputs
    # Letters inside a word name no program.
    assert case_of({**ROW, "attn": "flash_attention2"}).work.attention == "flash2"
    assert not case_of({**fp8, "attn": "flash_attention2"}).work.narrow_inputs
    with pytest.raises(ConfigError, match=r"column grad_dtype \(int8\) must be bf16 or fp32"):
        case_of({**ROW, "grad_dtype": "int8"})


def test_an_exchange_of_context_parallel_ranks_is_read() -> None:
    """Catches torch's exchange taken for a ring, and a word for it that is passed over."""
    row = {**ROW, "cp": "2", "dp": "2"}
    assert case_of(row).work.cp_exchange == case_of({**row, "cp_exchange": ""}).work.cp_exchange
    assert case_of({**row, "cp_exchange": "torch"}).work.cp_exchange == "torch"
    assert case_of(row).work.cp_exchange == "ring"
    with pytest.raises(ConfigError, match=r"column cp_exchange \(p2p\) must be one of ring, torch"):
        case_of({**row, "cp_exchange": "p2p"})


def test_copies_that_a_program_keeps_are_read() -> None:
    """Catches a word that is passed over, and copies of a program that says nothing of them."""
    assert case_of({**ROW, "keeps": "Norms + logits"}).work.keeps == {"norms", "logits"}
    assert case_of({**ROW, "keeps": ""}).work.keeps == case_of(ROW).work.keeps == frozenset()
    with pytest.raises(
        ConfigError, match=r"keeps \(logit\) must be one of norms, gathered, logits"
    ):
        case_of({**ROW, "keeps": "norms+logit"})


def test_empty_cells_mean_what_programs_did() -> None:
    """Catches an empty cell taken as zero."""
    row = {**ROW, "dp": "", "cp": "", "vpp": "", "kv_heads": "", "attn": "", "overlap": ""}
    work = case_of({**row, "precision": "fp16"}).work
    assert (work.data, work.context, work.stages_per_rank) == (4, 1, 1)
    assert work.shape.num_kv_heads == 32
    assert work.attention == "plain" and not work.overlap_data
    assert case_of({**row, "precision": ""}).work.attention == "flash2"


@pytest.mark.parametrize(
    ("notes", "gigabytes"),
    (
        ("", 50.0),
        ("800Gb/s node; other words", 12.5),
        ("4x100Gb OPA/node", 6.25),
        ("400Gb/s/GPU", 50.0),
        ("network of 200 Gb/s GPU", 25.0),
    ),
)
def test_the_notes_network_counts(notes: str, gigabytes: float) -> None:
    """Catches a node's network taken as one device's, or ignored."""
    network = case_of({**ROW, "notes": notes}).cluster.links[-1]
    assert network.bytes_per_second == pytest.approx(gigabytes * 1e9)


@pytest.mark.parametrize(
    ("gpu", "device"),
    (
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("A100", "A100-80GB"),
        ("H100-96GB-500W", "H100-96GB-500W"),
        ("H800", "H800-80GB"),
        ("GB200-NVL72", "GB200"),
        ("H200-141GB", "H200"),
    ),
)
def test_devices_are_known_by_their_words(gpu: str, device: str) -> None:
    """Catches a GH200 taken for an H200, and a memory size that is not looked at."""
    assert case_of({**ROW, "gpu": gpu}).cluster.device.name == device
    for other in ("GH200", "H100-PCIe"):
        with pytest.raises(ConfigError, match=f"no cluster file for gpu '{other}'"):
            case_of({**ROW, "gpu": other})


def test_an_unknown_policy_is_not_taken_for_none() -> None:
    """Catches recomputation that silently costs nothing."""
    assert case_of({**ROW, "recompute": "Selective"}).work.recompute == "selective"
    with pytest.raises(ConfigError, match=r"recompute \(block\) must be one of none, selective, f"):
        case_of({**ROW, "recompute": "block"})
    assert case_of({**ROW, "mlp": "GeGLU"}).work.gated


def test_rows_that_cannot_be_say_why() -> None:
    """Catches one bad row that spoils a file."""
    unknown, odd, empty = (
        {**ROW, key: value} for key, value in (("gpu", "TPUv4"), ("gbs", "33"), ("layers", ""))
    )
    found = cases_of([unknown, ROW, odd, empty])
    assert str(found[0]).startswith("no cluster file for gpu 'TPUv4'; there are a100-40gb, ")
    assert "batch of 33 sequences" in str(found[2])
    assert found[3] == "column layers is empty, and nothing else tells it"
    with pytest.raises(ConfigError, match=r"column seq \(8k\) must be a number"):
        case_of({**ROW, "seq": "8k"})


@pytest.mark.parametrize(
    ("cells", "said"),
    (
        ({"gbs": "nan"}, "column gbs (nan) must be a number"),
        ({"hidden": "inf"}, "column hidden (inf) must be a number"),
        ({"dp": "0"}, "column dp (0) must be a whole number of at least 1"),
        ({"layers": "1e18"}, "at least 1 and at most 1e+09"),
        ({"sp": "4"}, "column sp (4) must be 1 or 0"),
        ({"zero": "4"}, "column zero (4) must be a stage of ZeRO, 0 to 3"),
        ({"hidden": "4100"}, "column hidden (4100) must be divisible by column heads (32)"),
        ({"kv_heads": "7"}, "column heads (32) must be divisible by column kv_heads (7)"),
        ({"heads": "1", "kv_heads": "1"}, "column heads (1) must be divisible by tp (2)"),
        ({"seq": "8191"}, "column seq (8191) must be divisible by cp x tp (2)"),
        ({"n_gpus": "24"}, "column n_gpus (24) must be tp x pp x cp x dp, which is 16"),
        ({"n_gpus": "18", "dp": ""}, "column n_gpus (18) must be tp x pp x cp x dp, which is 16"),
        ({"precision": "int4"}, "column precision (int4) must be one of"),
        ({"notes": "0x400Gb/s node"}, "joins nothing"),
        ({"attn": "ring"}, "column attn (ring) names no attention"),
    ),
)
def test_cells_that_no_program_can_have_are_told(cells: dict[str, str], said: str) -> None:
    """Catches a cell that ends the whole table, and one that is taken for something else."""
    (found,) = cases_of([{**ROW, **cells}])
    assert said in str(found)


@pytest.mark.parametrize(
    ("text", "kind"),
    (
        ("plain attention", "plain"),
        ("eager", "plain"),
        ("flash-attention", "flash1"),
        ("flash-attn 2", "flash2"),
        ("flash3", "newest"),
        ("FlashAttention-3", "newest"),
        ("flash/TE", "newest"),
        ("flash-attention-2 in TE", "flash2"),
    ),
)
def test_attention_is_known_by_words(text: str, kind: str) -> None:
    """Catches the `te` of `attention` taken for Transformer Engine, and a version not read."""
    row = {**ROW, "attn": text, "zero": "3", "overlap": "fsdp"}
    assert case_of(row).work.attention == kind
    assert case_of(row).work.fused == ("TE" in text)


def test_a_measured_time_below_zero_is_refused() -> None:
    """Catches a table of differences that is fitted as if it were of seconds."""
    with pytest.raises(ConfigError, match=r"row 7: column published_step_s \(-3\) must be above 0"):
        _ = case_of({**ROW, "row_id": "7", "published_step_s": "-3"}).measured_seconds
    with pytest.raises(ConfigError, match=r"row 7: column published_step_s \(nan\) must be a num"):
        _ = case_of({**ROW, "row_id": "7", "published_step_s": "nan"}).measured_seconds


def test_a_cluster_is_read_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table of thousands of rows that parses one YAML thousands of times."""
    read: list[str] = []
    once = rows_module.load_cluster

    def counted(name: str) -> Cluster:
        read.append(name)
        return once(name)

    rows_module._shipped.cache_clear()
    monkeypatch.setattr(rows_module, "load_cluster", counted)
    cases_of([ROW, {**ROW, "notes": "400Gb/s/GPU"}, {**ROW, "gpu": "H200"}, ROW])
    assert read == ["h100", "h200"]
    # A row's own network stays its own.
    assert case_of(ROW).cluster.links[-1].bytes_per_second == pytest.approx(50e9)
