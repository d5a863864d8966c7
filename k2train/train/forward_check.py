"""Forward check: a known-answer test of the model, stored in every checkpoint.

- A checkpoint's hashes prove that its bytes are those written. They do not prove that the model
  built from them computes the same: a wrongly sharded layer, a changed constant, another kernel or
  a faulty device leave every hash correct.
- The logits of a few positions of a fixed prompt go into the manifest (key `probe`). They are
  computed again after loading.
- The prompt is a formula, so it needs no data. It runs as one micro-batch through the stages,
  transfers and layouts of a step, without gradients. It keeps nothing and draws no random numbers.
- Logits must be equal to the bit where the signature is equal. Under another layout, kernel or
  device their distance is bounded by `ROUNDING`.

Alternatives considered:
- The held-out loss: one mean, in which small changes vanish, and it takes minutes.
"""

import platform
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import sqrt

import torch
from pydantic import TypeAdapter
from torch import Tensor

from k2train.checkpoint.run_facts import ForwardAnswer, PromptFacts, SignatureFacts
from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.plan.schedule import Action, Op, Program, insert_transfers
from k2train.record.system_info import processor_name
from k2train.train.engine import Engine

POSITIONS = 8
"""Positions of the first sequence whose logits are compared: evenly spread, including the last."""
SAMPLES = 8
"""Logits per position that the manifest lists."""
ROUNDING = {"fp32": 32 * 2.0**-23, "bf16": 4 * 2.0**-8}
"""Bound on the change of a listed logit under another signature, relative to the largest logit.

It is multiplied by sqrt(layers + 2): each layer adds its own rounding errors to the residual
stream, and they add up like noise.

Measured with initial weights of deviation 0.02 and 0.2 and sequences of 64, one rank against tp 2,
tp 4 with sequence parallelism, and the reference kernels. bf16: at most 0.014 of the largest logit
with 4 layers, 0.023 with 16, 0.043 with 64, a third of the bound. fp32: at most 8e-7, 9e-7 and
1.3e-6, a tenth of the bound.
"""

INFINITE = float("inf")
_ANSWER: TypeAdapter[ForwardAnswer | None] = TypeAdapter(ForwardAnswer | None)


def run_forward_check(engine: Engine) -> ForwardAnswer:
    """Run the fixed prompt and return its answer for the manifest, equal on every rank; collective.

    Its `apart` names a data-parallel replica that computes something else.
    """
    engine.optimizer.finish()
    logits = _run(engine)
    mine = None if logits is None else _answer(logits, engine)
    agreement = Agreement(engine.grid)
    first = agreement.lowest(mine, _ANSWER, "the probe's answer")
    assert first is not None and first[1] is not None, "some ranks hold the last stage"
    apart = torch.tensor([int(mine is not None and mine.sha256 != first[1].sha256)])
    if not int(agreement.sum(apart, "the probe's answer")):
        return first[1].model_copy(update={"apart": ""})

    gathered = agreement.all(mine, _ANSWER, "all-gather of the probe's answers")
    answers = {rank: answer for rank, answer in enumerate(gathered) if answer is not None}
    return answers[min(answers)].model_copy(update={"apart": _apart(answers)})


def forward_check_problem(before: ForwardAnswer | None, now: ForwardAnswer) -> str | None:
    """Compare two forward checks of the same weights; return one line, or None when they agree.

    Also None when the prompts differ (another sequence length or vocabulary), or nobody asked
    `before`.
    """
    if now.apart:
        return now.apart
    if before is None or before.prompt != now.prompt:
        return None

    distance, largest = _distance(before, now)
    message = (
        f"the logits of the fixed prompt are up to {distance:.3g} apart, of at most {largest:.3g}"
    )

    # Same layout, kernels and device: every bit must be equal.
    if before.signature == now.signature:
        if before.sha256 == now.sha256:
            return None
        return f"{message}, on the same layout, kernels and device, where every bit must be equal"

    # Another layout, kernel or device: only rounding may differ.
    bound = max(bound_of(before), bound_of(now))
    if distance < INFINITE and distance <= bound * largest:
        return None
    changed = before.signature.differences(now.signature)
    return f"{message}; a change of {', '.join(changed)} explains at most {bound * largest:.3g}"


def _run(engine: Engine) -> Tensor | None:
    """Return logits [positions, vocab_size] on the ranks with the last stage, else None."""
    layout = engine.grid.layout
    last = engine.stages.get(layout.num_stages - 1)
    logits: list[Tensor] = []

    def keep_logits(hidden: Tensor, microbatch: int) -> Tensor:
        assert last is not None, "only the last stage has logits"
        logits.append(last.logits_at(hidden, positions_of(engine.config.data.sequence_length)))
        return hidden.new_zeros(())

    engine.forward(
        _forward_program(engine), [prompt_of(engine.config, engine.grid.device)], keep_logits
    )
    return logits[0] if logits else None


def _forward_program(engine: Engine) -> Program:
    """Return this rank's program for one forward micro-batch; depends on stage placement only."""
    layout = engine.grid.layout
    forwards = [
        tuple(Action(Op.FORWARD, s, 0) for s in layout.stages_of(pp))
        for pp in range(layout.pipeline)
    ]
    return insert_transfers(forwards, layout)[engine.grid.coordinate.pp]


