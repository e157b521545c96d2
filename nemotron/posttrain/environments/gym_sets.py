"""`reasoning_gym`: the procedural data sets of the package of that name."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments.answer import last_boxed
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    WithoutTools,
    build_row,
    find_field,
    random_of,
    whole_level,
)

CHOSEN = (
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "count_primes",
    "gcd",
    "lcm",
    "leg_counting",
    "letter_counting",
    "maze",
    "number_sequence",
    "simple_equations",
    "syllogism",
)
"""Sets whose answers are short and that score them alone."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGym(WithoutTools):
    """Answer a question of a data set, which scores the last `<answer>`, or else `\\boxed{}`.

    Rows of NVIDIA-NeMo/Gym have `question`, `answer` and `metadata` themselves; without tag and box
    their whole answer is scored.

    Only a full score is rewarded: data sets give a part of it for long answers that contain the
    right one. A level raises every attribute of a set's curriculum so many times.

    Raises:
        UserError: when the package `reasoning-gym` is not installed, or a set unknown.
    """

    name = "reasoning_gym"

    def __init__(self, datasets: Sequence[str] = CHOSEN) -> None:
        """`datasets` are names of the package."""
        try:
            from reasoning_gym import factory
        except ImportError:
            raise UserError(
                "needs the package reasoning-gym; install it with: "
                "pip install 'reasoning-gym>=0.1.25'",
                key="environments",
                value="reasoning_gym",
            ) from None
        self._factory = factory
        if isinstance(datasets, str) or not isinstance(datasets, Sequence) or not datasets:
            rule, where = "must be a list of names.", f"environments: {self.name}"
            raise UserError(rule, key="datasets", value=datasets, where=where)
        self._datasets = tuple(datasets)
        self._scorers: dict[str, Any] = {}
        for name in self._datasets:
            if not isinstance(name, str) or name not in factory.DATASETS:
                raise UserError(
                    f"contains {name!r}, which is unknown; known are "
                    f"{', '.join(sorted(factory.DATASETS))}.",
                    key="datasets",
                    where="environments: reasoning_gym",
                )

    @property
    def max_level(self) -> int:
        """The last level of the set that has most of them."""
        known = (name for name in self._datasets if name in self._factory.CURRICULA)
        curricula = (self._factory.create_curriculum(name) for name in known)
        return max((len(a.levels) - 1 for c in curricula for a in c.attributes.values()), default=0)

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks, of each set in turn; each depends on `seed`, `level` and its number."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            dataset = self._datasets[number % len(self._datasets)]
            whole = whole_level(rng, level)
            entry = self._make(dataset, rng.randrange(2**31), whole)
            yield build_row(
                self.name,
                f"{entry['question']}\nGive the answer between <answer> and </answer>.",
                dataset=dataset,
                entry=json.loads(json.dumps(entry, default=str)),
            )

    def check(self, row: Row) -> None:
        """Check the data set and its entry.

        Raises:
            BadRow: when one is absent or unknown.
        """
        dataset, entry = task_of(row)
        if dataset not in self._factory.DATASETS:
            raise BadRow(f"dataset = {dataset!r} is unknown; give one of reasoning-gym")
        if not isinstance(entry, dict) or not {"question", "answer", "metadata"} <= entry.keys():
            raise BadRow("entry lacks question, answer or metadata; give what the set generates")

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 for a full score, else 0."""
        found = ANSWER.findall(response.text)
        answer = found[-1] if found else last_boxed(response.text)
        if answer is None and "entry" not in row:  # as the server of such rows
            answer = response.text
        if answer is None or not answer.strip():
            return Verdict(0.0)
        dataset, entry = task_of(row)
        if dataset not in self._scorers:
            self._scorers[dataset] = self._factory.create_dataset(dataset, size=1, seed=0)
        score = self._scorers[dataset].score_answer(answer.strip(), entry)
        return Verdict(float(score >= 1), {"score": float(score)}, extracted=answer.strip())

    def _make(self, name: str, seed: int, level: int) -> dict[str, Any]:
        """Return the first entry of a set."""
        if name not in self._factory.CURRICULA or level == 0:
            found = self._factory.create_dataset(name, size=1, seed=seed)[0]
        else:
            curriculum = self._factory.create_curriculum(name)
            for attribute, definition in curriculum.attributes.items():
                steps = min(level, len(definition.levels) - 1)
                curriculum.set_attr_level(attribute, steps)
            config = curriculum.generate_configuration({"size": 1, "seed": seed})
            found = self._factory.DATASETS[name][0](config)[0]
        return dict(found)


def task_of(row: Row) -> tuple[Any, Any]:  # Any: JSON
    """Return the data set of a row and its entry; rows of NVIDIA-NeMo/Gym are entries themselves.

    Raises:
        BadRow: when one is absent.
    """
    metadata = row.get("metadata")
    if "question" in row and isinstance(metadata, dict) and "source_dataset" in metadata:
        entry = {name: row.get(name) for name in ("question", "answer", "metadata")}
        return metadata["source_dataset"], entry
    return find_field(row, "dataset"), find_field(row, "entry")
