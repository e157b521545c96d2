"""A few tokens of several texts through all layers at once, for generation on a CPU."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, lazy
from nemotron.ops.token_step.reference import advance, multiply
from nemotron.ops.token_step.reference import token_step as step_by_layers
from nemotron.ops.token_step.stack import Matrix, Stack, Step

OTHER_LAYERS = frozenset({"adapters", "fixed_scales", "language_experts", "groups_of_experts"})
"""What models may have that a stack has not; their own layers compute it."""

Work = Literal["step", "advance", "multiply"]


class TokenStepOp(Operation):
    """Continue texts by a few tokens each: the layers of a model in one operation.

    A step of one token does little arithmetic, so that its time is that of reading the weights and
    of starting operations. Sums are taken in float32; between the layers nothing is rounded but
    what the caches hold. Without gradients.
    """

    def __call__(self, stack: Stack, step: Step) -> Float[Tensor, "B S D"]:
        """Return the hidden states after the final norm; states, keys and values change in place.

        After a step that `keeps_inputs`, the Mamba-2 states mean nothing until `advance`.
        """
        return self.select(stack.empty)("step", stack, step)

    def advance(self, stack: Stack, step: Step, counts: Int[Tensor, " B"]) -> None:
        """Bring the Mamba-2 states to those after the first tokens of a step that kept its inputs.

        At least one token of each text is kept.
        """
        self.select(stack.empty)("advance", stack, step, counts)

    def multiply(self, x: Float[Tensor, "*batch I"], matrix: Matrix) -> Float[Tensor, "*batch O"]:
        """Return x Wᵀ in the dtype of `x`, which is that of the matrix."""
        return self.select(x)("multiply", x, matrix)


def reference(
    work: Work, first: Stack | Tensor, second: Step | Matrix, counts: Tensor | None = None
) -> Tensor | None:
    """The layers one by one, by the readable forms of their operations."""
    if isinstance(first, Tensor):
        assert isinstance(second, Matrix), second
        return multiply(first, second)
    assert isinstance(second, Step), second
    if work == "step":
        return step_by_layers(first, second)
    assert counts is not None, "how many tokens are kept?"
    advance(first, second, counts)
    return None


token_step = TokenStepOp(
    "token_step",
    [
        Backend(
            "numba",
            lazy("nemotron.ops.token_step.compiled", "compute"),
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("numba",),
            install="pip install numba",
            imports=("nemotron.ops.jit.vectors",),
        ),
        Backend("reference", reference, features=OTHER_LAYERS),
    ],
)
