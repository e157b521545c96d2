"""Answers in the form of OpenAI's Responses interface: whole, or as the events of a stream."""

import json
import secrets
from dataclasses import dataclass, field

from nemotron.data.chat.calls import Call
from nemotron.data.tokenizer import Tokenizer
from nemotron.serve.bodies import Completion, Json, Usage, take
from nemotron.serve.errors import ApiError
from nemotron.serve.responses import ResponsesRequest
from nemotron.serve.split import Splitter
from nemotron.serve.worker import Piece


@dataclass
class Texts:
    """An item that is a text while it is written: the reasoning, or a message."""

    kind: str
    index: int
    id: str = field(init=False)
    text: str = ""

    def __post_init__(self) -> None:
        prefix = "rs" if self.kind == "reasoning" else "msg"
        self.id = f"{prefix}_{secrets.token_hex(12)}"

    @property
    def part(self) -> Json:
        """Its only part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def item(self, status: str, *, is_empty: bool = False) -> Json:
        """Return it as an item of the output."""
        content = [] if is_empty else [self.part]
        item: Json = {"id": self.id, "type": self.kind, "status": status, "content": content}
        own: Json = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        return item | own


class ResponseAnswer(Completion):
    """The answer to a request for a response; its text passes through a `Splitter`.

    Source of the events and their order: the snapshots of the `openai` client, which checks them.
    """

    prefix, closing = "resp", b""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        usage: Usage,
        asked: ResponsesRequest,
        splitter: Splitter,
        marks: dict[int, str],
    ) -> None:
        super().__init__(model, tokenizer, usage, 1, logprobs=False)
        self.id = self.id.replace("-", "_")
        self._asked, self._splitter, self._marks = asked, splitter, marks
        self._output: list[Json] = []
        self._open: Texts | None = None
        self._status = "in_progress"
        self._error: Json | None = None
        self._num_events = 0

    def begin(self, count: int) -> list[Json]:
        super().begin(count)
        return [self._whole_event("created"), self._whole_event("in_progress")]

    def push(self, piece: Piece) -> list[Json]:
        self.usage.push(piece, reasons=self._splitter.is_reasoning)
        delta = take(self._splitter, self._marks, piece)
        events = self._add("reasoning", delta.reasoning) + self._add("message", delta.content)
        if piece.finish is None:
            return events
        is_whole = piece.finish == "stop"
        if is_whole and not delta.calls and not self._has_message:
            events += self._begin("message")
        # what was written before the calls is whole, whatever cut the answer
        events += self._end("completed" if is_whole or delta.calls else "incomplete")
        for call in delta.calls:
            events += self._call(call)
        self._status = "completed" if is_whole else "incomplete"
        return [*events, self._whole_event(self._status)]

    def whole(self) -> Json:
        asked = self._asked
        is_cut, is_done = self._status == "incomplete", self._status == "completed"
        effort = None if asked.reasoning is None else asked.reasoning.effort
        form: Json = {"type": "text"}
        if asked.text is not None:
            form = asked.text.format.model_dump(by_alias=True, exclude_unset=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": asked.instructions,
            "output": list(self._output),
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": form},
            "tool_choice": _choice(asked),
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_cut or is_done else None,
            "user": asked.user,
        }

    def sent(self, chunk: Json) -> bytes:
        return b"event: " + chunk["type"].encode() + b"\n" + super().sent(chunk)

    def failure(self, error: ApiError) -> Json:
        self._status = "failed"
        self._error = {"code": "server_error", "message": error.message}
        return self._whole_event("failed")

    @property
    def _has_message(self) -> bool:
        items = [item["type"] for item in self._output]
        return "message" in items or (self._open is not None and self._open.kind == "message")

    def _usage(self) -> Json:
        usage = self.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage.generated,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.generated,
        }

    def _add(self, kind: str, text: str) -> list[Json]:
        """Write more of the reasoning or of the message."""
        if not text:
            return []
        events = []
        if self._open is None or self._open.kind != kind:
            events = self._end("completed") + self._begin(kind)
        assert self._open is not None, "it was begun"
        self._open.text += text
        return [*events, self._text_event(self._open, "delta", delta=text)]

    def _begin(self, kind: str) -> list[Json]:
        self._open = Texts(kind, len(self._output))
        item = self._open.item("in_progress", is_empty=True)
        return [
            self._event("output_item.added", output_index=self._open.index, item=item),
            self._part_event(self._open, "added"),
        ]

    def _end(self, status: str) -> list[Json]:
        """End the text that is written, if one is."""
        if (text := self._open) is None:
            return []
        self._open = None
        self._output.append(item := text.item(status))
        return [
            self._text_event(text, "done", text=text.text),
            self._part_event(text, "done"),
            self._event("output_item.done", output_index=text.index, item=item),
        ]

    def _call(self, call: Call) -> list[Json]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        place = {"output_index": len(self._output)}
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": call.name,
        }
        empty = {**item, "arguments": "", "status": "in_progress"}
        item |= {"arguments": arguments, "status": "completed"}
        self._output.append(item)
        named = {**place, "item_id": item["id"]}
        kind = "function_call_arguments"
        return [
            self._event("output_item.added", **place, item=empty),
            self._event(f"{kind}.delta", **named, delta=arguments),
            self._event(f"{kind}.done", **named, name=call.name, arguments=arguments),
            self._event("output_item.done", **place, item=item),
        ]

    def _text_event(self, written: Texts, what: str, **more: str) -> Json:
        place = {
            "item_id": written.id,
            "output_index": written.index,
            "content_index": 0,
        }
        if written.kind == "reasoning":
            return self._event(f"reasoning_text.{what}", **place, **more)
        return self._event(f"output_text.{what}", **place, **more, logprobs=[])

    def _part_event(self, text: Texts, what: str) -> Json:
        place = {"item_id": text.id, "output_index": text.index, "content_index": 0}
        return self._event(f"content_part.{what}", **place, part=text.part)

    def _whole_event(self, what: str) -> Json:
        return self._event(what, response=self.whole())

    def _event(self, what: str, **values: object) -> Json:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": f"response.{what}", "sequence_number": number, **values}


def _choice(asked: ResponsesRequest) -> Json | str:
    choice = asked.tool_choice
    return (choice or "auto") if choice is None or isinstance(choice, str) else choice.model_dump()
