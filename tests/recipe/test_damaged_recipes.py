"""Recipes with random damage: the answer is a verdict in one sentence, never a traceback."""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from nemotron.cli import run

ROOT = Path(__file__).parents[2]
BASES = [ROOT / "recipes/tiny/pretrain.yaml", ROOT / "recipes/super/pretrain.yaml"]

WORDS = st.sampled_from(
    ["", "x", "ME*E", "${seed}", "${name}", "${", "???", "~", "1e-4", "0x1f", "true", "null",
     "\x00", "ß→", "a: b", "[1", "*ref", "!!python/object:os.system", "{}", "-", "=", "😀" * 40]
)  # fmt: skip
SCALARS = st.one_of(
    WORDS,
    st.text(max_size=8),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2, 3, 7]),
    st.floats(),
    st.booleans(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def places(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def verdict(arguments: list[str]) -> tuple[int, str]:
    """Return exit code and answer of the command line."""
    answer = io.StringIO()
    with redirect_stderr(answer), redirect_stdout(io.StringIO()):
        code = run(arguments)
    return code, answer.getvalue()


def check(path: Path, *overrides: str) -> None:
    code, answer = verdict(["recipe", "check", str(path), *overrides])
    assert code in (0, 2), answer
    assert "Traceback" not in answer
    assert len(answer.splitlines()) == (1 if code else 0), answer


QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@QUICK
@given(st.data())
def test_changed_values_and_keys(tmp_path: Path, data: st.DataObject):
    base = data.draw(st.sampled_from(BASES))
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(base.read_text()) | {"extends": str(base.parent / "model.yaml")}
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, key = data.draw(st.sampled_from(sorted(places(values))))
        holder = values
        for parent in parents:
            holder = holder[parent]
        kind = data.draw(st.sampled_from(["value", "remove", "rename", "add"]))
        if kind == "value":
            holder[key] = data.draw(VALUES)
        elif kind == "remove":
            del holder[key]
        elif kind == "rename":
            holder[data.draw(st.text("abcdefgmnpsz_", min_size=1, max_size=9))] = holder.pop(key)
        else:
            holder[data.draw(WORDS)] = data.draw(VALUES)
        if not values:
            break
    path = tmp_path / "mutant.yaml"
    with path.open("w") as file:
        yaml.dump(values, file)
    check(path)


@QUICK
@given(st.data())
def test_changed_text(tmp_path: Path, data: st.DataObject):
    base = data.draw(st.sampled_from(BASES))
    text = base.read_text().replace("extends: ", f"extends: {base.parent}/")
    at = data.draw(st.integers(0, len(text)))
    kind = data.draw(st.sampled_from(["insert", "cut", "twice"]))
    if kind == "insert":
        text = text[:at] + data.draw(WORDS | st.text(max_size=4)) + text[at:]
    elif kind == "cut":
        text = text[:at] + text[at + data.draw(st.integers(1, 40)) :]
    else:
        lines = text.splitlines(keepends=True)
        line = data.draw(st.integers(0, len(lines) - 1))
        text = "".join([*lines[:line], lines[line], *lines[line:]])
    path = tmp_path / "mutant.yaml"
    path.write_text(text, errors="surrogatepass")
    check(path)


@QUICK
@given(st.data())
def test_changed_bytes(tmp_path: Path, data: st.DataObject):
    content = bytearray(BASES[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutant.yaml"
    path.write_bytes(bytes(content))
    check(path)


KEYS = st.sampled_from(["schedule.", "model.hidden_size", "name", "data.sources", ""])


@QUICK
@given(KEYS, st.text(max_size=20) | WORDS, VALUES | st.text(max_size=12))
def test_any_override(known: str, key: str, value: Any):
    check(BASES[0], f"{known if known and not known.endswith('.') else known + key}={value}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("a[b=1", ": a[b is unknown; known are version, stage, "),
        ("[=1", ": [ is unknown; known are version, stage, "),
        ("model[0]=1", ": model[0] is unknown; the nearest known one is `model`."),
        ('model.correction={"q[": 1}', ": model.correction.q[ is unknown; known are candidates, "),
        ('data.sources=[{"a[b": 1}]', ": data.sources.0.a[b is unknown; known are name, weight"),
        ('data.tiers={"a[b": -1}', ": data.tiers.a[b = -1 must be greater than 0."),
        ("parallel.dp_shard=x", ": parallel.dp_shard = x must be a whole number or auto."),
        ("parallel.dp_shard=0", ": parallel.dp_shard = 0 must be greater than 0 or auto."),
        ("recompute=[moe, x]", ": recompute = x must be one of none, block, mamba, attention, "),
    ],
)
def test_a_refusal_names_the_key_as_it_was_written(change: str, said: str):
    code, answer = verdict(["recipe", "check", str(BASES[0]), change])
    assert (code, len(answer.splitlines())) == (2, 1)
    assert said in answer