def prompt_of(config: Config, device: torch.device) -> MicroBatch:
    """Return the fixed prompt on a device. Each of its rows holds three documents."""
    rows, length = config.batch.micro_sequences, config.data.sequence_length
    position = torch.arange(length).expand(rows, length)
    row = torch.arange(rows).unsqueeze(1)
    # A formula that spreads ids over the vocabulary without random numbers.
    ids = (position * 7919 + position * position * 31 + row * 104729 + 17) % config.model.vocab_size

    documents = torch.div(position * 3, length, rounding_mode="floor")
    return MicroBatch(ids, documents.to(torch.int32)).to(device)


def positions_of(length: int) -> list[int]:
    """Positions of the prompt whose logits are compared."""
    return sorted(
        {
            (n + 1) * length // POSITIONS - 1
            for n in range(POSITIONS)
            if (n + 1) * length >= POSITIONS
        }
    )


def _prompt_facts(engine: Engine) -> PromptFacts:
    config = engine.config
    return PromptFacts(
        num_layers=config.model.num_layers,
        sequence_length=config.data.sequence_length,
        vocab_size=config.model.vocab_size,
        cross_documents=config.data.cross_documents,
        positions=positions_of(config.data.sequence_length),
    )


def _answer(logits: Tensor, engine: Engine) -> ForwardAnswer:
    """This replica's answer, from the logits [positions, vocab_size]."""
    host = logits.cpu().contiguous()
    return ForwardAnswer(
        sha256=sha256(host.numpy().tobytes()).hexdigest(),
        values=[[_plain(value) for value in row] for row in samples_of(host)],
        max_abs=_plain(float(host.abs().max())),
        prompt=_prompt_facts(engine),
        signature=signature_of(engine),
    )


def samples_of(logits: Tensor) -> list[list[float]]:
    """Return the logits that the manifest lists, of [positions, vocab_size]."""
    step = max(1, logits.shape[1] // SAMPLES)
    found: list[list[float]] = logits[:, ::step][:, :SAMPLES].tolist()
    return found


def _plain(value: float) -> float | None:
    """Replace values that are not finite by None: JSON cannot represent them."""
    return value if abs(value) < INFINITE else None


def signature_of(engine: Engine) -> SignatureFacts:
    """Return what the bits of a forward pass may depend on.

    Pipeline and data parallelism are left out: they must not change a bit.
    """
    grid = engine.grid
    return SignatureFacts(
        tensor=grid.layout.tensor,
        sequence=engine.setup.sequence,
        symmetric_memory=engine.tp.symmetric,
        micro_sequences=engine.config.batch.micro_sequences,
        precision=engine.precision,
        kernels=str(engine.kernels),
        torch=str(torch.__version__),
        device=device_name(grid),
        threads=torch.get_num_threads(),
    )


def device_name(grid: ProcessGrid) -> str:
    """Return what decides over the bits of a device: its model, and a CPU's instructions."""
    if grid.device.type == "cuda":
        return torch.cuda.get_device_name(grid.device)
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {processor_name()}".strip()
    )


def _distance(a: ForwardAnswer, b: ForwardAnswer) -> tuple[float, float]:
    """Return (largest distance of listed logits, largest logit); infinite if one is not finite."""
    largest = [INFINITE if answer.max_abs is None else answer.max_abs for answer in (a, b)]
    if a.shape != b.shape:
        return INFINITE, max(largest)

    # None means a value that is not finite.
    distances = [
        INFINITE if x is None or y is None else abs(x - y)
        for p, q in zip(a.values, b.values, strict=True)
        for x, y in zip(p, q, strict=True)
    ]
    if INFINITE in largest:
        return INFINITE, INFINITE
    return max(distances, default=0.0), max(largest)


def bound_of(answer: ForwardAnswer) -> float:
    """Return the largest change that rounding explains, relative to the largest logit."""
    return ROUNDING[answer.signature.precision] * sqrt(answer.prompt.num_layers + 2)


def _apart(answers: Mapping[int, ForwardAnswer]) -> str:
    """Return a message about a replica that disagrees with the majority, "" if none does.

    Of two that disagree, the lower rank counts as right.
    """
    hashes = [answer.sha256 for answer in answers.values()]
    majority = max(hashes, key=lambda digest: (hashes.count(digest), -hashes.index(digest)))
    first = next(answer for answer in answers.values() if answer.sha256 == majority)

    for rank, answer in answers.items():
        if answer.sha256 == majority:
            continue
        distance, largest = _distance(first, answer)
        rounded = distance <= bound_of(answer) * largest < INFINITE
        if answer.signature == first.signature or not rounded:
            return _replica_message(rank, hashes, distance, largest, answers)

    return ""


def _replica_message(
    rank: int,
    hashes: Sequence[str],
    distance: float,
    largest: float,
    answers: Mapping[int, ForwardAnswer],
) -> str:
    """With two different answers and no majority it is unknown which one is right."""
    tie = 2 * hashes.count(answers[rank].sha256) == len(hashes)
    who = f"the replica of rank {rank} or its counterpart" if tie else f"the replica of rank {rank}"
    return (
        f"{who} computes other logits for the fixed prompt than the others: "
        f"up to {distance:.3g} apart, of at most {largest:.3g}"
    )
