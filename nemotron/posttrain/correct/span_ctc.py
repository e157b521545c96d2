"""CTC taken for each run of slots by itself, batched."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

NEVER = -1e30
"""Log-probability of what cannot be; infinity would make gradients NaN."""


def span_ctc(
    logprobs: Float[Tensor, "R S U1"],
    targets: Int[Tensor, "R U"],
    slots: Int[Tensor, " R"],
    lengths: Int[Tensor, " R"],
) -> Float[Tensor, " R"]:
    """Return the negative log-probability of each run's target, over all ways to write it.

    A way gives each of the run's first `slots` slots a token or the blank; without repeats and
    then without blanks it is the first `lengths` tokens of the target. `logprobs[r, s]` holds the
    log-probabilities at a slot of the blank and then of the target's tokens. What a run has beyond
    its slots and length is of no meaning. A target that needs more slots costs about 1e30.

    Source: Graves et al. 2006, "Connectionist Temporal Classification", section 4.1.
    """
    num_slots = logprobs.shape[1]
    width = 2 * targets.shape[1] + 1
    # the target with a blank before, between and after its tokens
    state = torch.arange(width, device=logprobs.device)
    choice = torch.where(state % 2 == 1, state // 2 + 1, 0)  # [2U + 1]
    emitted = logprobs[:, :, choice]  # [R, S, 2U + 1]
    skips = _skips(targets, width)
    alpha = emitted[:, 0].masked_fill(state > 1, NEVER)
    for slot in range(1, num_slots):
        from_before = F.pad(alpha, (1, 0), value=NEVER)[:, :width]
        from_skip = F.pad(alpha, (2, 0), value=NEVER)[:, :width].masked_fill(~skips, NEVER)
        summed = torch.stack([alpha, from_before, from_skip]).logsumexp(0)
        alpha = torch.where((slot < slots).unsqueeze(1), summed + emitted[:, slot], alpha)
    last = 2 * lengths.unsqueeze(1)
    ends = alpha.gather(1, torch.cat([last, (last - 1).clamp(min=0)], 1))  # [R, 2]
    # an empty target has one end only
    ends = torch.stack([ends[:, 0], ends[:, 1].masked_fill(lengths == 0, NEVER)])
    return -ends.logsumexp(0)


def _skips(targets: Int[Tensor, "R U"], width: int) -> Tensor:
    """Say at which states the blank before may be passed over: where the tokens differ."""
    allowed = torch.zeros(targets.shape[0], width, dtype=torch.bool, device=targets.device)
    if targets.shape[1] > 1:
        allowed[:, 3::2] = targets[:, 1:] != targets[:, :-1]
    return allowed


def slots_needed(target: list[int]) -> int:
    """Return the fewest slots that can write a target: a blank must part equal neighbors."""
    return len(target) + sum(a == b for a, b in itertools.pairwise(target))


def collapse(path: list[int], blank: int) -> list[int]:
    """Return what a run of slots says: without repeats, then without blanks."""
    kept = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return [token for token in kept if token != blank]
