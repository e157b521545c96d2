"""Memory of one rank, term by term."""

from collections.abc import Collection
from dataclasses import dataclass

from nemotron.model.config import ModelConfig
from nemotron.model.parameters import Split, layer_split
from nemotron.ops.linear_cross_entropy import CHUNK_ELEMENTS
from nemotron.ops.ssd.chunked import CHUNK
from nemotron.parallel.context.state_passing import GATHERED_BYTES
from nemotron.parallel.fsdp import BLOCKS_AHEAD
from nemotron.plan.communication import dispatched_bytes
from nemotron.plan.job import Job

GIB = 2**30
RUNTIME_BYTES = {"cpu": 0.5 * GIB}
"""Runtime, buffers of the collectives and fragmentation of one process; a guess."""
RUNTIME_BYTES_GPU = 6.0 * GIB
"""As above, and a guess, too."""

WEIGHT_BYTES = GRADIENT_BYTES = 4.0
"""Of a parameter, within those of its states."""


@dataclass(frozen=True)
class Memory:
    """What the fullest rank needs, in bytes by term, on the stage that needs most."""

    stage: str
    terms: dict[str, float]

    @property
    def total(self) -> float:
        """All terms."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The term that dominates."""
        return max(self.terms, key=lambda name: self.terms[name])


def memory(job: Job) -> Memory:
    """Return the terms of the stage that needs most."""
    return max((_of_stage(job, stage) for stage in job.stages), key=lambda m: m.total)


def _of_stage(job: Job, stage: str) -> Memory:
    dims, model, storage = job.dims, job.model, job.storage
    held = job.parameters_on(stage)
    dense, experts = held.dense_on_rank(dims.tp), held.experts / dims.ep
    terms = {
        "dense states": dense * (storage.resident + storage.sharded / dims.fsdp),
        "expert states": experts * (storage.resident + storage.sharded / dims.efsdp),
    }
    if storage.gathers:
        terms["gathered weights"] = _gathered(job, stage, dense + experts)
    terms |= _activations(job, stage)
    if dims.world == 1 and job.micro_batches == 1:
        # backward frees activations as it makes gradients, and there are none before it
        gradients = GRADIENT_BYTES * (dense + experts)
        terms["activations"] -= min(gradients, terms["activations"])
    if stage != "first":
        terms["head and loss"] = head_bytes(job)
    if "E" in model.hybrid_override_pattern and dims.ep > 1:
        terms["dispatch buffers"] = 2 * dispatched_bytes(job)
    if dims.cp > 1:
        terms["context buffers"] = _context_buffers(job)
    terms["runtime"] = RUNTIME_BYTES.get(job.hardware.name, RUNTIME_BYTES_GPU)
    return Memory(stage, {name: value for name, value in terms.items() if value})


def _gathered(job: Job, stage: str, local: float) -> float:
    """Weights in compute format and the gradients that are on their way, whole on this rank.

    Held at a time: embedding, head, a block that computes and those that are fetched meanwhile,
    and the gradients of the head and of one block.
    """
    b, g, tp = job.compute_bytes, job.reduce_bytes, job.dims.tp
    if job.dims.world == 1:
        # nothing is gathered; products in another format than the weight's have copies of all
        return b * local if b < WEIGHT_BYTES else 0.0
    blocks = [layer_split(job.model, letter, tp) for letter in job.layers]
    block = max(_on_rank(job, split) for split in blocks)
    table = job.model.vocab_size * job.model.hidden_size / tp
    tables = 1 if stage == "first" else 2
    if stage == "last" and not job.depths:
        tables = 1
    keeps_weights = not job.reshard_after_forward
    weights = b * (local if keeps_weights else tables * table + (1 + BLOCKS_AHEAD) * block)
    gradients = g * (table + block if job.sync_every_micro_batch else local)
    return weights + gradients


def _on_rank(job: Job, split: Split) -> float:
    return split.dense_on_rank(job.dims.tp) + split.experts / job.dims.ep


