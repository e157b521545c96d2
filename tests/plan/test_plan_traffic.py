"""Bytes between ranks, against worked numbers."""

import pytest

from nemotron.parallel.dims import ParallelDims
from nemotron.plan.communication import Traffic, dispatched_bytes, traffic
from nemotron.plan.hardware import SYSTEMS
from nemotron.plan.job import Job
from tests.support.plan_jobs import super_job

MIB, GIB = 2**20, 2**30


def of(job: Job) -> dict[str, Traffic]:
    return {item.name: item for item in traffic(job)}


@pytest.mark.parametrize(
    ("dispatch", "ep", "mib"),
    [
        ("per_copy", 8, 308),
        ("per_copy", 64, 346),
        ("per_rank", 8, 105),
        ("per_rank", 64, 299),
        ("all_gather", 8, 112),
    ],
)
def test_one_dispatch_is_as_worked_out(dispatch: str, ep: int, mib: float):
    job = super_job(ParallelDims(dp_shard=64, ep=ep), dispatch=dispatch)
    assert dispatched_bytes(job) / MIB == pytest.approx(mib, rel=0.005)


def test_a_token_that_is_sent_once_to_each_node_spares_the_network():
    dims = ParallelDims(dp_shard=64, ep=64)
    per_node = of(super_job(dims, dispatch="per_node", recompute=frozenset()))["expert dispatch"]
    # 105 MiB a direction over the network, 4 directions in 40 layers, 48 micro-batches
    assert per_node.slow / (4 * 40 * 48) / MIB == pytest.approx(105, rel=0.005)
    per_rank = of(super_job(dims, recompute=frozenset()))["expert dispatch"]
    assert per_node.slow < per_rank.slow / 2


def test_experts_of_one_domain_never_use_the_network():
    dims = ParallelDims(dp_shard=64, ep=64)
    rack = super_job(dims, hardware=SYSTEMS["gb200"])
    assert of(rack)["expert dispatch"].slow == 0
    assert of(super_job(ParallelDims(dp_shard=64, ep=8)))["expert dispatch"].slow == 0


def test_weights_are_gathered_twice_and_gradients_scattered_once_a_micro_batch():
    job = super_job(ParallelDims(dp_shard=256, ep=64))
    found, times = of(job), job.micro_batches
    # 15 + 15 + 30 GiB, and 3.4 + 3.4 + 6.7 GiB
    assert found["dense weights"].received / times / GIB == pytest.approx(30, rel=0.01)
    assert found["dense gradients"].received / times / GIB == pytest.approx(30, rel=0.01)
    # the figures count the rank's own quarter
    whole = 4 / 3 / times / GIB
    assert found["expert weights"].received * whole == pytest.approx(6.8, rel=0.02)
    assert found["expert gradients"].received * whole == pytest.approx(6.7, rel=0.02)


def test_ranks_of_a_node_share_what_enters_it():
    found = of(super_job(ParallelDims(dp_shard=256, ep=64)))
    dense = found["dense weights"]
    assert dense.slow == pytest.approx(dense.received / 8, rel=0.05)
    # ranks with the same experts lie in different nodes
    assert found["expert weights"].slow == found["expert weights"].received


def test_settings_of_the_recipe_spare_gathers_and_scatters():
    dims = ParallelDims(dp_shard=64, ep=8)
    start, kept = of(super_job(dims)), of(super_job(dims, reshard_after_forward=False))
    assert kept["dense weights"].received * 2 == start["dense weights"].received
    once = of(super_job(dims, sync_every_micro_batch=False))
    assert once["dense gradients"].received * 48 == start["dense gradients"].received
    narrow = of(super_job(dims, reduce_bytes=2))
    assert narrow["dense gradients"].received * 2 == start["dense gradients"].received


def test_copies_of_the_model_add_up_their_gradients():
    found = of(super_job(ParallelDims(dp_replicate=4, dp_shard=16, ep=16)))
    assert found["dense replicas"].received > 0
    assert "dense replicas" not in of(super_job(ParallelDims(dp_shard=64, ep=16)))


@pytest.mark.parametrize(
    ("tp", "cp", "seq_len", "states", "exchanged", "keys"),
    [
        (1, 8, 131072, 64, 836, 128),
        (1, 64, 2**20, 512, 1284, 1024),
        (2, 64, 2**20, 256, 898, 512),
    ],
)
def test_context_parallelism_moves_what_was_worked_out(
    tp: int, cp: int, seq_len: int, states: float, exchanged: float, keys: float
):
    dims = ParallelDims(dp_shard=1, cp=cp, tp=tp)
    changes = {"seq_len": seq_len, "rows": 1, "recompute": frozenset()}
    found = of(super_job(dims, **changes))
    layers = 2 * (cp - 1) / cp  # forward and backward; the figures count the rank's own part
    assert found["keys and values"].received / (8 * layers) / MIB == pytest.approx(keys)
    # the figures leave out the one number for each state that says how it decays
    mamba = found["Mamba context"].received / (40 * layers) / MIB
    assert mamba == pytest.approx(states, rel=1e-3)
    other = of(super_job(dims, mamba_context="all_to_all", **changes))["Mamba context"]
    assert other.received / (40 * layers) / MIB == pytest.approx(exchanged, rel=0.02)


def test_tensor_parallelism_moves_half_of_the_tokens_four_times_a_block():
    dims = ParallelDims(dp_shard=32, tp=2)
    found = of(super_job(dims, recompute=frozenset()))["tensor parallel"]
    # 32 MiB a time; 88 blocks and the head; 96 micro-batches
    assert found.received / (4 * 89 * 96) / MIB == pytest.approx(32)
    assert found.slow == 0


def test_stages_send_hidden_states_on_and_gradients_back():
    dims = ParallelDims(pp=2, dp_shard=32)
    found = of(super_job(dims))["pipeline"]
    assert found.received / (2 * 96) / MIB == 64
    assert found.slow == found.received


def test_one_rank_talks_to_nobody():
    assert traffic(super_job(ParallelDims())) == []
