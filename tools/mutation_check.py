"""Break the code on purpose, one fault at a time, and see the test that names this fault go red.

    python tools/mutation_check.py [--only TEXT] [--required] [--list]

Each mutation replaces one exact text, which must stand in its file exactly once, in a copy of the repository; one test
must then fail there. Prints a Markdown table with seconds. First all named tests must pass on an unbroken copy: a test
that is red anyway proves nothing. A run that hangs, cannot be collected or fails to start counts as not caught. The
faults are written by hand, each one that training code has shipped with or could; the alternative refused is mutating
operators at random, which takes hours and leaves a list that nobody reads.

Exit codes: 0 every mutation is caught; 1 one is not, or its text is not there once; 2 a mistake in usage.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = (".venv", ".git", "wandb", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
PRODUCTS = ("data", "runs", "build")
"""What lies beside the code at the root, and may be large; below it these names are code."""
LIMIT_SECONDS = 240.0
PASSED, FAILED = 0, 1
CLUMSY = re.compile(r"\b(NameError|ImportError|ModuleNotFoundError|SyntaxError)\b")
"""A fault that breaks the program and not its numbers proves nothing about a test."""


@dataclass(frozen=True)
class Mutation:
    """One fault: in `file` the text `old` becomes `new`; `test` (a pytest node id) must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str
    required: bool = False
    """One of the few that the fast list runs."""


@dataclass(frozen=True)
class Outcome:
    """What happened to one mutation."""

    mutation: Mutation
    caught: bool
    seconds: float
    detail: str


HUGGING_FACE = "tests/test_hugging_face.py::test_logits_loss_and_gradients"
LOSS = "tests/test_loss.py::test_loss_and_gradient_equal_cross_entropy"
NORM = "tests/test_clip.py::test_norm_is_that_of_the_whole_gradient"
ADAMW = "tests/test_adamw.py::test_equals_torchs_adamw_on_any_number_of_ranks"

