"""What a dry run says of each rank is what a rank of that layout holds."""

from typing import Any

import pytest
import torch.distributed as dist
from test_reliability_steps import values  # noqa: F401 (a fixture)

from nemotron.parallel.dims import ParallelDims
from nemotron.parallel.shards import local_of
from nemotron.train.config import PretrainConfig
from nemotron.train.layout import describe_ranks
from nemotron.train.schedule import plan_training
from tests.support.cases import mostly_nightly
from tests.support.pool import Pool
from tests.support.reliability_run import build

pytestmark = pytest.mark.distributed

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp_replicate": 2},
    {"tp": 2},
    {"tp": 4},
    {"ep": 2},
    {"ep": 2, "tp": 2},
    {"cp": 2, "tp": 2},
    {"pp": 2},
    {"pp": 2, "tp": 2},
    {"pp": 2, "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2}},
]


def facts(case: dict[str, Any]) -> str:
    """Say of this rank what a dry run says."""
    trainer = build(case)
    mesh, local = trainer.mesh, trainer.local
    parts = []
    if mesh.dims.pp > 1:
        held = [list(map(int, m.backbone.layers._modules)) for m in local.models]
        parts.append("layers " + ", ".join(span(layers) for layers in held))
    share = 4 // mesh.dims.batch
    parts.append("rows " + span(range(local.batch_rank * share, (local.batch_rank + 1) * share)))
    parts += [f"{a} {mesh.rank(a)}" for a in ("cp", "tp", "ep") if getattr(mesh.dims, a) > 1]
    count = sum(local_of(parameter).numel() for parameter in local.parameters().values())
    return f"{f'rank  {dist.get_rank()}':<12} {'; '.join([*parts, f'{count:,} parameters'])}"


def span(numbers) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first}" if first == last else f"{first}-{last}"


@pytest.mark.parametrize(
    "layout", mostly_nightly(LAYOUTS, *(LAYOUTS[i] for i in (1, 5, 9))), ids=str
)
def test_a_dry_run_says_what_each_rank_holds(four: Pool, values, layout):  # noqa: F811
    model = values["model"] | {"mamba_num_heads": 8, "n_groups": 4, "num_key_value_heads": 4}
    batch = {"global_tokens": 32 * 4, "micro_batch": 1}
    case = values | {"model": model, "batch": batch, "parallel": layout}
    config = PretrainConfig.model_validate(case)
    others = layout.get("pp", 1) * layout.get("tp", 1) * layout.get("cp", 1)
    replicate = layout.get("dp_replicate", 1)
    dims = ParallelDims(
        pp=layout.get("pp", 1),
        dp_replicate=replicate,
        dp_shard=4 // others // replicate,
        cp=layout.get("cp", 1),
        tp=layout.get("tp", 1),
        ep=layout.get("ep", 1),
    )
    assert list(describe_ranks(config, plan_training(config), dims)) == four.run(facts, case)


def test_many_ranks_share_a_line(values):  # noqa: F811
    config = PretrainConfig.model_validate(values | {"parallel": {"pp": 2}})
    dims = ParallelDims(pp=2, dp_shard=2, tp=2, ep=2, cp=4)
    lines = list(describe_ranks(config, plan_training(config), dims))
    assert len(lines) == 2
    assert lines[0].startswith("ranks 0-15   layers 0-")
    assert "; rows 0-1; cp 0-3; tp 0-1; ep 0-1; " in lines[0]
    assert lines[1].startswith("ranks 16-31  layers ")
