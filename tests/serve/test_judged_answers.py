"""A judge behind a real server of ours, and judges that are down, slow or lying."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import Response, build_row
from nemotron.posttrain.environments.judge import Judge
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.verify import Verifiers
from tests.support.listening import listening, read_request, saying, silent
from tests.support.serving import Running

ROW = build_row("judge", "Name a river.", expected_answer="the Rhine")


def options(url: str, **more: Any) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "model": "tiny", "max_tokens": 8, "timeout_s": 20.0} | more


def test_a_served_model_judges_from_a_process_of_its_own(running: Running) -> None:
    running.answers[:] = ["I look.</think>It is one. \\boxed{4}"]
    with Verifiers(1, {"judge": options(running.url)}) as verifiers:
        answers = [Response("The Rhine."), Response("")]
        found = verifiers.verify([ROW] * 2, answers, [None] * 2, 60.0)
    running.answers.clear()
    assert [verdict.error for verdict in found] == [None, None]
    assert [verdict.reward for verdict in found] == [0.75, 0.0]
    assert found[0].components == {"grade": 4.0}


@pytest.mark.parametrize("said", ["\\boxed{9}", "\\boxed{0}", "Very good.", "\\boxed{four}"])
def test_a_judge_that_gives_no_grade_is_a_fault(running: Running, said: str) -> None:
    running.answers[:] = [f"I look.</think>{said}"]
    verdict = Judge(**options(running.url)).verify(ROW, Response("The Rhine."), None)
    running.answers.clear()
    assert verdict.mask
    assert f"gave no grade from 1 to 5 in \\boxed{{}}: {said!r}" in str(verdict.error)


def completion(text: Any) -> str:
    return json.dumps({"choices": [{"message": {"content": text}}]})


LIARS = {
    "no JSON": (saying("fine"), "not a chat completion"),
    "no choice": (saying('{"choices": []}'), "not a chat completion"),
    "no text": (saying(completion(None)), "not a chat completion"),
    "an error": (saying("busy", "503 Busy"), "answered with status 503: busy"),
    "silent": (silent, "took longer than 0.4 s"),
}


@pytest.mark.parametrize("name", LIARS)
def test_a_judge_that_fails_is_a_fault(name: str) -> None:
    answer, said = LIARS[name]
    with listening(answer) as url:
        verdict = Judge(f"{url}/v1", timeout_s=0.4).verify(ROW, Response("The Rhine."), None)
    assert verdict.mask
    assert said in str(verdict.error)


def test_a_judge_that_is_down_is_a_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    verdict = Judge(url, timeout_s=5).verify(ROW, Response("The Rhine."), None)
    assert "did not answer" in str(verdict.error)


def test_the_last_grade_counts_and_the_judge_reads_the_reference(tmp_path: Path) -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        asked.append(read_request(connection))
        saying(completion("\\boxed{1}, no: \\boxed{5}"))(connection)

    with listening(answer, reads=False) as url:
        verdict = Judge(url, timeout_s=20).verify(ROW, Response("The Rhine."), None)
    assert verdict.reward == 1
    body = b"".join(asked)
    assert b"the Rhine" in body
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    [row] = Judge(url, data=str(rows)).rows(1, 1, 0)
    assert row == ROW


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_url": "nowhere"}, "base_url = nowhere is not an address"),
        ({"prompt": "Grade it."}, "has no {generated_answer}"),
        ({"prompt": "{answer}"}, "cannot be filled in"),
        ({"timeout_s": 0}, "timeout_s = 0 must be a number above 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="environments: judge") as raised:
        find_environment("judge", options("http://127.0.0.1:9") | changes)
    assert said in str(raised.value)