MUTATIONS = (
    Mutation(
        "sequence parallelism: norm gradients not summed over tensor-parallel ranks",
        "k2train/parallel/gradients.py",
        "        self._sum_over_tensor()\n",
        "",
        "tests/test_gradients.py::test_sequence_parallel_parts_are_summed_over_tensor_ranks",
        required=True,
    ),
    Mutation(
        "loss not divided by the number of micro-batches",
        "k2train/engine.py",
        "1.0 / self.targets)",
        "self.num_microbatches / self.targets)",
        f"{HUGGING_FACE}[all-heads-one]",
        required=True,
    ),
    Mutation(
        "data-parallel average: divided by the targets of this rank only",
        "k2train/engine.py",
        "1.0 / self.targets)",
        "self.grid.dp.size / self.targets)",
        f"{HUGGING_FACE}[all-heads-dp2]",
        required=True,
    ),
    Mutation(
        "softmax over the vocabulary: maximum not shared between ranks",
        "k2train/parallel/loss.py",
        "peak = all_reduce(x.amax(dim=-1), tp, dist.ReduceOp.MAX)",
        "peak = x.amax(dim=-1)",
        f"{LOSS}[2-251]",
        required=True,
    ),
    Mutation(
        "softmax over the vocabulary: no maximum at all",
        "k2train/parallel/loss.py",
        "peak = all_reduce(x.amax(dim=-1), tp, dist.ReduceOp.MAX)",
        "peak = torch.zeros_like(x[..., 0])",
        f"{LOSS}[1-251]",
        required=True,
    ),
    Mutation(
        "global norm: not summed over the ranks of a stage",
        "k2train/optim/clip.py",
        "    all_reduce(table, stage)\n",
        "",
        f"{NORM}[1-1-2]",
        required=True,
    ),
    Mutation(
        "global norm: not summed over stages",
        "k2train/optim/clip.py",
        "    all_reduce(table, pp)\n",
        "",
        f"{NORM}[1-2-1]",
        required=True,
    ),
    Mutation(
        "global norm: a replicated tensor counted by every tensor-parallel rank",
        "k2train/optim/clip.py",
        "float(slot.piece.dim is not None or tp.rank == 0)",
        "1.0",
        f"{NORM}[2-1-1]",
    ),
    Mutation(
        "a replica that is not finite goes unseen",
        "k2train/optim/clip.py",
        "squares * self._counted",
        "torch.where(self._counted > 0, squares, 0.0)",
        "tests/test_clip.py::test_one_value_that_is_not_finite_is_seen_everywhere",
    ),
    Mutation(
        "clipping also scales small gradients up",
        "k2train/optim/clip.py",
        ".clamp(min=1.0)",
        "",
        "tests/test_clip.py::test_the_divisor_is_torchs",
    ),
    Mutation(
        "backward of scatter_out takes its own part for all of it",
        "k2train/parallel/collectives.py",
        "return all_gather(grad, ctx.axis), None",
        "return torch.cat([grad] * ctx.axis.size), None",
        "tests/test_collectives.py::test_forward_and_backward_by_definition[2]",
    ),
    Mutation(
        "replicated activations: the input's gradient is not summed over tensor-parallel ranks",
        "k2train/parallel/exchange.py",
        "return all_reduce_start(self.product.multiply(x, matrix, gradient), self.axis, wait=not self.axis.overlap)",
        "return Pending(self.product.multiply(x, matrix, gradient))",
        "tests/test_exchange.py::test_every_exchange_equals_the_plain_product[2-False]",
    ),
    Mutation(
        "overlap: a rank's own rows stand at the front, whichever it is",
        "k2train/parallel/exchange.py",
        "rows, first = x.shape[0], self.axis.rank * x.shape[0]",
        "rows, first = x.shape[0], 0",
        "tests/test_exchange.py::test_every_exchange_equals_the_plain_product[2-False]",
        required=True,
    ),
    Mutation(
        "overlap: a product begins before the gather has ended",
        "k2train/parallel/exchange.py",
        "        whole = gathering.wait()\n        for others",
        "        whole = gathering._out\n        for others",
        "tests/test_exchange.py::test_every_exchange_equals_the_plain_product[2-True]",
    ),
    Mutation(
        "weight gradients are done at once, whatever the schedule asks",
        "k2train/parallel/weight_gradients.py",
        "if self._kept is None:",
        "if True:",
        "tests/test_pipeline.py::test_weight_gradients_wait_for_their_action",
    ),
    Mutation(
        "weight gradients of later micro-batches first",
        "k2train/parallel/pipeline.py",
        "kept = self._kept.pop((action.stage, action.microbatch))",
        "kept = self._kept.pop(max(self._kept))",
        "tests/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[2]",
    ),
    Mutation(
        "fused loss: the gradient is not scaled",
        "k2train/parallel/loss.py",
        "self.factor = self.counted.float() * scale",
        "self.factor = self.counted.float()",
        "tests/test_loss.py::test_fused_equals_cross_entropy_and_autograd[1-False-251]",
        required=True,
    ),
    Mutation(
        "fused loss: the softmax of a rank's own columns",
        "k2train/parallel/loss.py",
        "taken / share",
        "taken",
        "tests/test_loss.py::test_fused_equals_cross_entropy_and_autograd[2-True-251]",
    ),
    Mutation(
        "gradients: a bucket leaves before all of it is in",
        "k2train/parallel/gradients.py",
        "and self._missing[self._started] == 0:",
        "and self._missing[self._started] <= 1:",
        "tests/test_gradients.py::test_a_bucket_leaves_only_when_all_of_it_is_in",
        required=True,
    ),
    Mutation(
        "weights are used before their gather has ended",
        "k2train/parallel/publish.py",
        "self._settle(place[-1] + 1 if place else 0)",
        "pass",
        "tests/test_gradients.py::test_weights_are_waited_for_at_their_first_use[2]",
    ),
    Mutation(
        "selective recompute makes a tensor again from another input",
        "k2train/model/recompute.py",
        "y, source = function(x), x.detach().requires_grad_(x.requires_grad)",
        "y, source = function(x), (x * 2).detach().requires_grad_(x.requires_grad)",
        "tests/test_recompute.py::test_no_policy_changes_a_bit[1-{}]",
    ),
    Mutation(
        "embedding without the mask of ids that other ranks hold",
        "k2train/parallel/tensor.py",
        "return x if mine is None else x.mul_(mine.unsqueeze(-1))",
        "return x",
        "tests/test_tensor.py::test_layers_equal_the_whole_product[2-False-251]",
    ),
    Mutation(
        "embedding takes ids outside the vocabulary",
        "k2train/parallel/tensor.py",
        'if ids.device.type == "cpu" and bool(bad.any()):',
        "if False:",
        "tests/test_tensor.py::test_ids_outside_the_vocabulary_are_refused[1]",
    ),
    Mutation(
        "labels not shifted by one",
        "k2train/model/transformer.py",
        "labels[:, :-1] = tokens[:, 1:]",
        "labels[:, :-1] = tokens[:, :-1]",
        f"{HUGGING_FACE}[all-heads-one]",
    ),
    Mutation(
        "attention that sees the future",
        "k2train/model/kernels_attention.py",
        "triu_(1 + keys - rows)",
        "triu_(2 + keys - rows)",
        f"{HUGGING_FACE}[all-heads-one]",
    ),
    Mutation(
        "weight decay on norm weights",
        "k2train/model/layers.py",
        "decay=False, sum_over_tensor=sequence",
        "decay=True, sum_over_tensor=sequence",
        "tests/test_adamw.py::test_which_tensors_decay",
    ),
    Mutation(
        "rotary tables in bf16",
        "k2train/model/layers.py",
        "angles.cos().float().to(device), angles.sin().float().to(device)",
        "angles.cos().bfloat16().to(device), angles.sin().bfloat16().to(device)",
        "tests/test_initialize.py::test_rotary_tables_survive_a_cast_of_the_model",
    ),
    Mutation(
        "rotary angles computed in fp32",
        "k2train/model/layers.py",
        "torch.outer(torch.arange(sequence_length, dtype=torch.float64), frequencies)",
        "torch.outer(torch.arange(sequence_length).float(), frequencies.float())",
        "tests/test_initialize.py::test_rotary_tables_are_exact_far_out",
    ),
    Mutation(
        "master weights drawn from bf16",
        "k2train/model/initialize.py",
        "also(piece, values)",
        "also(piece, piece.of(parameter).float())",
        "tests/test_initialize.py::test_bf16_weights_are_the_rounded_draw_and_the_optimizer_sees_it_whole",
    ),
    Mutation(
        "AdamW: bias correction one step ahead",
        "k2train/optim/adamw.py",
        "float(rule.t - 1)",
        "float(rule.t)",
        f"{ADAMW}[1-fused]",
    ),
    Mutation(
        "AdamW: decay not scaled by the rate",
        "k2train/optim/adamw.py",
        "p.mul(1 - rule.lr * rule.decay)",
        "p.mul(1 - rule.decay)",
        f"{ADAMW}[1-reference]",
    ),
    Mutation(
        "a step that is not finite is applied",
        "k2train/optim/adamw.py",
        "found_inf=rule.skip",
        "found_inf=None",
        "tests/test_adamw.py::test_a_step_that_is_not_finite_changes_nothing[1-1-1-False]",
    ),
    Mutation(
        "gradients accumulated in bf16",
        "k2train/parallel/gradients.py",
        "self.line = torch.zeros(self.table.elements, dtype=torch.float32, device=device)",
        "self.line = torch.zeros(self.table.elements, dtype=torch.bfloat16, device=device)",
        "tests/test_gradients.py::test_bf16_gradients_are_summed_in_fp32",
    ),
    Mutation(
        "backwards in reversed order",
        "k2train/plan/schedule.py",
        "for op in (Op.FORWARD, Op.BACKWARD) for microbatch in range(num_microbatches))",
        "for op in (Op.FORWARD, Op.BACKWARD) for microbatch in range(num_microbatches)[:: 1 if op == 'F' else -1])",
        "tests/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[1]",
    ),
    Mutation(
        "every micro-batch is the first one",
        "k2train/parallel/pipeline.py",
        "x = self._inputs_of(action.microbatch)",
        "x = self._inputs_of(0)",
        "tests/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[1]",
    ),
    Mutation(
        "evaluation builds a graph",
        "k2train/parallel/pipeline.py",
        "torch.set_grad_enabled(self._training)",
        "torch.set_grad_enabled(True)",
        "tests/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[1]",
    ),
    Mutation(
        "positions without a label are counted",
        "k2train/parallel/loss.py",
        "counted = labels != IGNORE\n",
        "counted = labels == labels\n",
        f"{LOSS}[1-251]",
    ),
    Mutation(
        "weights written back without the short last block of rows",
        "k2train/parallel/gradients.py",
        "        if rest:\n",
        "        if rest and rows.requires_grad:\n",
        "tests/test_gradients.py::test_reduce_and_publish_equal_no_sharding[3]",
    ),
    Mutation(
        "the first step runs at rate 0",
        "k2train/optim/lr.py",
        "peak * (step / warmup_steps)",
        "peak * (step - 1) / warmup_steps",
        "tests/test_lr.py::test_cosine_of_the_first_stage",
    ),
    Mutation(
        "documents of a run in the order of their files",
        "k2train/data/prepare/runs.py",
        'order = np.argsort(keys, kind="stable")',
        "order = np.arange(len(keys))",
        "tests/test_runs.py::test_every_pass_holds_every_document_in_its_order",
    ),
    Mutation(
        "documents without the `</s>` that ends them",
        "k2train/data/prepare/encode.py",
        "(encoded[index], _EOS)",
        "(encoded[index],)",
        "tests/test_encode.py::test_documents_are_encoded_with_their_end",
    ),
    Mutation(
        "every repeat lays the documents out alike",
        "k2train/data/document_keys.py",
        "str(seed), subset, str(pass_number), source_key",
        'str(seed), subset, "0", source_key',
        "tests/test_assemble.py::test_a_repeated_subset_is_packed_anew",
    ),
    Mutation(
        "odd samples of every subset to the first chunks",
        "k2train/data/prepare/mix.py",
        "((chunk - turn) % chunks < count % chunks)",
        "(chunk < count % chunks)",
        "tests/test_data_layout.py::test_chunks_are_even",
    ),
    Mutation(
        "text held out of one subset is trained on in another over the same files",
        "k2train/data/prepare/held_out.py",
        "return {name: lowest[recipe.origin_of(name)] for name in recipe.subsets}",
        "return {name: max(lowest.values()) for name in recipe.subsets}",
        "tests/test_data_layout.py::test_rows_are_held_out_at_the_upper_end",
    ),
    Mutation(
        "fill-in-the-middle: the middle before the suffix",
        "k2train/data/prepare/fill_in_middle.py",
        '[prefix, suffix, middle] if kind == "psm"',
        '[prefix, middle, suffix] if kind == "psm"',
        "tests/test_fill_in_middle.py::test_the_document_comes_back[own]",
    ),
    Mutation(
        "blocked attention looks across documents",
        "k2train/model/kernels_attention.py",
        "attn_mask=mask, enable_gqa",
        "is_causal=True, enable_gqa",
        "tests/test_cross_documents.py::test_block_equals_separate_documents[sdpa-4]",
    ),
    Mutation(
        "a document begins one token late",
        "k2train/data/borders.py",
        "begins[here.astype(np.int64) - rows.start",
        "begins[here.astype(np.int64) - 1 - rows.start",
        "tests/test_borders.py::test_documents_of_any_rows_equal_the_definition",
    ),
)


