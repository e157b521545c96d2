"""What the benchmark measures: two small models and the cases run on them."""

from dataclasses import dataclass

import torch

from nemotron.model.config import ModelConfig

_SHARED: dict[str, object] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "hybrid_override_pattern": "MEMEM*EMEMEM*E",
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "ssm_state_size": 64,
    "n_groups": 4,
    "conv_kernel": 4,
    "chunk_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_shared_expert_intermediate_size": 512,
}

PROXIES = {
    name: ModelConfig.model_validate(_SHARED | experts)
    for name, experts in {
        "nano": {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
        },
        "super": {
            "n_routed_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 192,
            "moe_latent_size": 64,
        },
    }.items()
}
"""The layer kinds and proportions of Nano and Super at a size that two cores train in a second."""


@dataclass(frozen=True)
class Case:
    """One row of the table: `target` and `aim` are ratios of the peer's best time to ours."""

    name: str
    kind: str
    proxy: str
    rows: int
    tokens: int
    dtypes: tuple[str, ...]
    target: float
    aim: float
    kept: int = 5

    @property
    def tokens_per_step(self) -> int:
        """Tokens trained on in a step, read at once, or new ones of one decoding step."""
        return self.rows * (1 if self.kind == "decode" else self.tokens)

    def programs(self, side: str) -> list[tuple[str, str]]:
        """Return the (dtype, kind) settings among which a side's best is taken.

        A kind is one of our backends of operations, with others for some of them behind it, or the
        peer's implementation of experts.
        """
        if side == "ours":
            kinds = ["default"] if self.kind == "decode" else ["default", "numba"]
            found = [(dtype, kind) for dtype in self.dtypes for kind in kinds]
            if self.kind == "train" and "bf16" in self.dtypes:
                # with instructions for bfloat16, torch's own products may be the fastest
                found += [("bf16", "numba_int16"), ("bf16", "numba_int16 linear=auto")]
            return found
        kinds = {
            "train": ["eager", "grouped_mm"],
            "decode": ["eager", "grouped_mm", "batched_mm"],
            "prefill": ["eager", "grouped_mm"],
            "ssd": [""],
        }[self.kind]
        # bf16 rows let the peer use fp32 too, should that be faster for it
        dtypes = ("fp32",) if self.dtypes == ("fp32",) else ("fp32", "bf16")
        return [(dtype, kind) for dtype in dtypes for kind in kinds]


CASES = [
    Case("nano-fp32", "train", "nano", 4, 512, ("fp32",), 1.9, 2.1),
    Case("nano-bf16", "train", "nano", 4, 512, ("bf16",), 2.5, 2.8),
    Case("super-bf16", "train", "super", 4, 512, ("bf16",), 2.6, 2.9),
    Case("nano-8192", "train", "nano", 1, 8192, ("fp32", "bf16"), 3.0, 3.5, kept=2),
    Case("ssd", "ssd", "nano", 1, 2048, ("fp32", "bf16"), 6.0, 10.0, kept=15),
    Case("decode-1", "decode", "nano", 1, 128, ("fp32", "bf16"), 5.0, 8.0),
    Case("decode-8", "decode", "nano", 8, 128, ("fp32", "bf16"), 5.0, 8.0),
    Case("prefill-512", "prefill", "nano", 1, 512, ("fp32", "bf16"), 2.0, 3.0),
    Case("prefill-2048", "prefill", "nano", 1, 2048, ("fp32", "bf16"), 2.0, 3.0),
]
"""The rows of the table "Peer and target", in its order."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

DECODE_TOKENS = 32
"""New tokens of one timed decoding step."""


def draw_tokens(case: Case, step: int) -> torch.Tensor:
    """Return random tokens, the same for both programs at the same step."""
    generator = torch.Generator().manual_seed(step)
    vocab = PROXIES[case.proxy].vocab_size
    return torch.randint(vocab, (case.rows, case.tokens), generator=generator)
