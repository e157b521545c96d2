"""The thread that steps the engine, and the streams of events that asyncio reads."""

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from nemotron.errors import UserError
from nemotron.generate.engine import Engine
from nemotron.generate.request import Event, Finish, PromptLogprobs, Request, TokenScore


@dataclass(frozen=True)
class Piece:
    """One more token of an answer, or its end; never changed afterwards, unlike an `Answer`."""

    prompt: int
    """Which of the requests of a stream it belongs to."""
    sample: int
    token: int | None
    text: str
    logprob: float | None
    """In nats under the model, where it was asked for."""
    top: Sequence[TokenScore]
    """The likeliest tokens in its place, where they were asked for."""
    finish: Finish | None
    stop_reason: int | str | None = None
    """As `Answer.stop_reason`; with its end only."""
    num_drafts: int = 0
    """Tokens that were guessed for the whole answer; with its end only."""
    num_accepted: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    """Those of the prompt, where they were asked for; with the first piece of an answer only."""


class Ended(Exception):
    """No more of an answer comes: the server is shutting down, or its engine failed."""

    def __init__(self, why: str = "the server is shutting down; ask again later.") -> None:
        super().__init__(why)


FAILED = "the engine of the server has failed; its log says why."


class Stream:
    """The pieces of some requests; entered while somebody wants them, canceled at the exit."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]) -> None:
        self._worker, self.requests = worker, requests
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._num_left = sum(request.num_samples for request in requests)

    async def __aenter__(self) -> "Stream":
        """Submit the requests.

        Raises:
            UserError: when the engine refuses one of them; nothing was answered yet.
            Ended: when the server takes no more requests.
        """
        self._worker.send("open", self)
        try:
            if (refusal := await self._arrived.get()) is not None:
                assert isinstance(refusal, Exception), f"{refusal} came before the first step"
                raise refusal
        except BaseException:
            self._worker.send("close", self)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._worker.send("close", self)

    def put(self, item: Piece | Exception | None) -> None:
        """Give an item to the reader of the stream; any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody reads any more
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield all pieces until every answer has ended.

        Raises:
            Ended: when the server ends first.
        """
        while self._num_left:
            item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            assert item is not None, "a stream begins once"
            if item.finish == "abort":
                raise Ended
            self._num_left -= item.finish is not None
            yield item


@dataclass
class _Open:
    """A request that the engine works on."""

    stream: Stream
    place: int
    num_left: int


class Worker:
    """Owns an engine: its thread alone touches it, and between two steps does what others ask."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._orders: queue.SimpleQueue[tuple[str, Stream | None]] = queue.SimpleQueue()
        self._open: dict[int, _Open] = {}
        """By the number that the engine gave a request."""
        self._numbers: dict[Stream, list[int]] = {}
        self._end_at: float | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.done: Future[None] = self._pool.submit(self._work)
        """Raises what ended the thread, if it was not `stop`."""
        self.done.add_done_callback(self._refuse_all)

    @property
    def is_ready(self) -> bool:
        """Whether new requests are answered."""
        return not self.done.done() and self._end_at is None

    @property
    def num_open(self) -> int:
        """Requests that the engine works on."""
        return len(self._open)

    def send(self, order: str, stream: Stream | None = None) -> None:
        """Let the thread `open` or `close` a stream, `look` at the time, or `stop`."""
        self._orders.put((order, stream))
        if self.done.done():  # nobody reads the orders any more
            self._refuse_all(self.done)

    def end_within(self, seconds: float) -> None:
        """Take no more requests, and end those that are still open after so many seconds."""
        self._end_at = time.monotonic() + seconds
        self.send("look")

    def stop(self) -> None:
        """End the thread, with all requests."""
        self.send("stop")
        self._pool.shutdown()

    def _work(self) -> None:
        while self._obey():
            if self._end_at is not None and time.monotonic() > self._end_at:
                for number in self._open:
                    self.engine.cancel(number)
            for event in self.engine.step():
                self._deliver(event)

    def _obey(self) -> bool:
        """Do all that was asked for; wait for it if there is nothing else. False at the end."""
        wait = self.engine.is_idle
        while True:
            try:
                order, stream = self._orders.get(block=wait)
            except queue.Empty:
                return True
            if order == "stop":
                return False
            if order == "open" and stream is not None:
                self._submit(stream)
            elif order == "close" and stream is not None:
                self._cancel(stream)
            wait = False

    def _submit(self, stream: Stream) -> None:
        if self._end_at is not None:
            return stream.put(Ended())
        numbers = self._numbers.setdefault(stream, [])
        for place, request in enumerate(stream.requests):
            try:
                number = self.engine.submit(request)
            except UserError as error:
                return stream.put(error)
            numbers.append(number)
            self._open[number] = _Open(stream, place, request.num_samples)
        stream.put(None)

    def _cancel(self, stream: Stream) -> None:
        for number in self._numbers.pop(stream, []):
            if self._open.pop(number, None) is not None:
                self.engine.cancel(number)

    def _deliver(self, event: Event) -> None:
        request = self._open.get(event.request)
        if request is None:  # nobody wants it any more
            return
        wanted = request.stream.requests[request.place].logprobs and event.token is not None
        logprob = event.answer.raw_logprobs[event.place] if wanted else None
        top = event.answer.top_logprobs[event.place] if wanted else ()
        passes = event.answer.passes if event.finish is not None else ()
        if event.finish is not None:
            request.num_left -= 1
            if not request.num_left:
                del self._open[event.request]
        request.stream.put(
            Piece(
                *(request.place, event.sample, event.token, event.text),
                *(logprob, top, event.finish, event.answer.stop_reason if event.finish else None),
                num_drafts=sum(done.num_drafts for done in passes),
                num_accepted=sum(done.num_accepted for done in passes),
                prompt_logprobs=None if event.place else event.answer.prompt_logprobs,
            )
        )

    def _refuse_all(self, done: Future[None]) -> None:
        """End the streams, and those that wait for the thread, which has ended."""
        ended = Ended() if done.exception() is None else Ended(FAILED)
        for stream in list(self._numbers):
            stream.put(ended)
        with contextlib.suppress(queue.Empty):
            while True:
                _, waiting = self._orders.get_nowait()
                if waiting is not None:
                    waiting.put(ended)
