"""States after the beginnings of texts, stored so that other texts can continue them."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.cache import Cache, Snapshot


@dataclass(eq=False)
class Prefix:
    """The state after some tokens; `snapshot` is None once it had to make room."""

    snapshot: Snapshot | None
    logits: Float[Tensor, " V"] | None = None
    """Of the next token, where they are known."""
    experts: Int[Tensor, "tokens layers K"] | None = None
    """What the routers chose on the way, where it was recorded."""
    users: int = 0
    """Samples that wait for a slot and begin here."""


class PrefixStore:
    """At most `limit` prefixes by their tokens, and those that waiting samples share.

    The one used longest ago makes room.
    """

    def __init__(self, cache: Cache, limit: int) -> None:
        self._cache, self._limit = cache, limit
        self._stored: OrderedDict[bytes, Prefix] = OrderedDict()
        self._shared: list[Prefix] = []

    @property
    def num_shared(self) -> int:
        """Prefixes that some sample waits to begin with."""
        return len(self._shared)

    def store(
        self,
        tokens: Sequence[int],
        slot: int,
        experts: Int[Tensor, "tokens layers K"] | None = None,
    ) -> None:
        """Keep the present state of a slot, which has read exactly these tokens.

        `experts` may go on: a text that lost its slot is read again, but not recorded again.
        """
        key = array("q", tokens).tobytes()
        if not self._limit or key in self._stored:
            return
        own = None if experts is None else experts[: len(tokens)]
        self._stored[key] = Prefix(self._cache.snapshot(slot), experts=own)
        if len(self._stored) > self._limit:
            self.make_room()

    def find(self, tokens: Sequence[int], *, with_experts: bool) -> Prefix | None:
        """Return the longest stored beginning of a text that leaves at least one token to read."""
        text = array("q", tokens).tobytes()
        found = [
            key
            for key, prefix in self._stored.items()
            if len(key) < len(text)
            and text.startswith(key)
            and (prefix.experts is not None or not with_experts)
        ]
        if not found:
            return None
        longest = max(found, key=len)
        self._stored.move_to_end(longest)
        return self._stored[longest]

    def share(self, prefix: Prefix) -> None:
        """Hold a prefix until all of its users have let go of it."""
        self._shared.append(prefix)

    def unshare(self, prefix: Prefix) -> None:
        """Let go of a prefix as one of its users."""
        prefix.users -= 1
        if not prefix.users and prefix in self._shared:
            self._shared.remove(prefix)
            self._drop(prefix)

    def make_room(self, *, also_shared: bool = False) -> bool:
        """Drop the prefix used longest ago; return False if there is none."""
        if self._stored:
            self._drop(self._stored.popitem(last=False)[1])
        elif also_shared and self._shared:
            self._drop(self._shared.pop(0))
        else:
            return False
        return True

    def clear(self, *, only_shared: bool = False) -> None:
        """Drop all, as after an update of the weights.

        `only_shared` keeps those that are stored, whose next logits are not known.
        """
        while self._shared:
            self._drop(self._shared.pop(0))
        while not only_shared and self.make_room():
            pass

    def _drop(self, prefix: Prefix) -> None:
        assert prefix.snapshot is not None, "it is dropped once"
        self._cache.release(prefix.snapshot)
        prefix.snapshot = None
