"""One answer to a task, and all that is needed to judge it again or to average it."""

import functools
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from nemotron.posttrain.environments.base import Response, Row, Verdict


@dataclass(frozen=True)
class Sample:
    """A judged answer."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: str
    """Name of what the row belongs to, such as `arith_chain@1`."""
    number: int
    """Of the row within its task, from 0."""
    sample: int
    """Of the answer to the row, from 0."""
    row: Row
    response: Response
    verdict: Verdict
    num_tokens: int
    """Of the answer over all turns, reasoning included."""
    is_truncated: bool
    budget: int | None = None
    """Tokens after which reasoning was closed; None: never."""

    def as_line(self) -> str:
        """Return the sample as a line of JSON."""
        return json.dumps(self, default=vars, ensure_ascii=False) + "\n"

    @classmethod
    def of_json(cls, values: Any) -> "Sample":  # Any: whatever stands in a file of others
        """Return what `as_line` wrote.

        Raises:
            ValueError: when a key is unknown, absent or of another type.
        """
        return _adapter().validate_python(values)


@functools.cache
def _adapter() -> TypeAdapter[Sample]:
    return TypeAdapter(Sample)
