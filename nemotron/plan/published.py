"""Published throughput: every row that this project knows, and which of them are held out.

A row is held out by a rule that does not look at its error: all rows of GB200, and all that do not
come from Megatron-Bridge's own table of 8K pre-training on H100, B200, B300 and GB300 (other
software, other models, repeated runs, other routing, fine-tuning). The one run in bf16 on H100 is
kept for calibration, because no other row of the table shows that format. Of this project's own
steps, those on H100 are fitted and those on H200 are held out.
"""

from dataclasses import dataclass
from functools import cache

from nemotron.model.config import MTP_DEPTHS, ModelConfig
from nemotron.parallel.dims import ParallelDims
from nemotron.plan.hardware import SYSTEMS
from nemotron.plan.job import Job, Storage
from nemotron.plan.work import flops_by_format
from nemotron.precision.config import PrecisionConfig
from nemotron.recipe.read import read_yaml
from nemotron.recipe.shipped import home

MEGATRON = Storage(sharded=12.0, resident=6.0, gathers=False)
"""bf16 weights and float32 gradients whole; float32 weights and moments over the data ranks."""
MEGATRON_LEAN = Storage(sharded=6.0, resident=4.0, gathers=False)
"""The 64 x H100 run: bf16 weights and gradients whole; of the optimizer bf16 moments and 2 bytes
more for the weight over the data ranks. Our own trainer keeps 16 bytes (`Storage()`)."""

