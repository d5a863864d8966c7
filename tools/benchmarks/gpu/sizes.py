"""GPU benchmark sizes: K2's layers, LLaMAs of 1.3B, 2.7B and 6.7B, a rank's part, tiny twins."""

from dataclasses import dataclass

from k2train.plan.cost import ModelShape


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `sequences` rows of `length_tokens`."""

    length_tokens: int
    sequences: int

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.length_tokens * self.sequences

    def __str__(self) -> str:
        return f"{self.length_tokens} x {self.sequences}"


@dataclass(frozen=True)
class RankPart:
    """Share of a rank of tensor-parallel degree `degree` in one layer and the head."""

    degree: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    vocab_rows: int
    batch: Batch

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // (self.num_heads * self.degree)


@dataclass(frozen=True)
class Sizes:
    """All differences between a measurement and its dry run."""

    k2: ModelShape
    k2_layers: tuple[int, ...]
    """How many of K2's layers, most first: the first that fits is taken."""
    k2_batches: tuple[Batch, ...]
    models: tuple[tuple[str, ModelShape], ...]
    model_batches: tuple[Batch, ...]
    microbatches: tuple[int, ...]
    """Micro-batches of a step of whole models: the optimizer's share of it differs."""
    rank: RankPart
    products: tuple[tuple[int, int, int], ...]
    """(rows, inner, columns) of the products that the matmul rate is measured on."""
    copy_bytes: int
    rounds: int


def sizes(dry: bool) -> Sizes:
    """Sizes of the measured work, or tiny ones of the same form."""
    return TINY if dry else FULL


FULL = Sizes(
    k2=ModelShape(80, 8192, 22016, 64, 64, 32032),
    k2_layers=(4, 3, 2),
    k2_batches=(Batch(2048, 4), Batch(8192, 1)),
    # Sheared-LLaMA's shapes (Xia et al. 2024, arXiv:2310.06694): whole heads as every peer has
    # them, heads of 128.
    models=(
        ("LLaMA 1.3B", ModelShape(24, 2048, 5504, 16, 16, 32000)),
        ("LLaMA 2.7B", ModelShape(32, 2560, 6912, 20, 20, 32000)),
        # The first LLaMA (Touvron et al. 2023, arXiv:2302.13971).
        ("LLaMA 6.7B", ModelShape(32, 4096, 11008, 32, 32, 32000)),
    ),
    model_batches=(Batch(2048, 4), Batch(8192, 1)),
    microbatches=(4, 1),
    rank=RankPart(8, 8192, 2752, 8, 4004, Batch(2048, 4)),
    products=(
        (8192, 8192, 44032),
        (8192, 22016, 8192),
        (8192, 8192, 24576),
        (8192, 8192, 8192),
        (16384, 8192, 8192),
        (16384, 16384, 16384),
    ),
    copy_bytes=4 * 2**30,
    rounds=10,
)

TINY = Sizes(
    k2=ModelShape(80, 64, 96, 4, 4, 131),
    k2_layers=(2,),
    k2_batches=(Batch(32, 2),),
    models=(("LLaMA tiny", ModelShape(2, 32, 48, 4, 4, 131)),),
    model_batches=(Batch(16, 2),),
    microbatches=(4, 1),
    rank=RankPart(2, 64, 48, 2, 33, Batch(32, 2)),
    products=((64, 64, 96), (64, 96, 64)),
    copy_bytes=2**16,
    rounds=3,
)
