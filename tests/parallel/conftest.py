import random
from typing import Any

import pytest

from tests.support.layout_model import MODEL
from tests.support.pool import Pool
from tests.support.prepared import write_prepared


@pytest.fixture(scope="session")
def pair():
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four():
    """Four ranks."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def values(tmp_path_factory) -> dict[str, Any]:
    folder, draw = tmp_path_factory.mktemp("layouts"), random.Random(5)
    words = ["the", "river", "runs", "to", "sea", "and", "stone", "stays", "0", "1", "if", "else"]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(300)]
    prose = write_prepared(texts, folder / "prose", validation_fraction=0.1)
    return {
        "name": "layout",
        "output": str(folder / "runs"),
        "device": "cpu",
        "model": MODEL,
        "data": {
            "sources": [{"name": "prose", "path": str(prose)}],
            "cache": str(folder / "cache"),
            "seq_len": 64,
            "reset_documents": True,
            "mask_eod_loss": True,
            "prefetch_steps": 0,
        },
        "batch": {"global_tokens": 64 * 4, "micro_batch": 2},
        "optimizer": {"clip": None},
        "schedule": {"peak": 1e-3, "total_steps": 30, "warmup_steps": 5, "decay_steps": 5},
        "loss": {"moe_aux_loss_coeff": 1e-2},
        "evaluation": {"tokens": 64 * 5},
    }
