"""A server on a free port, with a small model and the embedded tokenizer."""

import socket
import threading
from collections.abc import Iterator

import pytest

from nemotron import __version__
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.generate.engine import Engine
from nemotron.generate.speculate import Speculation
from nemotron.model.hybrid import HybridLM
from nemotron.serve.conversation import ChatFormat
from nemotron.serve.grammar import JsonForms
from nemotron.serve.limits import Limits
from nemotron.serve.worker import Worker
from tests.support.serving import LIMITS, Dictated, Running, Start
from tests.support.writer import build_writer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> HybridLM:
    return build_writer(tokenizer.vocab_size)


@pytest.fixture(scope="module")
def start(model: HybridLM, tokenizer: Tokenizer) -> Iterator[Start]:
    """Starts servers, which end with the module."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from nemotron.serve.access import Access
    from nemotron.serve.app import Server

    ends = []

    def begin(
        key: str | None = None, limits: Limits = LIMITS, speculation: Speculation | None = None
    ) -> Running:
        engine = Engine(model, {3}, tokenizer=tokenizer, slots=8, speculation=speculation)
        worker = Worker(engine)
        chat = ChatFormat.of(tokenizer, None)
        # the record of the translator cannot be changed, its list can
        forms = JsonForms(tokenizer, tokenizer.vocab_size, frozenset({3, *chat.stop_ids}))
        translator = Dictated(tokenizer, tokenizer.vocab_size, chat, limits, forms, [])
        access = Access(key, is_local=True)
        app = Server("tiny", worker, translator, access, __version__).app()
        listener = socket.create_server(("127.0.0.1", 0))
        # so that a client that does not read is soon waited for
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        running = Running(url, worker, translator.answers)
        ends.append((server, thread, running, listener))
        return running

    yield begin
    for server, thread, running, listener in ends:
        server.should_exit = True
        thread.join(20)
        running.worker.stop()
        listener.close()
        assert not thread.is_alive()
        assert running.is_broken or running.worker.done.exception() is None


@pytest.fixture(scope="module")
def running(start: Start) -> Running:
    return start()