def apply(mutation: Mutation, root: Path) -> None:
    """Write the fault into the copy at `root`. Raises ValueError unless the text stands there exactly once."""
    path = root / mutation.file
    source = path.read_text(encoding="utf-8")
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: its text stands {count} times in {mutation.file}, must be once")
    broken = source.replace(mutation.old, mutation.new)
    compile(broken, mutation.file, "exec")
    path.write_text(broken, encoding="utf-8")


def copy_repository(root: Path, target: Path) -> Path:
    """Copy what tests need; untracked files too, so that work in progress can be checked."""
    anywhere = shutil.ignore_patterns(*SKIPPED)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | {name for name in names if Path(folder) == root and name in PRODUCTS}

    shutil.copytree(root, target, ignore=ignored)
    return target


def run_pytest(root: Path, tests: Sequence[str], limit_seconds: float = LIMIT_SECONDS) -> tuple[int | None, str]:
    """Exit code of pytest in a copy and its last line; None when it proves nothing (hung, or the fault is clumsy)."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    with subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, f"hung for {limit_seconds:.0f} seconds"
    lines = output.strip().splitlines()
    clumsy = CLUMSY.search(output)
    if process.returncode == FAILED and clumsy:
        return None, f"failed of {clumsy[0]}, which any test would see"
    return process.returncode, lines[-1] if lines else "no output"


def check_mutation(mutation: Mutation, root: Path = ROOT, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
    """Break a fresh copy and run the test that must fail there."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation_") as directory:
        copy = copy_repository(root, Path(directory) / "copy")
        try:
            apply(mutation, copy)
        except (ValueError, SyntaxError, OSError) as error:
            return Outcome(mutation, False, time.monotonic() - begun, str(error))
        code, detail = run_pytest(copy, [mutation.test], limit_seconds)
    return Outcome(mutation, code == FAILED, time.monotonic() - begun, detail)