ULTRA = ModelConfig(
    vocab_size=131072,
    hidden_size=8192,
    hybrid_override_pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
    "EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_num_heads=256,
    num_attention_heads=64,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=5120,
    moe_shared_expert_intermediate_size=10240,
    moe_latent_size=2048,
    routed_scaling_factor=5.0,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
"""Nemotron 3 Ultra 550B-A55B.

Source: NVIDIA/Megatron-LM: examples/post_training/modelopt/conf/nvidia.
"""


@cache
def models() -> dict[str, ModelConfig]:
    """Return the models by the names of the published tables.

    Nano and Super are those of the recipes that ship with the package. Lightning is Nano with
    multi-token prediction. A share of Nano is what one of eight GPUs computes of a period of its
    layers, as `tools/gpu/share.py` measures it.
    Source: NVIDIA-NeMo/Megatron-Bridge: recipes/nemotronh/h100/nemotron_3_nano.py.
    """
    nano, super_ = _read_model("nano"), _read_model("super")
    prediction = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    period = {"hybrid_override_pattern": "MEMEM*EMEMEM*E", "num_hidden_layers": 14}
    return {
        "Nano": nano,
        "Share of Nano": nano.model_copy(update={**period, "n_routed_experts": 16}),
        "Lightning": nano.model_copy(update=prediction),
        "Super": super_,
        "Ultra": ULTRA,
    }


def _read_model(recipe: str) -> ModelConfig:
    document = read_yaml(home() / recipe / "model.yaml")
    return ModelConfig.model_validate(document.values["model"])


@dataclass(frozen=True)
class Published:
    """One published figure with the layout it was measured in."""

    model: str
    system: str
    gpus: int
    preset: str
    rows: int
    micro_batch: int
    tp: int
    ep: int
    tokens_per_second: float
    """On one accelerator."""
    source: str
    held_out: bool = False
    pp: int = 1
    cp: int = 1
    seq_len: int = 8192
    recompute: tuple[str, ...] = ()
    storage: Storage = MEGATRON
    dispatch: str = "per_node"
    reduce_bytes: int = 4
    load: float = 1.0
    """Tokens of the busiest experts as a multiple of the mean; 1 is forced balance."""
    depths: int | None = None
    peak_gib: float | None = None
    """Allocated at most, where it was published."""
    note: str = ""

    @property
    def job(self) -> Job:
        """The row as a job."""
        model = models()[self.model]
        trained = MTP_DEPTHS if model.mtp_pattern else 0
        depths = trained if self.depths is None else self.depths
        shard = self.gpus // (self.pp * self.cp * self.tp)
        precision = PrecisionConfig.model_validate({"compute": "bf16", "preset": self.preset})
        formats = flops_by_format(model, precision, self.seq_len, depths, self.load)
        return Job(
            model=model,
            dims=ParallelDims(self.pp, 1, shard, self.cp, self.tp, self.ep),
            hardware=SYSTEMS[self.system],
            seq_len=self.seq_len,
            rows=self.rows,
            micro_batch=self.micro_batch,
            formats=tuple(formats.items()),
            depths=depths,
            recompute=frozenset(self.recompute),
            reduce_bytes=self.reduce_bytes,
            storage=self.storage,
            dispatch=self.dispatch,
            imbalance=self.load,
        )

    @property
    def title(self) -> str:
        """Model, system and format in a few words."""
        return f"{self.model}, {self.gpus} x {self.system.upper()}, {self.preset}"


TABLE = "Megatron-Bridge: docs/performance-summary.md"
ARCHIVE = "Megatron-Bridge: docs/performance-summary-archive.md"
CARD = "Megatron-Bridge: examples/model_verification_cards"
AUTOMODEL = "Automodel: docs/performance-summary.mdx"  # its DeepEP sends once for each node
OWN = "docs/benchmarks_gpu.md"  # forward, backward and optimizer on one GPU, without exchanges
EVERYTHING = ("mamba", "attention", "moe", "mlp")


def _own(system: str, preset: str, tokens_per_second: float, *, card: str = "") -> Published:
    """Return a step of this project on one GPU; a card that stands in two calls is named."""
    note = f"this project{'; ' if card else ''}{card}"
    return Published(
        *("Share of Nano", system, 1, preset, 2, 2, 1, 1, tokens_per_second, OWN),
        seq_len=4096,
        held_out=system != "h100",
        storage=Storage(),
        note=note,
    )


ROWS = (
    Published("Nano", "gb300", 8, "mxfp8", 512, 4, 1, 8, 39_936, TABLE),
    Published("Nano", "b300", 8, "mxfp8", 512, 4, 1, 8, 37_316, ARCHIVE),
    Published("Nano", "b200", 8, "mxfp8", 512, 2, 1, 8, 32_768, ARCHIVE),
    Published("Nano", "h100", 16, "fp8_current", 1024, 1, 1, 8, 14_719, ARCHIVE),
    Published("Super", "gb300", 64, "mxfp8", 512, 1, 1, 64, 9_856, TABLE),
    Published("Super", "gb300", 64, "nvfp4_super", 512, 1, 1, 64, 10_240, TABLE),
    Published("Super", "b300", 64, "mxfp8", 512, 1, 1, 8, 7_867, ARCHIVE),
    Published("Super", "b300", 64, "nvfp4_super", 512, 1, 1, 8, 8_131, ARCHIVE),
    Published("Super", "b200", 64, "mxfp8", 512, 1, 1, 64, 6_400, ARCHIVE),
    Published("Super", "b200", 64, "nvfp4_super", 512, 1, 2, 64, 5_632, ARCHIVE),
    Published(
        *("Super", "h100", 64, "bf16", 1280, 1, 1, 32, 2_969, CARD),
        pp=2,
        seq_len=4096,
        recompute=("moe",),
        reduce_bytes=2,
        storage=MEGATRON_LEAN,
        note="also recomputes norms and attention cores",
    ),
    Published(
        *("Super", "h100", 64, "bf16", 1280, 1, 1, 32, 2_789, CARD),
        pp=2,
        seq_len=4096,
        recompute=("moe",),
        reduce_bytes=2,
        storage=MEGATRON_LEAN,
        held_out=True,
        load=1.1,
        peak_gib=58.1,
        note="natural routing, capacity 1.10; peak 58.1 GiB allocated, 70.3 reserved",
    ),
    Published("Nano", "gb200", 8, "mxfp8", 512, 2, 1, 8, 34_816, ARCHIVE, held_out=True),
    Published("Super", "gb200", 64, "mxfp8", 512, 1, 2, 64, 7_040, TABLE, held_out=True),
    Published("Super", "gb200", 64, "nvfp4_super", 512, 1, 2, 64, 7_168, TABLE, held_out=True),
    Published(
        *("Super", "gb200", 64, "bf16", 512, 1, 2, 64, 6_602, CARD),
        held_out=True,
        note="from its step time; the card states half of it",
    ),
    Published(
        *("Super", "gb300", 64, "nvfp4_super", 512, 1, 1, 64, 10_308, CARD),
        held_out=True,
        note="a later repetition of the table's run",
    ),
    Published(
        *("Nano", "gb300", 8, "mxfp8", 512, 4, 1, 8, 42_094, CARD),
        held_out=True,
        note="a later repetition of the table's run",
    ),
    Published("Lightning", "gb200", 8, "mxfp8", 512, 2, 1, 8, 28_672, TABLE, held_out=True),
    Published("Ultra", "gb300", 256, "mxfp8", 256, 1, 1, 64, 3_552, TABLE, held_out=True),
    Published("Ultra", "gb200", 256, "mxfp8", 256, 1, 2, 64, 2_528, TABLE, held_out=True),
    Published(
        *("Nano", "h100", 8, "bf16", 512, 4, 1, 8, 16_789, AUTOMODEL),
        seq_len=4096,
        recompute=EVERYTHING,
        held_out=True,
        storage=Storage(),
        note="FSDP2",
    ),
    Published(
        *("Super", "h100", 64, "bf16", 512, 2, 1, 64, 4_497, AUTOMODEL),
        seq_len=4096,
        recompute=EVERYTHING,
        held_out=True,
        depths=0,
        storage=Storage(),
        note="FSDP2; no multi-token prediction assumed; the page does not mention it",
    ),
    Published(
        *("Ultra", "h100", 128, "bf16", 256, 2, 1, 64, 815, AUTOMODEL),
        seq_len=4096,
        recompute=EVERYTHING,
        held_out=True,
        depths=0,
        storage=Storage(),
        note="FSDP2; micro-batch of 2 and no multi-token prediction assumed",
    ),
    Published(
        *("Super", "h100", 16, "bf16", 8, 1, 1, 2, 30.8, CARD),
        pp=8,
        cp=2,
        seq_len=32768,
        recompute=EVERYTHING,
        held_out=True,
        note="fine-tuning; 8 rows a step and ep 2 assumed",
    ),
    _own("h100", "bf16", 53_088),
    _own("h100", "fp8_current", 51_773),
    _own("h100", "fp8_block", 50_722),
    _own("h100", "bf16", 51_071, card="another card"),
    _own("h100", "fp8_current", 54_452, card="another card"),
    _own("h100", "fp8_block", 52_841, card="another card"),
    _own("h200", "bf16", 57_222),
    _own("h200", "fp8_current", 55_660),
    _own("h200", "fp8_block", 52_607),
    _own("h200", "bf16", 56_200, card="a day before"),
)
"""All rows; without those of adapters (16 x GB200, 645 tokens/s), which train no full model."""