def activation_bytes(
    model: ModelConfig, letter: str, *, scan: str = "mamba_ssm", width: int = 2
) -> float:
    """Return the bytes that a block keeps for backward, for each token that passes it.

    `width` is that of an activation. float32 stay: one number a row of each norm, the time step,
    the router's input, scores and weights. The attention core keeps no scores.
    """
    h, b = model.hidden_size, width
    wide = 4
    kept = h * b + wide  # input of the block's norm, and its scale
    kept += h * b  # output of the norm
    if letter == "M":
        inner, channels, heads = (
            model.mamba_inner_size,
            model.conv_channels,
            model.mamba_num_heads,
        )
        kept += (inner + channels + heads) * b  # in_proj -> [z, xBC, dt]
        kept += channels * b  # after the convolution
        kept += 2 * heads * wide  # dt before and after softplus
        kept += 2 * inner * b  # y of the scan, and of the gated norm
        kept += model.n_groups * wide
        states = inner * model.ssm_state_size * wide
        return kept + (states / CHUNK if scan == "chunked" else heads * wide)
    if letter == "*":
        queries = model.num_attention_heads * model.head_dim
        keys = model.num_key_value_heads * model.head_dim
        # q, k, v, output and one log-sum for each head
        return kept + (2 * queries + 2 * keys) * b + model.num_attention_heads * wide
    if letter == "-":
        return kept + 2 * (model.intermediate_size or 0) * b
    copies, experts = model.num_experts_per_tok, model.n_routed_experts
    kept += 2 * model.moe_shared_expert_intermediate_size * b
    kept += ((h if width < wide else 0) + experts) * wide  # router's input in float32, its scores
    kept += copies * (model.expert_input_size + 2 * model.moe_intermediate_size) * b
    if model.moe_latent_size is not None:
        kept += 1 * model.moe_latent_size * b  # into the up-projection
    kept += (copies + 1) * wide if model.norm_topk_prob else 0  # chosen scores and their sum
    return kept + copies * (3 * wide + 2 * 8)  # weights; order of the copies


def result_bytes(
    model: ModelConfig,
    letter: str,
    recompute: Collection[str],
    *,
    width: int = 2,
    received: float | None = None,
) -> float:
    """Return how much less that is for each token where results are computed again.

    `received` is how many tokens come from other ranks for each own one, if any do: those that are
    copied for experts are then kept, and so are latent ones.
    """
    elements = {"layernorm": float(model.hidden_size)}
    if letter == "M":
        elements["gated_rms_norm"] = model.mamba_inner_size
        elements["causal_conv1d"] = model.conv_channels
    elif letter == "-":
        elements["moe_act"] = model.intermediate_size or 0
    elif letter == "E":
        copies = model.num_experts_per_tok
        elements["moe_act"] = copies * model.moe_intermediate_size
        elements["moe_act"] += model.moe_shared_expert_intermediate_size
        if received is None:
            received = 0.0 if model.moe_latent_size is None else 1.0
        elements["token_copies"] = max(copies - received, 0.0) * model.expert_input_size
    return width * sum(elements.get(name, 0.0) for name in recompute)


def block_bytes(job: Job, letter: str) -> float:
    """Return what one block keeps for a micro-batch on one rank."""
    kept = activation_bytes(job.model, letter, scan=job.scan, width=job.compute_bytes)
    kept -= saved_bytes(job, letter)
    return _of_micro_batch(job, letter, kept)


def _of_micro_batch(job: Job, letter: str, per_token: float) -> float:
    """Return the bytes of a micro-batch on the fullest rank."""
    return job.tokens * per_token / job.dims.tp * (job.imbalance if letter == "E" else 1.0)


