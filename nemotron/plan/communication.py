"""What each rank receives from others, by collective and by link."""

from dataclasses import dataclass

from nemotron.plan.job import Job


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in one step for one purpose."""

    name: str
    received: float
    """In all."""
    slow: float
    """Of these, through the network between domains, as this rank's share of it."""
    hidden: bool
    """Whether it runs beside the computation; else the computation waits for it."""

    def seconds(self, job: Job) -> float:
        """Return the time at the links' nominal bandwidth."""
        fast = (self.received - self.slow) / job.hardware.fast_link
        return fast + self.slow / job.hardware.slow_link


def traffic(job: Job) -> list[Traffic]:
    """Return what the busiest stage's ranks receive in a step, by purpose."""
    found = [
        *_tensor(job),
        *_experts(job),
        *_context(job),
        *_pipeline(job),
        *_weights(job),
    ]
    return [item for item in found if item.received]


def _neighbors(job: Job, stride: int, size: int) -> int:
    """Return how many ranks of a group with this stride lie in one domain of the fast link."""
    return max(1, min(size, job.hardware.domain // stride))


def _gather(job: Job, whole: float, stride: int, size: int) -> tuple[float, float]:
    """Return bytes received, and through the network, when each rank collects `whole` bytes.

    What comes from other domains enters each domain once, shared by the links of its ranks.
    """
    near = _neighbors(job, stride, size)
    return whole * (size - 1) / size, whole * (1 - near / size) / near


def _tensor(job: Job) -> list[Traffic]:
    tp = job.dims.tp
    if tp == 1:
        return []
    whole = job.tokens * job.model.hidden_size * job.compute_bytes
    received, slow = _gather(job, whole, 1, tp)
    # in and out, forward and backward; two more times where the block is computed again
    regions = sum(
        count * (6 if job.recomputes(letter) else 4) for letter, count in job.passes.items()
    )
    regions += 4 * (1 + 2 * job.depths)  # heads, and the matrix that joins a depth's inputs
    times = regions * job.stage_share * job.micro_batches
    return [Traffic("tensor parallel", received * times, slow * times, hidden=False)]


def dispatched_bytes(job: Job) -> float:
    """Return the bytes that one rank receives in one layer in one direction."""
    return sum(_dispatched(job))


def _dispatched(job: Job) -> tuple[float, float]:
    """Return bytes of one direction of one layer: over the fast link and over the slow one.

    Routing is taken as uniform: a group of n of the E experts is chosen by a token with
    probability 1 - (1 - K/E)^n.
    """
    model, ep = job.model, job.dims.ep
    row = job.tokens / job.dims.tp * model.expert_input_size * job.compute_bytes
    near = _neighbors(job, 1, ep)
    far = ep - near
    per_rank = model.n_routed_experts / ep
    miss = 1 - model.num_experts_per_tok / model.n_routed_experts
    if job.dispatch == "all_gather":
        return row * (ep - 1) - row * far / near, row * far / near
    if job.dispatch == "per_copy":
        copies = row * model.num_experts_per_tok / ep
        return copies * (near - 1), copies * far
    needed = row * (1 - miss**per_rank)
    if job.dispatch == "per_rank":
        return needed * (near - 1), needed * far
    # per_node: once over the network for each domain, then to the ranks that need it
    domains = ep / near
    once = row * (1 - miss ** (per_rank * near))
    return needed * (ep - 1) * (near - 1) / near, once * (domains - 1)


def _experts(job: Job) -> list[Traffic]:
    if job.dims.ep == 1 or "E" not in job.passes:
        return []
    fast, slow = _dispatched(job)
    # there and back, forward and backward; twice more where the block is computed again
    passes = job.passes["E"] * (6 if job.recomputes("E") else 4)
    times = passes * job.stage_share * job.micro_batches
    return [Traffic("expert dispatch", (fast + slow) * times, slow * times, hidden=False)]


def _context(job: Job) -> list[Traffic]:
    model, dims = job.model, job.dims
    if dims.cp == 1:
        return []
    rows = job.seq_len * job.micro_batch
    heads = max(1.0, model.num_key_value_heads / dims.tp)
    keys = 2 * heads * model.head_dim * job.compute_bytes * rows
    again = 3 if job.recomputes("*") else 2
    times = job.passes.get("*", 0) * again * job.stage_share * job.micro_batches
    received, slow = _gather(job, keys, dims.tp, dims.cp)
    found = [Traffic("keys and values", received * times, slow * times, hidden=False)]
    again = 3 if job.recomputes("M") else 2
    times = job.layers.get("M", 0) * again * job.stage_share * job.micro_batches
    if job.mamba_context == "state_passing":
        per_head = (model.mamba_head_dim * model.ssm_state_size + 1) * 4
        chunks = 2 * dims.cp * job.micro_batch
        states = chunks * model.mamba_num_heads / dims.tp * per_head
        received, slow = _gather(job, states, dims.tp, dims.cp)
    else:
        ranks = dims.tp * dims.cp
        heads = model.mamba_num_heads / ranks
        groups = max(1.0, model.n_groups / ranks)
        own = 3 * model.mamba_head_dim * heads + 2 * model.ssm_state_size * groups + heads
        whole = rows * job.compute_bytes * own
        far = dims.cp - _neighbors(job, dims.tp, dims.cp)
        received, slow = whole * (dims.cp - 1) / dims.cp, whole * far / dims.cp
    return [*found, Traffic("Mamba context", received * times, slow * times, hidden=False)]


def _pipeline(job: Job) -> list[Traffic]:
    dims = job.dims
    if dims.pp == 1:
        return []
    boundary = job.tokens * job.model.hidden_size * job.compute_bytes / dims.tp
    # from the stage before and, backward, from the stage after
    received = 2 * boundary * job.pipeline.stages_per_rank * job.micro_batches
    stride = dims.world // dims.pp
    is_far = _neighbors(job, stride, dims.pp) < dims.pp
    return [Traffic("pipeline", received, received if is_far else 0.0, hidden=True)]


def _weights(job: Job) -> list[Traffic]:
    """Weights that are gathered and gradients that are scattered among the data ranks."""
    dims = job.dims
    held = job.parameters_on(job.stages[-1])
    replica = dims.dp_shard * dims.cp * dims.tp
    groups = {
        "dense": (held.dense_on_rank(dims.tp), dims.tp, dims.fsdp),
        "expert": (held.experts / dims.ep, dims.ep, dims.efsdp),
    }
    if job.storage.gathers:
        gathers = job.micro_batches * (2 if job.reshard_after_forward else 1)
        syncs = job.micro_batches if job.sync_every_micro_batch else 1
    else:
        gathers = syncs = 1
    found = []
    for name, (size, stride, ranks) in groups.items():
        received, slow = _gather(job, size * job.compute_bytes, stride, ranks)
        found.append(Traffic(f"{name} weights", received * gathers, slow * gathers, True))
        received, slow = _gather(job, size * job.reduce_bytes, stride, ranks)
        found.append(Traffic(f"{name} gradients", received * syncs, slow * syncs, True))
        if dims.dp_replicate > 1:
            shard = size * job.reduce_bytes / ranks
            received, slow = _gather(job, 2 * shard, replica, dims.dp_replicate)
            found.append(Traffic(f"{name} replicas", received * syncs, slow * syncs, True))
    return found
