"""What one client may ask of a server."""

from dataclasses import dataclass

from nemotron.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds of a request, and of all requests together."""

    length: int
    """Tokens of a prompt and its answer."""
    answer: int = 4096
    """Tokens of an answer whose request says nothing."""
    body_bytes: int = 4 << 20
    body_s: float = 30.0
    """Seconds within which a body must have arrived."""
    stall_s: float = 60.0
    """Seconds after which a client that reads nothing of its stream counts as gone."""
    open_answers: int = 256
    """Answers that are written or wait at the same time."""
    samples: int = 16
    """Answers to one prompt."""
    prompts: int = 64
    """Prompts of one request."""
    echoed: int = 1 << 19
    """Log-probabilities of prompts in the answers to one request."""

    def __post_init__(self) -> None:
        for name in ("length", "answer", "body_bytes", "open_answers"):
            if getattr(self, name) < 1:
                raise UserError("must be at least 1.", key=name, value=getattr(self, name))
