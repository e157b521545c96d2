"""The store through which the ranks found each other, for a thread that must never wait in it."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class StoreSilent(Exception):
    """The store did not answer in time."""


class PatientStore:
    """Asks a store from a thread of its own, and gives up when no answer comes.

    The time limit of torch's store covers a key that nobody has set, not a host that is frozen or
    out of reach: such a call never returns.
    """

    def __init__(self, store: dist.Store, patience_s: float) -> None:
        self._store, self._patience_s = store, patience_s
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, name="store", daemon=True).start()

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Give up sooner or later than usual."""
        usual, self._patience_s = self._patience_s, seconds
        try:
            yield
        finally:
            self._patience_s = usual

    def set(self, key: str, value: str) -> None:
        """Set a key.

        Raises:
            StoreSilent: when the store does not answer.
            RuntimeError: when it is gone.
        """
        self._ask(lambda: self._store.set(key, value))

    def has(self, key: str) -> bool:
        """Say whether a key is set; raises as `set` does."""
        return self._ask(lambda: self._store.check([key]))

    def get(self, key: str) -> bytes:
        """Return the value of a key that is set; raises as `set` does."""
        return self._ask(lambda: self._store.get(key))

    def _ask(self, call: Callable[[], T]) -> T:
        answer: Future[T] = Future()
        self._calls.put((call, answer))
        try:
            return answer.result(self._patience_s)
        except TimeoutError:
            raise StoreSilent from None

    def _answer(self) -> None:
        while True:
            call, answer = self._calls.get()
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)