def saved_bytes(job: Job, letter: str) -> float:
    """Return what a block does not keep for a token because backward computes it again."""
    if job.recomputes(letter):
        return 0.0
    recompute, received = job.recompute, None
    if job.dims.tp > 1:
        # a mixer keeps the norm's results of all ranks, which it gathered
        recompute -= {"layernorm"}
    if job.dims.ep > 1:
        row = job.tokens / job.dims.tp * job.model.expert_input_size * job.compute_bytes
        received = dispatched_bytes(job) / row * job.dims.ep / (job.dims.ep - 1)
    width = job.compute_bytes
    return result_bytes(job.model, letter, recompute, width=width, received=received)


def _activations(job: Job, stage: str) -> dict[str, float]:
    in_flight = _in_flight(job) if stage == "first" else 1.0
    inputs = kept = 0.0
    for letter, count in job.layers_on(stage).items():
        if job.recomputes(letter):
            inputs += count * input_bytes(job, letter)
        else:
            kept += count * block_bytes(job, letter)
    again = [
        block_bytes(job, letter)
        if job.recomputes(letter)
        else _of_micro_batch(job, letter, saved_bytes(job, letter))
        for letter in job.layers
    ]
    terms = {
        "inputs of recomputed blocks": inputs * in_flight,
        "one block recomputed": max(again, default=0.0),
        "activations": kept * in_flight,
    }
    if stage != "first" and job.depths:
        terms["multi-token prediction"] = job.depths * mtp_bytes(job)
    return terms


def _in_flight(job: Job) -> float:
    """Return how many micro-batches the first rank of a pipeline keeps at a time."""
    pp, chunks, everything = job.dims.pp, job.pipeline.stages_per_rank, float(job.micro_batches)
    if job.pipeline.schedule == "gpipe":
        return everything
    more = (pp - 1) / (pp * chunks) if chunks > 1 else 0.0
    return min(everything, pp * (1 + more))


def input_bytes(job: Job, letter: str) -> float:
    """Return what is kept of a block that is computed again: its input, and the experts chosen."""
    kept = job.model.hidden_size * job.compute_bytes
    if letter == "E":
        kept += job.model.num_experts_per_tok * 2 * (4 + 8)  # by the router and for its statistics
    return job.tokens * kept / job.dims.tp


def mtp_bytes(job: Job) -> float:
    """Return what one depth keeps: its blocks, the joined inputs and their norms."""
    own = sum(
        input_bytes(job, letter) if job.recomputes(letter) else block_bytes(job, letter)
        for letter in job.model.mtp_pattern
    )
    joined = job.tokens * job.model.hidden_size * job.compute_bytes * 5 / job.dims.tp
    return own + joined


def head_bytes(job: Job) -> float:
    """Return what the losses keep: per head the gradients of its input and of its matrix.

    They are computed with the loss, chunk by chunk; the logits of one chunk exist at a time.
    """
    model, tp = job.model, job.dims.tp
    matrix = 4.0 * model.vocab_size * model.hidden_size / tp
    hidden = job.tokens * model.hidden_size * job.compute_bytes / tp
    rows = max(64, CHUNK_ELEMENTS // model.vocab_size)
    logits = rows * model.vocab_size / tp * (4 + 4 + job.compute_bytes)
    return (1 + job.depths) * (matrix + hidden) + logits


def _context_buffers(job: Job) -> float:
    """Keys and values of a whole row with their gradients, or the states of all chunks."""
    model, dims = job.model, job.dims
    tokens = job.seq_len * job.micro_batch
    heads = max(1.0, model.num_key_value_heads / dims.tp)
    keys = 2 * 2 * heads * model.head_dim * job.compute_bytes * tokens
    states = 0.0
    if job.mamba_context == "state_passing":
        per_head = model.mamba_head_dim * model.ssm_state_size + 1
        row = 2 * dims.cp * model.mamba_num_heads / dims.tp * per_head * 4
        states = 2 * min(job.micro_batch * row, max(row, GATHERED_BYTES))
    return max(keys if "*" in job.layers else 0.0, states if "M" in job.layers else 0.0)
