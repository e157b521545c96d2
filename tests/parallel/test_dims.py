"""Rules of the mesh: each broken one is told with the nearest value that is right."""

import pytest

from nemotron.errors import UserError
from nemotron.model.config import ModelConfig
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import ParallelDims, resolve_dims, violations

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=64,
    hybrid_override_pattern="MEM*EME",
    mamba_num_heads=16,
    n_groups=8,
    num_attention_heads=16,
    num_key_value_heads=2,
    n_routed_experts=24,
    num_experts_per_tok=4,
    moe_shared_expert_intermediate_size=96,
)


def found(seq_len: int = 512, rows: int = 48, micro_batch: int = 1, **sizes: object) -> list[str]:
    config = ParallelConfig.model_validate(sizes)
    others = config.pp * config.dp_replicate * config.cp * config.tp
    shard = 1 if config.dp_shard == "auto" else config.dp_shard
    return [
        str(broken)
        for broken in violations(
            resolve_dims(config, others * shard),
            MODEL,
            config,
            seq_len=seq_len,
            rows_per_step=rows,
            micro_batch=micro_batch,
        )
    ]


def test_a_layout_that_fits_breaks_no_rule():
    assert found() == []
    assert found(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=8) == []
    assert found(tp=8, ep=8) == []
    assert found(cp=4, mamba_context="all_to_all") == []


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"ep": 5, "dp_shard": 5, "rows": 45},
            "parallel.ep = 5 does not divide model.n_routed_experts = 24; use 1, 2, 3, 4, 6, 8, "
            "12, 24.",
        ),
        (
            {"ep": 4, "dp_shard": 6},
            "parallel.ep = 4 does not divide dp_shard x cp x tp = 6; the nearest is 3.",
        ),
        (
            {"tp": 16},
            "parallel.tp = 16 does not divide model.n_groups = 8; use 1, 2, 4, 8.",
        ),
        (
            {"tp": 3, "seq_len": 513},
            "parallel.tp = 3 does not divide model.mamba_num_heads = 16; use 1, 2, 4, 8, 16.",
        ),
        (
            {"tp": 3, "seq_len": 513},
            "parallel.tp = 3 neither divides model.num_key_value_heads = 2 nor is a multiple of "
            "it; the nearest is 2.",
        ),
        (
            {"cp": 32, "mamba_context": "all_to_all"},
            "parallel.cp = 32 cannot share 16 Mamba heads in 8 groups (mamba_context = "
            "all_to_all); the nearest is 16, or use state_passing.",
        ),
        ({"cp": 3}, "data.seq_len = 512 is not divisible by 2 x cp x tp = 6; the nearest is 510."),
        (
            {"cp": 128},
            "parallel.cp = 128 leaves chunks of 2 tokens, shorter than the 3 that the convolution "
            "looks back; lower it.",
        ),
        (
            {"dp_shard": 5},
            "batch.global_tokens gives 48 rows of 512 tokens a step, which dp_replicate x "
            "dp_shard = 5 ranks cannot share; the nearest is 25600.",
        ),
        ({"pp": 8}, "parallel.pp = 8 makes 8 stages of 7 layers; the nearest is 7."),
        (
            {"pp": 2, "pipeline": {"stages": "MEM*|EM"}},
            "parallel.pipeline.stages = 'MEM*|EM' is not model.hybrid_override_pattern = "
            "'MEM*EME' with | between stages; use auto.",
        ),
        (
            {"pp": 2, "pipeline": {"stages": "M|EM*|EME"}},
            "parallel.pipeline.stages = 'M|EM*|EME' has 3 stages with layers; parallel.pp x "
            "stages_per_rank = 2 are needed.",
        ),
        (
            {"pp": 2, "pipeline": {"stages_per_rank": 2}},
            "parallel.pipeline.stages_per_rank = 2 needs schedule: interleaved_1f1b; use 1.",
        ),
        (
            {"pp": 4, "dp_shard": 4, "micro_batch": 6},
            "batch.micro_batch = 6 does not cut the 12 rows of each rank into at least pp = 4 "
            "equal parts that 1f1b can take in turn; the nearest is 3.",
        ),
    ],
)
def test_a_broken_rule_names_the_nearest_legal_value(sizes: dict, sentence: str):
    assert sentence in found(**sizes)


def test_auto_takes_the_processes_that_are_left():
    assert resolve_dims(ParallelConfig(tp=2, cp=2), 16).dp_shard == 4
    dims = ParallelDims(dp_replicate=2, dp_shard=4, cp=2, tp=2, ep=8)
    assert (dims.world, dims.fsdp, dims.efsdp, dims.batch) == (32, 8, 2, 8)


def test_sizes_that_do_not_make_up_the_processes_are_refused():
    with pytest.raises(UserError, match="tp = 4 processes, but there are 6 processes; start 8, or"):
        resolve_dims(ParallelConfig(tp=4), 6)
    with pytest.raises(
        UserError, match="= 8 processes, but there is 1 process; start 8, or set parallel"
    ):
        resolve_dims(ParallelConfig(dp_shard=8), 1)
