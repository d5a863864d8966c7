"""The hand-written faults of `mutation_check.py`: training code has shipped with each, or could."""

from dataclasses import dataclass


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


HUGGING_FACE = "tests/model/test_hugging_face.py::test_logits_loss_and_gradients"
LOSS = "tests/parallel/test_cross_entropy.py::test_loss_and_gradient_equal_cross_entropy"
FAULT_VALUES = "tests/train/test_fault_values.py"
NORM = "tests/optim/test_grad_norm.py::test_norm_is_that_of_the_whole_gradient"
ADAMW = "tests/optim/test_adamw.py::test_equals_torchs_adamw_on_any_number_of_ranks"

MUTATIONS = (
    Mutation(
        "sequence parallelism: norm gradients not summed over tensor-parallel ranks",
        "k2train/parallel/grad_buffer.py",
        "        self._sum_over_tensor()\n",
        "",
        "tests/parallel/test_grad_buffer.py::test_sequence_parallel_parts_are_summed_over_tensor_ranks",
        required=True,
    ),
    Mutation(
        "loss not divided by the number of micro-batches",
        "k2train/train/engine.py",
        "scale = 1.0 / (targets or self.setup.targets)",
        "scale = self.setup.num_microbatches / (targets or self.setup.targets)",
        f"{HUGGING_FACE}[all-heads-one]",
        required=True,
    ),
    Mutation(
        "data-parallel average: divided by the targets of this rank only",
        "k2train/train/engine.py",
        "scale = 1.0 / (targets or self.setup.targets)",
        "scale = self.grid.dp.size / (targets or self.setup.targets)",
        f"{HUGGING_FACE}[all-heads-dp2]",
        required=True,
    ),
    Mutation(
        "softmax over the vocabulary: maximum not shared between ranks",
        "k2train/parallel/cross_entropy.py",
        "peak = all_reduce(x.amax(dim=-1), tp, dist.ReduceOp.MAX)",
        "peak = x.amax(dim=-1)",
        f"{LOSS}[2-251]",
        required=True,
    ),
    Mutation(
        "softmax over the vocabulary: no maximum at all",
        "k2train/parallel/cross_entropy.py",
        "peak = all_reduce(x.amax(dim=-1), tp, dist.ReduceOp.MAX)",
        "peak = torch.zeros_like(x[..., 0])",
        f"{LOSS}[1-251]",
        required=True,
    ),
    Mutation(
        "global norm: not summed over the ranks of a stage",
        "k2train/optim/grad_norm.py",
        "    all_reduce(totals, stage)\n",
        "",
        f"{NORM}[1-1-2]",
        required=True,
    ),
    Mutation(
        "global norm: not summed over stages",
        "k2train/optim/grad_norm.py",
        "    all_reduce(totals, pp)\n",
        "",
        f"{NORM}[1-2-1]",
        required=True,
    ),
    Mutation(
        "global norm: a replicated tensor counted by every tensor-parallel rank",
        "k2train/optim/grad_norm.py",
        "float(slot.param_slice.dim is not None or tp.rank == 0)",
        "1.0",
        f"{NORM}[2-1-1]",
    ),
    Mutation(
        "a replica that is not finite goes unseen",
        "k2train/optim/grad_norm.py",
        "squares * self._counted",
        "torch.where(self._counted > 0, squares, 0.0)",
        "tests/optim/test_grad_norm.py::test_one_value_that_is_not_finite_is_seen_everywhere",
    ),
    Mutation(
        "global norm: squares in fp32",
        "k2train/optim/grad_norm.py",
        "double.copy_(piece).dot(double)",
        "piece.dot(piece).double()",
        "tests/optim/test_grad_norm.py::test_squares_are_those_of_fp64[65536-1e+30]",
    ),
    Mutation(
        "clipping also scales small gradients up",
        "k2train/optim/grad_norm.py",
        ".clamp(min=1.0)",
        "",
        "tests/optim/test_grad_norm.py::test_the_divisor_is_torchs",
    ),
    Mutation(
        "backward of scatter_out takes its own part for all of it",
        "k2train/parallel/collectives.py",
        "return all_gather(grad, ctx.axis), None",
        "return torch.cat([grad] * ctx.axis.size), None",
        "tests/parallel/test_collectives.py::test_forward_and_backward_by_definition[2]",
    ),
    Mutation(
        "replicated activations: the input's gradient is not summed over tensor-parallel ranks",
        "k2train/parallel/collective_matmul.py",
        "return all_reduce_start(\n            self.product.multiply(x, matrix, gradient), "
        "self.axis, wait=not self.axis.overlap\n        )",
        "return Pending(self.product.multiply(x, matrix, gradient))",
        "tests/parallel/test_collective_matmul.py::test_every_variant_equals_the_plain_product[2-False]",
    ),
    Mutation(
        "overlap: a rank's own rows stand at the front, whichever it is",
        "k2train/parallel/collective_matmul.py",
        "rows, first = x.shape[0], self.axis.rank * x.shape[0]",
        "rows, first = x.shape[0], 0",
        "tests/parallel/test_collective_matmul.py::test_every_variant_equals_the_plain_product[2-False]",
        required=True,
    ),
    Mutation(
        "overlap: a product begins before the gather has ended",
        "k2train/parallel/collective_matmul.py",
        "        whole = gathering.wait()\n\n        for others",
        "        whole = gathering._out\n\n        for others",
        "tests/parallel/test_collective_matmul.py::test_every_variant_equals_the_plain_product[2-True]",
    ),
    Mutation(
        "weight gradients are done at once, whatever the schedule asks",
        "k2train/parallel/grad_accumulation.py",
        "if self._deferred is None:",
        "if True:",
        "tests/parallel/test_pipeline.py::test_weight_gradients_wait_for_their_action",
    ),
    Mutation(
        "weight gradients of later micro-batches first",
        "k2train/parallel/pipeline.py",
        "deferred = self._deferred.pop((action.stage, action.microbatch))",
        "deferred = self._deferred.pop(max(self._deferred))",
        "tests/parallel/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[2]",
    ),
    Mutation(
        "fused loss: the gradient is not scaled",
        "k2train/parallel/fused_cross_entropy.py",
        "self.factor = self.counted.float() * strips.scale",
        "self.factor = self.counted.float()",
        "tests/parallel/test_fused_cross_entropy.py::test_fused_equals_cross_entropy_and_autograd[1-False-251]",
        required=True,
    ),
    Mutation(
        "fused loss: the softmax of a rank's own columns",
        "k2train/parallel/fused_cross_entropy.py",
        "label_mass / share",
        "label_mass",
        "tests/parallel/test_fused_cross_entropy.py::test_fused_equals_cross_entropy_and_autograd[2-True-251]",
    ),
    Mutation(
        "gradients: a bucket leaves before all of it is in",
        "k2train/parallel/grad_buffer.py",
        "and self._missing[self._started] == 0:",
        "and self._missing[self._started] <= 1:",
        "tests/parallel/test_grad_buffer.py::test_a_bucket_leaves_only_when_all_of_it_is_in",
        required=True,
    ),
    Mutation(
        "value fault: a gradient changes after its bucket has left",
        "k2train/parallel/grad_buffer.py",
        "            self.before_reduction(self._buckets[self._started].slots)\n",
        "",
        f"{FAULT_VALUES}::test_a_gradient_changes_before_it_is_sent"
        "[2-layout0-@rank=0-layers.0.mlp.gate.weight]",
    ),
    Mutation(
        "value fault: a weight changes before the last update has arrived",
        "k2train/train/fault_values.py",
        "        optimizer.finish()\n",
        "",
        f"{FAULT_VALUES}::test_a_flipped_bit_is_found_where_transfers_overlap"
        "[weight@rank=0@step=3:flip=layers.0.mlp.gate.weight-layers.0.mlp.gate.weight on rank 0]",
    ),
    Mutation(
        "faults left in the environment need no permission",
        "k2train/fault_injection.py",
        "if parse(text) and PERMISSION not in allow:",
        "if not parse(text) and allow is None:",
        "tests/test_fault_injection.py::test_faults_need_a_permission",
    ),
    Mutation(
        "weights are used before their gather has ended",
        "k2train/parallel/param_gather.py",
        "self._collect(wanted_at[-1] + 1 if wanted_at else 0)",
        "pass",
        "tests/parallel/test_grad_buffer.py::test_weights_are_waited_for_at_their_first_use[2]",
    ),
    Mutation(
        "selective recompute makes a tensor again from another input",
        "k2train/model/recompute.py",
        "y, source = function(x), x.detach().requires_grad_(x.requires_grad)",
        "y, source = function(x), (x * 2).detach().requires_grad_(x.requires_grad)",
        "tests/model/test_recompute.py::test_no_policy_changes_a_bit[1-{}]",
    ),
    Mutation(
        "embedding without the mask of ids that other ranks hold",
        "k2train/parallel/tensor_parallel.py",
        "return x if mine is None else x.mul_(mine.unsqueeze(-1))",
        "return x",
        "tests/parallel/test_tensor_parallel.py::test_layers_equal_the_whole_product[2-False-251]",
    ),
    Mutation(
        "embedding takes ids outside the vocabulary",
        "k2train/parallel/tensor_parallel.py",
        'if ids.device.type == "cpu" and bool(bad.any()):',
        "if False:",
        "tests/parallel/test_tensor_parallel.py::test_ids_outside_the_vocabulary_are_refused[1]",
    ),
    Mutation(
        "labels not shifted by one",
        "k2train/model/transformer.py",
        "labels[:, :-1] = targets[:, 1:]",
        "labels[:, :-1] = targets[:, :-1]",
        f"{HUGGING_FACE}[all-heads-one]",
    ),
    Mutation(
        "attention that sees the future",
        "k2train/model/kernels/attention.py",
        "triu_(1 + keys - rows)",
        "triu_(2 + keys - rows)",
        f"{HUGGING_FACE}[all-heads-one]",
    ),
    Mutation(
        "weight decay on norm weights",
        "k2train/model/layers.py",
        "decay=False,",
        "decay=True,",
        "tests/optim/test_adamw.py::test_which_tensors_decay",
    ),
    Mutation(
        "rotary tables in bf16",
        "k2train/model/layers.py",
        "angles.cos().float().to(device), angles.sin().float().to(device)",
        "angles.cos().bfloat16().to(device), angles.sin().bfloat16().to(device)",
        "tests/model/test_initialize.py::test_rotary_tables_survive_a_cast_of_the_model",
    ),
    Mutation(
        "rotary angles computed in fp32",
        "k2train/model/layers.py",
        "torch.outer(torch.arange(sequence_length, dtype=torch.float64), frequencies)",
        "torch.outer(torch.arange(sequence_length).float(), frequencies.float())",
        "tests/model/test_initialize.py::test_rotary_tables_are_exact_far_out",
    ),
    Mutation(
        "master weights drawn from bf16",
        "k2train/model/initialize.py",
        "on_values(param_slice, values)",
        "on_values(param_slice, param_slice.of(parameter).float())",
        "tests/model/test_initialize.py::test_bf16_weights_are_the_rounded_draw_and_the_optimizer_sees_it_whole",
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
        "tests/optim/test_adamw.py::test_a_step_that_is_not_finite_changes_nothing[1-1-1-False]",
    ),
    Mutation(
        "gradients accumulated in bf16",
        "k2train/parallel/grad_buffer.py",
        "self.shard = torch.zeros(self.shard_layout.elements, dtype=torch.float32, device=device)",
        "self.shard = torch.zeros(self.shard_layout.elements, dtype=torch.bfloat16, device=device)",
        "tests/parallel/test_grad_buffer.py::test_bf16_gradients_are_summed_in_fp32",
    ),
    Mutation(
        "backwards in reversed order",
        "k2train/plan/schedule.py",
        "            for microbatch in range(num_microbatches)\n        )\n",
        "            for microbatch in range(num_microbatches)"
        "[:: 1 if op == 'F' else -1]\n        )\n",
        "tests/parallel/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[1]",
    ),
    Mutation(
        "every micro-batch is the first one",
        "k2train/parallel/pipeline.py",
        "x = self._inputs_of(action.microbatch)",
        "x = self._inputs_of(0)",
        "tests/parallel/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[1]",
    ),
    Mutation(
        "evaluation builds a graph",
        "k2train/parallel/pipeline.py",
        "torch.set_grad_enabled(self._training)",
        "torch.set_grad_enabled(True)",
        "tests/parallel/test_pipeline.py::test_every_schedule_gives_the_bits_of_a_plain_loop[1]",
    ),
    Mutation(
        "positions without a label are counted",
        "k2train/parallel/cross_entropy.py",
        "counted = labels != IGNORE\n",
        "counted = labels == labels\n",
        f"{LOSS}[1-251]",
    ),
    Mutation(
        "weights written back without the short last block of rows",
        "k2train/parallel/shard_layout.py",
        "        if rest:\n",
        "        if rest and rows.requires_grad:\n",
        "tests/parallel/test_grad_buffer.py::test_reduce_and_publish_equal_no_sharding[3]",
    ),
    Mutation(
        "the first step runs at rate 0",
        "k2train/optim/lr_schedule.py",
        "peak * (step / warmup_steps)",
        "peak * (step - 1) / warmup_steps",
        "tests/optim/test_lr_schedule.py::test_cosine_of_the_first_stage",
    ),
    Mutation(
        "documents of a run in the order of their files",
        "k2train/data/prepare/encode/run_writer.py",
        'order = np.argsort(keys, kind="stable")',
        "order = np.arange(len(keys))",
        "tests/data/prepare/test_sorted_runs.py::test_every_pass_holds_every_document_in_its_order",
    ),
    Mutation(
        "documents without the `</s>` that ends them",
        "k2train/data/prepare/encode/encode.py",
        "(encoded[index], _EOS)",
        "(encoded[index],)",
        "tests/data/prepare/test_encode.py::test_documents_are_encoded_with_their_end",
    ),
    Mutation(
        "every repeat lays the documents out alike",
        "k2train/data/document_keys.py",
        "str(seed), subset, str(pass_number), source_key",
        'str(seed), subset, "0", source_key',
        "tests/data/prepare/test_write_chunk.py::test_a_repeated_subset_is_packed_anew",
    ),
    Mutation(
        "odd samples of every subset to the first chunks",
        "k2train/data/prepare/allocate/mixture.py",
        "((chunk - first_extra) % chunks < count % chunks)",
        "(chunk < count % chunks)",
        "tests/data/prepare/test_allocate.py::test_chunks_are_even",
    ),
    Mutation(
        "text held out of one subset is trained on in another over the same files",
        "k2train/data/prepare/allocate/held_out.py",
        "return {name: lowest[recipe.origin_of(name)] for name in recipe.subsets}",
        "return {name: max(lowest.values()) for name in recipe.subsets}",
        "tests/data/prepare/test_allocate.py::test_rows_are_held_out_at_the_upper_end",
    ),
    Mutation(
        "fill-in-the-middle: the middle before the suffix",
        "k2train/data/prepare/encode/fill_in_middle.py",
        '[prefix, suffix, middle] if kind == "psm"',
        '[prefix, middle, suffix] if kind == "psm"',
        "tests/data/prepare/test_fill_in_middle.py::test_the_document_comes_back[own]",
    ),
    Mutation(
        "blocked attention looks across documents",
        "k2train/model/kernels/attention.py",
        "attn_mask=mask, enable_gqa",
        "is_causal=True, enable_gqa",
        "tests/model/test_cross_documents.py::test_block_equals_separate_documents[sdpa-4]",
    ),
    Mutation(
        "a document begins one token late",
        "k2train/data/document_boundaries.py",
        "begins[here.astype(np.int64) - rows.start",
        "begins[here.astype(np.int64) - 1 - rows.start",
        "tests/data/test_document_boundaries.py::test_documents_of_any_rows_equal_the_definition",
    ),
    Mutation(
        "checkpoints: older ones go as soon as one newer is whole",
        "k2train/checkpoint/retention.py",
        "for other in newer) >= REMAIN",
        "for other in newer) >= 1",
        "tests/checkpoint/test_retention.py::test_two_remain_at_every_moment[0]",
    ),
    Mutation(
        "checkpoints: a lease that was lost does not stop the rename",
        "k2train/checkpoint/commit.py",
        "    job.events.check_owner()\n",
        "",
        "tests/checkpoint/test_writer.py::test_a_lost_lease_renames_nothing",
    ),
    Mutation(
        "checkpoints: a load does not compare what lies in memory with its hash",
        "k2train/checkpoint/piece_check.py",
        "if found.hexdigest() == wanted:",
        "if True:",
        "tests/checkpoint/test_one_pass.py::test_what_lies_in_memory_is_checked[2]",
    ),
    Mutation(
        "checkpoints: the root does not cover the number of updates",
        "k2train/checkpoint/manifest.py",
        "if root == state.root:",
        "if True:",
        "tests/checkpoint/test_one_pass.py::test_another_number_of_updates_is_refused[adam_steps]",
    ),
    Mutation(
        "restart: what the loaded model computes is not compared with the probe",
        "k2train/train/checkpointing.py",
        'if problem is not None and "probe" not in self.config.run.allow:',
        "if False:",
        "tests/train/test_monitor.py::test_a_model_that_computes_something_else_is_refused",
    ),
    Mutation(
        "restart: bad steps before it are forgotten",
        "k2train/train/trainer.py",
        "        self.opened.state = TrainState.of(manifest)\n",
        "        self.state.step = manifest.step\n",
        "tests/train/test_monitor.py::test_bad_steps_are_counted_across_a_restart",
    ),
    Mutation(
        "restart: the chunk that is being read may be allowed to change",
        "k2train/train/resume_check.py",
        '_key(text) == "data.order" and not same_chunks_begun(manifest, identity)',
        "False",
        "tests/train/test_resume_check.py::test_what_moves_the_position_can_never_be_allowed[change2]",
    ),
    Mutation(
        "silent damage: the state is not compared with its root",
        "k2train/train/monitor.py",
        "problem = self._guard.problem(shards)",
        "problem = None",
        "tests/train/test_monitor.py::test_a_bit_that_flips_stops_the_run"
        "[layout3-moment@rank=1@step=6:flip=head.weight.exp_avg_sq"
        "-head.weight.exp_avg_sq on rank 1 changed]",
    ),
    Mutation(
        "silent damage: copies of weights are not compared",
        "k2train/train/monitor.py",
        "problem = self._replicas.problem(shards)",
        "problem = None",
        "tests/train/test_monitor.py::test_a_bit_that_flips_stops_the_run"
        "[layout1-weight@rank=0@step=6:flip=norm.weight-weights of norm.weight on rank 0]",
    ),
    Mutation(
        "data: ranks that read the same rows may be fed different ids",
        "k2train/data/fed_ids.py",
        "everyone == counted * readers & MASK",
        "True",
        "tests/data/test_fed_ids.py::test_a_replica_that_was_fed_something_else_is_found",
    ),
    Mutation(
        "ledger: that of another run passes for this one's",
        "k2train/record/ledger_head.py",
        "elif hashes[head.events - 1] != head.sha256:",
        "elif False:",
        "tests/record/test_ledger_head.py::test_what_was_cut_changed_or_exchanged_is_named",
    ),
)