def check_unbroken(mutations: Sequence[Mutation], root: Path = ROOT) -> tuple[bool, str]:
    """Whether all named tests pass on a copy as it is, and pytest's last line."""
    with tempfile.TemporaryDirectory(prefix="mutation_") as directory:
        copy = copy_repository(root, Path(directory) / "copy")
        code, detail = run_pytest(copy, sorted({mutation.test for mutation in mutations}), 3 * LIMIT_SECONDS)
    return code == PASSED, detail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose name contains this")
    parser.add_argument("--required", action="store_true", help="the short list that the test suite runs")
    parser.add_argument("--list", action="store_true", help="print the table without running anything")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if options.only in m.name and (m.required or not options.required)]
    if not chosen:
        parser.error(f"no mutation's name contains {options.only!r}")
    if options.list:
        print("\n".join(["| mutation | caught by |", "|---|---|", *(f"| {m.name} | `{m.test}` |" for m in chosen)]))
        return 0
    passed, detail = check_unbroken(chosen)
    print(f"unbroken: {detail}\n", flush=True)
    if not passed:
        print("a named test does not pass as it is, so nothing can be shown", file=sys.stderr)
        return 1
    print("| mutation | test that must fail | caught | seconds |\n|---|---|---|---|", flush=True)
    missed = 0
    for mutation in chosen:
        outcome = check_mutation(mutation)
        missed += not outcome.caught
        said = "yes" if outcome.caught else f"NO: {outcome.detail}"
        print(f"| {mutation.name} | `{mutation.test}` | {said} | {outcome.seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
