"""Environments over HTTP: the same verdicts as here, and servers that are down, slow or lying."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow, Response, Row, build_row
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.environments.remote import HttpEnv
from nemotron.posttrain.environments.serve import serve_env
from nemotron.posttrain.environments.wire import read_response, write_response
from nemotron.posttrain.verify import Verifiers
from tests.support.listening import listening, saying
from tests.support.verdicts import calls

CHAIN = build_row("arith_chain", "3+4=", expected_answer="7")


@pytest.mark.parametrize("name", ["arith_chain", "if_constraints", "mcqa", "text_to_sql"])
def test_verdicts_over_http_are_those_of_the_environment(name: str):
    environment = find_environment(name)
    with serve_env(environment) as server:
        remote = HttpEnv("theirs", server.url)
        for place, row in enumerate(environment.rows(4, 1, 1)):
            right = row.get("expected_query") or f"\\boxed{{{row.get('expected_answer')}}}"
            response = Response(right if place % 2 else "no", reasoning="Let me see.")
            state = remote.seed(row)
            assert remote.verify(row, response, state) == environment.verify(row, response, None)


def test_a_conversation_with_tools_over_http_is_that_of_the_environment():
    environment = find_environment("tool_calc_db")
    with serve_env(environment) as server:
        remote = HttpEnv("theirs", server.url)
        rows = list(environment.rows(6, 1, 4))
        states = [(environment.seed(row), remote.seed(row)) for row in rows]
        assert len({state["cookies"]["session"] for _, state in states}) == len(rows)
        for row, (here, there) in zip(rows, states, strict=True):
            assert remote.tools(row) == environment.tools(row)
            made = [("find_orders", {"text": "a"}), ("cancel_event", {"id": 99})]
            made += [(call["name"], call["arguments"]) for call in row["ground_truth"]]
            for name, arguments in made:
                said = environment.call(here, name, arguments)
                assert remote.call(there, name, arguments) == said
            response = calls(*made, text=f"\\boxed{{{row.get('expected_answer')}}}")
            assert json.loads(json.dumps(there)) == there
            verdict = remote.verify(row, response, there)
            assert verdict == environment.verify(row, response, here)
            assert verdict.reward == 1


def test_a_pool_of_processes_verifies_over_http():
    with (
        serve_env(find_environment("arith_chain")) as server,
        Verifiers(1, {"theirs": {"url": server.url}}) as verifiers,
    ):
        row = {**CHAIN, "agent_ref": {"name": "theirs"}}
        state = HttpEnv("theirs", server.url).seed(row)
        answers = [Response("7"), Response("8")]
        verdicts = verifiers.verify([row] * 2, answers, [state] * 2, 20)
        assert [verdict.reward for verdict in verdicts] == [1, 0]


def post(url: str, path: str, body: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("POST", path, body, headers or {})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def test_a_server_answers_as_gym_does():
    with serve_env(find_environment("arith_chain")) as server:
        response = write_response(Response("7", "Think."))
        status, found = post(
            server.url, "/verify", json.dumps({**CHAIN, "response": response, "_ng_task_index": 5})
        )
        assert status == 200
        assert found["reward"] == 1
        assert found["mask_sample"] is False
        assert found["_ng_task_index"] == 5
        assert found["response"] == response
        assert post(server.url, "/seed_session", json.dumps(CHAIN)) == (200, {})
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/reverify_mode")
        assert json.loads(connection.getresponse().read()) == "stateless"
        connection.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/verify", "{", 422, "the body is not JSON"),
        ("/verify", "[]", 422, "the body is not a JSON object"),
        ("/verify", json.dumps(CHAIN), 422, "response.output is not a list"),
        ("/seed_session", "{}", 422, "expected_answer is absent"),
        ("/calculate", "{}", 400, "there is no such session"),
    ],
)
def test_a_wrong_request_is_answered_with_a_sentence(path: str, body: str, status: int, said: str):
    with serve_env(find_environment("arith_chain")) as server:
        found = post(server.url, path, body)
        assert found[0] == status
        assert said in found[1]["detail"]
        assert post(server.url, path, body, {"Cookie": "session=forged"})[0] == status


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("if_constraints", {"kwargs": ["b"]}),
        ("if_constraints", {"instruction_id_list": [{}]}),
        ("tool_calc_db", {"ground_truth": 7}),
        ("tool_calc_db", {"ground_truth": [{"name": [], "arguments": {}}]}),
        ("tool_calc_db", {"tables": {"email": 7}}),
        ("text_to_sql", {"expected_query": {}}),
        ("text_to_sql", {"databases": [{"t": {"columns": {"a": "TEXT"}, "rows": 7}}]}),
        ("text_to_sql", {"databases": [{"t": {"columns": {"a": "TEXT"}, "rows": [7]}}]}),
    ],
)
def test_a_row_of_other_types_is_refused(name: str, changes: dict[str, Any]):
    environment = find_environment(name)
    row = next(iter(environment.rows(1, 1, 0.0)))
    environment.check(row)
    with pytest.raises(BadRow):
        environment.check({**row, **changes})


def test_parts_of_other_types_have_no_text():
    for content in (7, 1.5, {"text": "a"}, [7, {"text": "b"}]):
        found = read_response({"output": [{"type": "message", "content": content}]})
        assert found.text == ("b" if isinstance(content, list) else "")


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x", "\xb2"])
def test_a_length_that_is_none_is_refused(length: str):
    with serve_env(find_environment("arith_chain")) as server:
        found = post(server.url, "/seed_session", "", {"Content-Length": length})
        assert found[0] == 422
        assert "Content-Length" in found[1]["detail"]


def test_an_address_that_is_taken_is_refused():
    with (
        serve_env(find_environment("mcqa")) as server,
        pytest.raises(UserError, match="cannot be listened on: Address already in use"),
    ):
        serve_env(find_environment("mcqa"), port=int(server.url.rsplit(":", 1)[1]))


def drip(connection: socket.socket) -> None:
    """Send a header that never ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(100):
        connection.sendall(b"X: y\r\n")
        time.sleep(0.05)


