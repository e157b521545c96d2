"""Detection of wrong tokens by a loss that does not reward copying."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def anti_copy(
    logits: Float[Tensor, "M V"], labels: Int[Tensor, " M"], truth: int, weight: float
) -> Float[Tensor, " M"]:
    """Return CE(label) + weight · CE(truth, the label left out), float32 or wider.

    `truth` is a token that stands for "what is true here": the second term asks for it wherever
    the label cannot be copied.
    Source: SoftCorrect (arXiv 2212.01039), section 3.2.
    """
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    first = F.cross_entropy(wide, labels, reduction="none")
    without = wide.scatter(1, labels.unsqueeze(1), float("-inf"))
    return first + weight * (without.logsumexp(1) - wide[:, truth])
