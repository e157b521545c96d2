"""One program of the benchmark in its own process: ours, or transformers' model as the peer.

python tools/bench/worker.py ours|peer CASE DTYPE KIND; then one command a line on stdin:
`step N` answers with seconds, other processes' share of the cores and peak memory, `check FILE`
writes loss and gradients (the logits of a decoding case, the output and gradients of the scan),
`peak DTYPE` measures the machine.
"""

import json
import os
import resource
import sys
from functools import partial
from typing import Protocol

import torch
from cases import CASES, DECODE_TOKENS, DTYPES, PROXIES, Case, draw_tokens
from machine import matmul_peak
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.forward import append, read
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.ops.ssd import ssd
from nemotron.sol.clock import Watch
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig, OptimizerConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from nemotron.train.optimizer import Optimizer

KERNELS = (
    "attention",
    "balance_sums",
    "causal_conv1d",
    "expert_order",
    "gated_rms_norm",
    "grouped_mlp",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "squared_relu",
    "ssd",
    "topk_routing",
)
"""Operations that have kernels for CPUs, which are used by name."""
PRODUCTS = ("attention", "grouped_mlp", "linear")
"""Those of them that can multiply bfloat16 in 16-bit integers, too."""


class Program(Protocol):
    """A model that can be trained and decoded."""

    def train(self, tokens: Tensor) -> float:
        """Run one optimizer step and return the loss."""

    def gradients(self, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Return loss and gradients without a step."""

    def prefill(self, tokens: Tensor) -> Tensor:
        """Read prompts and return the logits after them."""

    def decode(self) -> Tensor:
        """Append the likeliest token to every row and return the logits after it."""


class Ours:
    """The model and the step of `nemotron`, as the trainer runs them."""

    def __init__(self, case: Case, dtype: str, kind: str = "default") -> None:
        self.model = HybridLM(PROXIES[case.proxy])
        self.model.init_weights(0)
        if kind != "default":
            products, *others = kind.split()
            chosen = dict.fromkeys(KERNELS, "numba") | dict.fromkeys(PRODUCTS, products)
            chosen |= dict(other.split("=") for other in others)
            apply(self.model, OpsConfig(**chosen))
        self.model.compute_dtype = DTYPES[dtype]
        if case.kind in ("decode", "prefill"):
            prepare_weights(self.model)
        else:
            self.optimizer = Optimizer(dict(self.model.named_parameters()), OptimizerConfig())

    def train(self, tokens: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self._loss(tokens, moe_aux_loss_coeff=1e-4)
        loss.backward()
        self.optimizer.step(lr=1e-4)
        return loss.item()

    def gradients(self, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
        # the peer has no balance loss
        loss = self._loss(tokens, moe_aux_loss_coeff=0.0)
        loss.backward()
        named = self.model.named_parameters()
        return loss.item(), {n: p.grad for n, p in named if p.grad is not None}

    def _loss(self, tokens: Tensor, moe_aux_loss_coeff: float) -> Tensor:
        config = LossConfig(moe_aux_loss_coeff=moe_aux_loss_coeff)
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:, :-1] = tokens[:, 1:]
        batch = Batch(tokens, labels, seq_idx=None)
        objective = PretrainObjective(Auxiliary(config, num_depths=0))
        sums, _ = compute_sums(objective, self.model, batch)
        return objective.combine(sums, objective.counts(batch))

    def prefill(self, tokens: Tensor) -> Tensor:
        self.rows, self.logits = read(self.model, tokens.tolist())
        return self.logits

    def decode(self) -> Tensor:
        self.logits = append(self.model, self.rows, self.logits.argmax(-1, keepdim=True))
        return self.logits


class Peer:
    """transformers' NemotronHForCausalLM, our weights, without its floor of the time step."""

    def __init__(self, case: Case, dtype: str, experts: str) -> None:
        from transformers import NemotronHConfig, NemotronHForCausalLM

        config = PROXIES[case.proxy].model_dump(exclude_none=True)
        config.pop("time_step_limit")
        self.model = NemotronHForCausalLM(NemotronHConfig(**config))
        ours = HybridLM(PROXIES[case.proxy])
        ours.init_weights(0)
        weights = {n.replace("backbone.", "model."): t for n, t in ours.state_dict().items()}
        self.model.load_state_dict(weights)
        self.model.to(DTYPES[dtype])
        self.model.set_experts_implementation(experts)
        for module in self.model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
        if case.kind == "train":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def train(self, tokens: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def gradients(self, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        named = self.model.named_parameters()
        gradients = {n.replace("model.", "backbone.", 1): p.grad for n, p in named}
        return loss.item(), {n: g for n, g in gradients.items() if g is not None}

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        self.model.eval()
        output = self.model(tokens, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        return self.logits

    @torch.inference_mode()
    def decode(self) -> Tensor:
        newest = self.logits.argmax(-1)
        output = self.model(newest[:, None], past_key_values=self.cache, use_cache=True)
        self.logits = output.logits[:, -1]
        return self.logits


class Scan:
    """The scan of one Mamba layer: our operation, or transformers' in the model's own chunks."""

    def __init__(self, side: str, case: Case, dtype: str, kind: str) -> None:
        from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

        self._peer = partial(mamba2_chunk_scan, chunk_size=PROXIES[case.proxy].chunk_size)
        self._ours = side == "ours"
        self._ssd = ssd.bind("numba") if kind == "numba" else ssd
        self._case, self._dtype = case, DTYPES[dtype]
        self._flush = torch.empty(1 << 24)

    def draw(self, step: int) -> None:
        """Draw fresh inputs and drive them out of the caches."""
        config = PROXIES[self._case.proxy]
        generator = torch.Generator().manual_seed(step)
        b, T, H = self._case.rows, self._case.tokens, config.mamba_num_heads
        wide = (b, T, H, config.mamba_head_dim)
        narrow = (b, T, config.n_groups, config.ssm_state_size)
        x, B, C, self._dy = (
            torch.randn(size, generator=generator).to(self._dtype)
            for size in (wide, narrow, narrow, wide)
        )
        dt = torch.rand(b, T, H, generator=generator) * 0.1
        A = -1 - 15 * torch.rand(H, generator=generator)
        D = torch.randn(H, generator=generator)
        named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}
        self._inputs = {name: tensor.requires_grad_() for name, tensor in named.items()}
        self._flush.fill_(step)

    def run(self) -> Tensor:
        """Run forward and backward and return the output."""
        x, dt, A, B, C, D = self._inputs.values()
        y = self._ssd(x, dt, A, B, C, D) if self._ours else self._peer(x, dt, A, B, C, D=D)
        assert isinstance(y, Tensor)  # without the final state
        y.backward(self._dy)
        return y.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the last run."""
        return {f"d{n}": t.grad for n, t in self._inputs.items() if t.grad is not None}


def run_step(program: Program | Scan, case: Case, step: int) -> dict[str, float | bool]:
    """Time one training step, scan or reading, or the mean token-step of a short continuation."""
    tokens = draw_tokens(case, step)
    if isinstance(program, Scan):
        program.draw(step)
    elif case.kind == "decode":
        program.prefill(tokens)
        program.decode()
    with Watch() as watch:
        if isinstance(program, Scan):
            program.run()
        elif case.kind == "train":
            program.train(tokens)
        elif case.kind == "prefill":
            program.prefill(tokens)
        else:
            for _ in range(DECODE_TOKENS):
                program.decode()
    seconds = watch.seconds / (DECODE_TOKENS if case.kind == "decode" else 1)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": seconds,
        "others": watch.others,
        "rss_gib": peak_gib,
    }


def write_check(program: Program | Scan, case: Case, path: str) -> None:
    """Write what must agree before anything is timed."""
    tokens = draw_tokens(case, step=0)
    if isinstance(program, Scan):
        program.draw(0)
        results = {"y": program.run(), **program.gradients()}
    elif case.kind == "train":
        loss, results = program.gradients(tokens)
        results = {**results, "loss": torch.tensor(loss)}
    else:
        results = {"logits 0": program.prefill(tokens)}
        for index in range(1, DECODE_TOKENS if case.kind == "decode" else 2):
            results[f"logits {index}"] = program.decode()
    torch.save({name: tensor.float() for name, tensor in results.items()}, path)


def main() -> None:
    """Answer commands until stdin ends."""
    side, name, dtype, kind = sys.argv[1:5]
    case = next(case for case in CASES if case.name == name)
    # libraries may print; answers go to the real stdout alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program: Program | Scan
    if case.kind == "ssd":
        program = Scan(side, case, dtype, kind)
    else:
        program = (Ours if side == "ours" else Peer)(case, dtype, kind)
    for line in sys.stdin:
        command, argument = line.strip().split(" ", 1)
        answer: object = None
        if command == "step":
            answer = run_step(program, case, int(argument))
        elif command == "check":
            write_check(program, case, argument)
        else:
            answer = matmul_peak(DTYPES[argument])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
