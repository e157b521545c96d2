"""`if_constraints`: follow instructions about the form of the answer."""

from collections.abc import Iterator
from typing import Any

from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    WithoutTools,
    build_row,
    find_field,
    optional_field,
    random_of,
    whole_level,
)
from nemotron.posttrain.environments.constraints import COMPARE, CONSTRAINTS, words
from nemotron.posttrain.environments.instructions import FAMILIES, SUBJECTS, compose

MODES = ("binary", "fraction")


class IfConstraints(WithoutTools):
    """Fulfill every constraint of `instruction_id_list`, whose arguments stand in `kwargs`.

    `grading_mode` binary rewards answers that fulfill all; fraction gives the share of those that
    are fulfilled. An answer without a word earns nothing. Level 0 has one constraint, every
    further level one more.
    """

    name = "if_constraints"
    max_level = len(FAMILIES) - 1
    """One constraint of each family."""

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            subject = rng.choice(SUBJECTS)
            made = compose(rng, subject, 1 + whole_level(rng, level))
            prompt = " ".join([subject, *(each.sentence for each in made)])
            yield build_row(
                self.name,
                prompt,
                prompt=prompt,
                instruction_id_list=[each.identifier for each in made],
                kwargs=[each.arguments for each in made],
                grading_mode=MODES[0],
            )

    def check(self, row: Row) -> None:
        """Check that all constraints are known and have their arguments.

        Raises:
            BadRow: when one is unknown, or an argument absent or of another type.
        """
        mode = optional_field(row, "grading_mode", MODES[0])
        if mode not in MODES:
            raise BadRow(f"grading_mode = {mode!r} is unknown; give binary or fraction")
        for identifier, given in _constraints(row):
            _check_arguments(identifier, given)

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if all constraints are fulfilled, or their share; components hold each."""
        text = response.text
        found: dict[str, float] = {}
        for place, (identifier, given) in enumerate(_constraints(row)):
            is_met = bool(words(text)) and CONSTRAINTS[identifier].check(text, given)
            key = f"{identifier}/{place}" if identifier in found else identifier
            found[key] = float(is_met)
        share = sum(found.values()) / len(found)
        is_binary = optional_field(row, "grading_mode", MODES[0]) == "binary"
        return Verdict(float(share == 1) if is_binary else share, components=found)


def _constraints(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Return identifiers and arguments; an argument of null counts as absent.

    Raises:
        BadRow: when the two lists are absent or do not fit each other.
    """
    names, given = find_field(row, "instruction_id_list"), find_field(row, "kwargs")
    if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given):
        raise BadRow("kwargs does not have one entry for each of instruction_id_list; mend it")
    if not names:
        raise BadRow("instruction_id_list is empty; give at least one constraint")
    found = []
    for name, entry in zip(names, given, strict=True):
        if not isinstance(name, str) or name not in CONSTRAINTS:
            raise BadRow(
                f"instruction_id_list contains {name!r}, which is unknown; "
                f"known are {', '.join(CONSTRAINTS)}"
            )
        if not isinstance(entry, dict | None):
            raise BadRow(f"kwargs of {name}: {entry!r}; give an object")
        found.append((name, {k: v for k, v in (entry or {}).items() if v is not None}))
    return found


def _check_arguments(identifier: str, given: dict[str, Any]) -> None:
    for name, kind in CONSTRAINTS[identifier].arguments.items():
        value = given.get(name)
        fits = isinstance(value, kind) and not isinstance(value, bool) and value not in ("", [])
        if isinstance(value, list):
            fits = fits and all(isinstance(word, str) and word for word in value)
        if not fits:
            wanted = {int: "a whole number", str: "a text", list: "a list of texts"}[kind]
            raise BadRow(f"kwargs of {identifier}: {name} = {value!r}; give {wanted}")
        if name.endswith("relation") and value not in COMPARE:
            raise BadRow(
                f"kwargs of {identifier}: {name} = {value!r}; give one of {', '.join(COMPARE)}"
            )
