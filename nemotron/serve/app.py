"""The paths of the server, and what each answers."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from nemotron.errors import UserError
from nemotron.serve.access import Access, read_body
from nemotron.serve.bodies import Chat, Completion, Json, Usage
from nemotron.serve.echo import echoes
from nemotron.serve.errors import ApiError, explain_request
from nemotron.serve.gone import EventStream, while_connected
from nemotron.serve.metrics import Metrics
from nemotron.serve.page import page
from nemotron.serve.response_body import ResponseAnswer
from nemotron.serve.responses import ResponsesRequest
from nemotron.serve.schemas import ChatRequest, Common, CompletionRequest
from nemotron.serve.split import Splitter
from nemotron.serve.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)
from nemotron.serve.translate import Translator
from nemotron.serve.worker import Ended, Stream, Worker

Asked = TypeVar(
    "Asked", CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest
)
Chunks = AsyncGenerator[list[Json], None]
Endpoint = Callable[[Request], Awaitable[Response]]

CLIENT_GONE = 499
"""Status, as nginx has it, of a request that nobody waits for any more; it is never sent."""


@dataclass
class Server:
    """Answers requests about one model."""

    name: str
    worker: Worker
    translator: Translator
    access: Access
    version: str
    """Of the package."""
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            self._route("/", self._page, open_to_all=True),
            self._route("/health", self._health, open_to_all=True),
            self._route("/metrics", self._metrics),
            self._route("/version", self._version),
            self._route("/tokenize", self._tokenize, method="POST"),
            self._route("/detokenize", self._detokenize, method="POST"),
            self._route("/tokenizer_info", self._tokenizer_info),
            self._route("/v1/models", self._models),
            self._route("/v1/models/{name:path}", self._model),
            self._route("/v1/completions", self._complete, method="POST"),
            self._route("/v1/chat/completions", self._chat, method="POST"),
            self._route("/v1/responses", self._respond, method="POST"),
        ]
        handlers = {HTTPException: _no_such_path, Exception: _internal}
        return Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]

    def _route(
        self, path: str, answer: Endpoint, *, method: str = "GET", open_to_all: bool = False
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                self.access.check(request, open_to_all=open_to_all)
                response = await answer(request)
            except ApiError as error:
                response = JSONResponse(error.body(), error.status)
            except UserError as error:
                response = JSONResponse(ApiError(400, str(error)).body(), 400)
            except Ended as error:
                response = JSONResponse(ApiError(503, str(error)).body(), 503)
            except ClientDisconnect:
                self.metrics.count_leave()
                response = Response(status_code=CLIENT_GONE)
            self.metrics.requests[path, response.status_code] += 1
            return response

        return Route(path, endpoint, methods=[method])

    async def _page(self, request: Request) -> Response:
        text, policy = page()
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return Response(text, headers=headers, media_type="text/html")

    async def _health(self, request: Request) -> Response:
        if self.worker.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "ending"}, 503)

    async def _metrics(self, request: Request) -> Response:
        text = self.metrics.text(self.worker)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": self.version})

    async def _tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        return JSONResponse(await asyncio.to_thread(tokenize, self.translator, asked))

    async def _detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        return JSONResponse(await asyncio.to_thread(detokenize, self.translator, asked))

    async def _tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(tokenizer_info(self.translator, self.worker.engine.model.config))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._description())

    def _description(self) -> Json:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nemotron",
            "max_model_len": self.translator.limits.length,
            "has_chat_format": self.translator.chat is not None,
        }

    async def _complete(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        # a thread, because long texts and large schemas would keep all streams waiting
        requests = await asyncio.to_thread(self.translator.completion, asked)
        repeated = await asyncio.to_thread(echoes, asked, requests, self.translator.tokenizer)
        usage = Usage(sum(len(part.prompt) for part in requests))
        answer = Completion(
            *(self.name, self.translator.tokenizer, usage, asked.n or 1),
            logprobs=asked.logprobs is not None,
            stop_token_ids=asked.stop_token_ids or (),
            echoes=repeated,
        )
        return await self._answer(request, asked, answer, Stream(self.worker, requests))

    async def _chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        wanted, thinks = await asyncio.to_thread(self.translator.answer, asked)
        assert self.translator.chat is not None, "no request without a chat format"
        splitters = [_splitter(asked, thinks=thinks) for _ in range(wanted.num_samples)]
        answer = Chat(
            *(self.name, self.translator.tokenizer, Usage(len(wanted.prompt))),
            *(splitters, {} if asked.skip_special_tokens is False else self.translator.chat.marks),
            logprobs=bool(asked.logprobs),
            stop_token_ids=asked.stop_token_ids or (),
        )
        return await self._answer(request, asked, answer, Stream(self.worker, [wanted]))

    async def _respond(self, request: Request) -> Response:
        asked = await self._read(request, ResponsesRequest)
        try:
            chat = asked.chat()
        except ValidationError as error:
            raise explain_request(error, ChatRequest) from None
        wanted, thinks = await asyncio.to_thread(self.translator.answer, chat)
        assert self.translator.chat is not None, "no request without a chat format"
        answer = ResponseAnswer(
            *(self.name, self.translator.tokenizer, Usage(len(wanted.prompt)), asked),
            *(_splitter(chat, thinks=thinks), self.translator.chat.marks),
        )
        return await self._answer(request, asked, answer, Stream(self.worker, [wanted]))

    async def _read(self, request: Request, kind: type[Asked]) -> Asked:
        body = await read_body(request, self.translator.limits)
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            raise explain_request(error, kind) from None
        if asked.model is not None:
            self._check_name(asked.model)
        return asked

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:60]!r} here; use {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def _answer(
        self, request: Request, asked: Common | ResponsesRequest, answer: Completion, stream: Stream
    ) -> Response:
        count = sum(part.num_samples for part in stream.requests)
        most = self.translator.limits.open_answers
        if self.metrics.open_answers + count > most:
            raise ApiError(429, f"more than {most} answers would be open; ask again later.")
        events = self._follow(answer, stream, count)
        if asked.stream:
            # the first item says that the engine has taken the request
            await while_connected(request, anext(events))
            chunks = _sent(events, answer, asked.wants_usage)
            stall_s = self.translator.limits.stall_s
            return EventStream(chunks, self.metrics.count_leave, stall_s)
        await while_connected(request, _exhaust(events))
        # a thread, as the log-probabilities of a long prompt are many
        return JSONResponse(await asyncio.to_thread(answer.whole))

    async def _follow(self, answer: Completion, stream: Stream, count: int) -> Chunks:
        """Yield nothing when the engine has taken the request, then the chunks of each piece."""
        begin, is_first = time.perf_counter(), True
        self.metrics.open_answers += count
        try:
            async with stream:
                self.metrics.tokens["prompt"] += answer.usage.prompt
                yield []
                yield answer.begin(count)
                async with aclosing(stream.pieces()) as pieces:
                    async for piece in pieces:
                        if is_first:
                            self.metrics.first_token.add(time.perf_counter() - begin)
                        is_first = False
                        self.metrics.tokens["generated"] += piece.token is not None
                        if piece.prompt_logprobs is None:
                            yield answer.push(piece)
                        else:
                            yield await asyncio.to_thread(answer.push, piece)
                self.metrics.duration.add(time.perf_counter() - begin)
        finally:
            self.metrics.open_answers -= count


def _splitter(asked: ChatRequest, *, thinks: bool) -> Splitter:
    tools = () if asked.tool_choice == "none" else asked.tools or ()
    return Splitter(tools, thinks=thinks, only_one=asked.parallel_tool_calls is False)


async def _exhaust(events: Chunks) -> None:
    async for _ in events:
        pass


async def _sent(
    events: Chunks, answer: Completion, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks as server-sent events; an end that comes too early is the last of them."""
    try:
        async with aclosing(events):
            async for chunks in events:
                for chunk in chunks:
                    yield answer.sent(chunk)
        if wants_usage:
            yield answer.sent(answer.usage_chunk())
    except Ended as error:
        yield answer.sent(answer.failure(ApiError(503, str(error))))
    yield answer.closing


async def _no_such_path(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    right = headers.get("Allow", "another method").replace(", ", " or ")
    sentence = {
        404: f"there is no path {request.url.path[:60]!r}; see docs/serve.md for those that are.",
        405: f"{request.method[:20]} is not for {request.url.path[:60]!r}; use {right}.",
    }.get(error.status_code, f"{error.detail}.")
    return JSONResponse(ApiError(error.status_code, sentence).body(), error.status_code, headers)


async def _internal(request: Request, error: Exception) -> Response:
    sentence = "an internal error, which is a fault of this server; its log says more."
    return JSONResponse(ApiError(500, sentence).body(), 500)
