"""The random Hadamard transform of the weight gradient's operands, in chunks of 16 tokens.

Source: NVIDIA/TransformerEngine: transformer_engine/pytorch/custom_recipes/reference_nvfp4.py.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Of the inputs; the same for every layer and all of training."""


@cache
def matrix(*, signs: bool = True) -> Float[Tensor, "16 16"]:
    """Return diag(signs) times Sylvester's matrix, divided by 4: orthogonal, exact in bfloat16."""
    rows = [[(-1.0) ** (i & j).bit_count() / 4 for j in range(SIZE)] for i in range(SIZE)]
    found = torch.tensor(rows)
    return found * torch.tensor(SIGNS).unsqueeze(1) if signs else found


def transform(x: Float[Tensor, "M K"], *, signs: bool = True) -> Float[Tensor, "M K"]:
    """Multiply each chunk of 16 tokens of every channel, as a row vector, by the matrix.

    Sums are float32, the result is rounded once to bfloat16; M must be a multiple of 16.
    """
    chunks = x.float().unflatten(0, (-1, SIZE))
    return (matrix(signs=signs).T.to(x.device) @ chunks).flatten(0, 1).to(torch.bfloat16)