def drip_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.05)


def cut(connection: socket.socket) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"reward"')


BAD_SERVERS: list[tuple[str, Callable[[socket.socket], None], str]] = [
    ("silent", lambda connection: time.sleep(1), "took longer than 0.4 s"),
    ("dripping headers", drip, "took longer than 0.4 s"),
    ("dripping body", drip_body, "took longer than 0.4 s"),
    ("closing", lambda connection: None, "did not answer"),
    ("cut off", cut, "broke off in the middle"),
    ("no HTTP", lambda connection: connection.sendall(b"hello\r\n\r\n"), "did not answer"),
    ("status 500", saying("broken", "500 Oops"), "answered with status 500: broken"),
    ("redirect", saying("", "302 Found"), "answered with status 302"),
    ("no JSON", saying("fine"), "answered with what is not JSON"),
    ("deep JSON", saying("[" * 100_000), "answered with what is not JSON"),
    ("a list", saying("[1]"), "verdict is not a JSON object"),
    ("no reward", saying("{}"), "gave reward = None"),
    ("NaN", saying('{"reward": NaN}'), "gave reward = nan"),
    ("infinity", saying('{"reward": 1e999}'), "gave reward = inf"),
    ("a huge reward", saying(f'{{"reward": {10**400}}}'), "gave reward = 1000"),
    ("a text", saying('{"reward": "1"}'), "gave reward = '1'"),
    ("true", saying('{"reward": true}'), "gave reward = True"),
    ("bad parts", saying('{"reward": 1, "reward_components": {"a": "b"}}'), "not numbers"),
    ("bad parts", saying('{"reward": 1, "reward_components": [1]}'), "not numbers"),
    ("masked", saying('{"reward": 0, "mask_sample": true, "failure_reason": "lost"}'), "lost"),
]


@pytest.mark.parametrize(("kind", "answer", "said"), BAD_SERVERS, ids=[b[0] for b in BAD_SERVERS])
def test_a_server_that_fails_masks_the_sample_and_is_named(
    kind: str, answer: Callable[[socket.socket], None], said: str
):
    with listening(answer) as url:
        remote = HttpEnv("theirs", url, timeout_s=0.4)
        verdict = remote.verify(CHAIN, Response("7"), {"cookies": {}, "error": None})
    assert verdict.mask
    assert said in str(verdict.error)
    assert verdict.reward == 0


def test_a_server_that_is_down_masks_every_sample():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    remote = HttpEnv("theirs", url, timeout_s=1)
    state = remote.seed(CHAIN)
    assert "Connection refused" in state["error"]
    assert remote.call(state, "calculate", {}) == "error: the tool did not answer"
    verdict = remote.verify(CHAIN, Response("7"), state)
    assert verdict.mask
    assert str(verdict.error).startswith(f"the server {url}/")


