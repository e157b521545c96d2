"""Responses and verdicts as JSON, in the form of OpenAI's Responses and of NVIDIA-NeMo/Gym."""

from typing import Any, TypeGuard

from nemotron.posttrain.environments.base import Response, Verdict

Json = dict[str, Any]
LARGEST = 1e9
"""Size of the largest reward."""
LOADED = "loaded"
"""What a worker says once it has loaded an environment, before its verdicts."""


def fault(reason: str) -> Verdict:
    """Return the verdict on a sample that could not be judged."""
    return Verdict(0.0, error=reason, mask=True)


def read_verdict(found: Any) -> Verdict:
    """Return a verdict from its JSON form; one that is not a finite number is a fault."""
    reward = found.get("reward") if isinstance(found, dict) else None
    if not _is_number(reward):
        return fault(f"the verifier gave reward = {reward!r:.40}, which is not a finite number")
    components = found.get("components") or {}
    if not isinstance(components, dict) or not all(map(_is_number, components.values())):
        return fault("the verifier gave components that are not numbers")
    error = found.get("error")
    return Verdict(
        float(reward),
        {name: float(value) for name, value in components.items()},
        found.get("extracted"),
        error,
        bool(found.get("mask")) or error is not None,
    )


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number of a size that rewards have; NaN compares as neither."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -LARGEST <= value <= LARGEST


def write_response(response: Response) -> Json:
    """Return a response as OpenAI's object, with all that its schema requires."""
    items = response.output or _items(response)
    end = {"reason": "max_output_tokens"} if response.is_truncated else None
    return {
        "id": "resp_0",
        "object": "response",
        "created_at": 0,
        "model": "policy",
        "status": "incomplete" if response.is_truncated else "completed",
        "error": None,
        "incomplete_details": end,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
        "output": [_complete(dict(item), number) for number, item in enumerate(items)],
    }


def read_response(found: Any) -> Response:
    """Return a response from OpenAI's object; its text is that of the last message.

    Raises:
        ValueError: when it is not such an object.
    """
    items = found.get("output") if isinstance(found, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError("response.output is not a list of items; give the model's output")
    messages = [item for item in items if item.get("type") == "message"]
    thoughts = [item for item in items if item.get("type") == "reasoning"]
    details = found.get("incomplete_details")
    return Response(
        _parts(messages[-1], "content") if messages else "",
        _parts(thoughts[-1], "summary") if thoughts else "",
        tuple(items),
        isinstance(details, dict) and details.get("reason") == "max_output_tokens",
    )


def write_verdict(verdict: Verdict) -> Json:
    """Return a verdict with the names of NVIDIA-NeMo/Gym."""
    found: Json = {
        "reward": verdict.reward,
        "mask_sample": verdict.mask,
        "failure_reason": verdict.error,
        "extracted_answer": verdict.extracted,
    }
    return {**found, "reward_components": verdict.components} if verdict.components else found


def read_gym_verdict(found: Any) -> Verdict:
    """Return a verdict from the answer of a server; a sample that it masks stays masked."""
    if not isinstance(found, dict):
        return fault("the server's verdict is not a JSON object")
    extracted = found.get("extracted_answer")
    verdict = {
        "reward": found.get("reward"),
        "components": found.get("reward_components"),
        "extracted": extracted if isinstance(extracted, str) else None,
        "mask": found.get("mask_sample") is True,
        # a reason without a mask describes a sample that still counts
        "error": found.get("failure_reason") if found.get("mask_sample") is True else None,
    }
    return read_verdict(verdict)


def _items(response: Response) -> list[Json]:
    """Return the items of a response that has only texts."""
    message = {"type": "message", "content": [{"type": "output_text", "text": response.text}]}
    if not response.reasoning:
        return [message]
    summary = [{"type": "summary_text", "text": response.reasoning}]
    return [{"type": "reasoning", "summary": summary}, message]


def _complete(item: Json, number: int) -> Json:
    """Return an item with the fields that OpenAI's schema requires of its type."""
    kind = item.get("type")
    if kind == "message":
        parts = [{"annotations": [], **part} for part in item.get("content", [])]
        item = {"role": "assistant", "status": "completed", **item, "content": parts}
    if kind in ("message", "reasoning", "function_call"):
        item = {"id": f"item_{number}", **item}
    if kind == "reasoning":
        item = {"summary": [], **item}
    return item


def _parts(item: Json, key: str) -> str:
    """Return the text of the parts of an item; they may be one text."""
    parts = item.get(key) or []
    if isinstance(parts, str):
        return parts
    known = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(str(part.get("text", "")) for part in known)