def test_a_sample_without_a_mask_keeps_its_reward_whatever_reason_is_given():
    body = '{"reward": 0.5, "mask_sample": false, "failure_reason": "slow", "extracted_answer": 3}'
    with listening(saying(body)) as url:
        verdict = HttpEnv("theirs", url).verify(CHAIN, Response("7"), None)
    assert (verdict.reward, verdict.mask, verdict.error) == (0.5, False, None)


def test_responses_keep_their_meaning_in_openais_form():
    for response in (
        Response("7", "Think."),
        Response("7", is_truncated=True),
        calls(("find", {"a": 1}), text="done"),
    ):
        found = read_response(json.loads(json.dumps(write_response(response))))
        assert (found.text, found.reasoning, found.is_truncated) == (
            response.text,
            response.reasoning,
            response.is_truncated,
        )
        again = write_response(found)
        assert again["output"] == write_response(response)["output"]


def test_rows_of_a_file_come_in_an_order_of_the_seed(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**CHAIN, "_ng_task_index": n}) + "\n" for n in range(5)))
    remote = HttpEnv("theirs", "http://127.0.0.1:1", data=str(path))

    def order(seed: int) -> list[int]:
        return [row["_ng_task_index"] for row in remote.rows(12, seed, 0)]

    assert order(1) == order(1)
    assert sorted(order(1)[:5]) == sorted(order(1)[5:10]) == list(range(5))
    assert len({tuple(order(seed)) for seed in range(5)}) > 1
    assert {row["agent_ref"]["name"] for row in remote.rows(3, 1, 0)} == {"theirs"}


def test_wrong_settings_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="url = localhost:80 is not an address"):
        HttpEnv("theirs", "localhost:80")
    with pytest.raises(UserError, match="data is absent"):
        next(HttpEnv("theirs", "http://x").rows(1, 0, 0))
    params = '{"responses_create_params": '
    for content, said in (
        *(("{", "cannot be read: line 1"), ("", "has no rows"), ("[]", "line 1: it is not a JSON")),
        ("[" * 5000, "line 1: it is nested too deep"),
        (f'{params}{{"input": "a"}}}}\n{params}[1]}}', "line 2: .*input is absent"),
        (params + '{"input": [{"role": 7, "content": ""}]}}', "input.0.role is not a text"),
        (params + '{"input": "\\ud800"}}', "line 1: .*surrogates not allowed"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(UserError, match=said):
            next(HttpEnv("t", "http://x", data=str(tmp_path / "rows.jsonl")).rows(1, 0, 0))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("t", {"url": "http://[::1"}, "is not an address"),
        ("t", {"url": "http://h:99999"}, "is not an address"),
        ("t", {"url": 7}, "is not an address"),
        ("t", {"url": "http://h", "timeout_s": -1}, "timeout_s = -1 must be a number above 0"),
        ("t", {"url": "http://h", "timeout_s": "1"}, "timeout_s = 1 must be a number above 0"),
        ("t", {"url": "http://h", "data": 7}, "data = 7 must be the path"),
        ("t", {"url": "http://h", "more": 7}, "more is not an option; it has url, timeout_s, data"),
        ("mcqa", {"more": 7}, "more is not an option; it has data"),
        ("long_context", {"tokenizer": 7}, "tokenizer = 7 is not a path"),
        ("code_exec", {"sandbox": 7}, "sandbox"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, object], said: str):
    with pytest.raises(UserError, match=said):
        find_environment(name, options)


def test_a_row_may_hold_the_letters_at_which_python_splits_lines(tmp_path: Path):
    text = "a\u2028b\x85c"
    row = {"responses_create_params": {"input": text}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    found = next(HttpEnv("t", "http://x", data=str(tmp_path / "rows.jsonl")).rows(1, 0, 0))
    assert found["responses_create_params"]["input"] == text


def test_rows_of_gym_load_and_verify():
    """Rows in the form that NVIDIA-NeMo/Gym documents for its servers."""
    prompt = {"input": [{"role": "user", "content": "?"}], "tools": []}
    rows: list[tuple[str, Row, str]] = [
        (
            "if_constraints",
            {
                "instruction_id_list": [
                    "detectable_format:title",
                    "length_constraints:number_words",
                ],
                "prompt": "?",
                "kwargs": [None, {"num_words": 204, "relation": "less than"}],
            },
            "<<a title>> and a text",
        ),
        (
            "mcqa",
            {"options": [{"A": "1"}, {"B": "2"}], "expected_answer": "B", "uuid": "x"},
            "\\boxed{B}",
        ),
    ]
    for name, fields, answer in rows:
        environment, row = find_environment(name), {"responses_create_params": prompt, **fields}
        environment.check(row)
        assert environment.verify(row, Response(answer), None).reward == 1
