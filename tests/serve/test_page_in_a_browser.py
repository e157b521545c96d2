"""The chat page as a person uses it, in a real browser without a window."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron.generate.speculate import Speculation
from tests.support.serving import KEY, Running, Start

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ANSWER = "I think.\n</think>\nHello <b>you</b> & me.<|im_end|>"
LONG = "Count.\n</think>\n" + "".join(f"{number} " for number in range(900)) + "<|im_end|>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, NAMES)), driver.chromium.executable_path)
        if not os.path.exists(path):
            pytest.skip("Chromium is missing; python -m playwright install chromium gets one")
        # the sandbox of Chromium refuses to be root
        words = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=words)
        yield browser
        browser.close()


class Visitor:
    """A page of the server, what it sent, and what went wrong in it."""

    def __init__(self, page: Any, running: Running) -> None:
        self.page, self.running = page, running
        self.sent: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.places: set[str] = set()
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._hear)
        page.goto(running.url)

    def _note(self, request: Any) -> None:
        self.places.add(request.url.removeprefix(self.running.url))
        if request.method == "POST":
            self.sent.append(json.loads(request.post_data))

    def _hear(self, line: Any) -> None:
        if line.type in ("error", "warning"):
            self.faults.append(line.text)

    def ask(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def wait_for_end(self) -> None:
        self.page.wait_for_selector("#send:visible", timeout=30_000)

    @property
    def answer(self) -> str:
        return self.page.locator("article.assistant > div").last.inner_text()


@pytest.fixture
def visitor(browser: Any, running: Running) -> Iterator[Visitor]:
    page = browser.new_page()
    visitor = Visitor(page, running)
    playwright.expect(page.locator("h1")).to_have_text("tiny")
    yield visitor
    running.answers.clear()
    page.close()
    assert visitor.faults == []
    # nothing comes from elsewhere
    assert visitor.places <= {"/", "/v1/models", "/v1/chat/completions", "data:,"}


def test_an_answer_arrives_with_its_reasoning_folded(visitor: Visitor):
    visitor.running.answers.append(ANSWER)
    visitor.ask("Who is <i>there</i>?")
    visitor.wait_for_end()
    page = visitor.page
    assert not page.locator("#key-label").is_visible()
    assert page.locator("article.user").inner_text() == "Who is <i>there</i>?"
    assert visitor.answer == "Hello <b>you</b> & me."
    fold = page.locator("article.assistant details")
    assert fold.get_attribute("open") is None
    assert not fold.locator("div").is_visible()
    fold.locator("summary").click()
    playwright.expect(fold.locator("div")).to_be_visible()
    assert fold.locator("div").inner_text() == "I think."
    tokens, rate = re.fullmatch(
        r"(\d+) tokens, ([\d.]+) tokens/s", page.locator("#speed").inner_text()
    ).groups()  # type: ignore[union-attr]
    assert int(tokens) > 10
    assert float(rate) > 0
    # the next question has the first with its answer before it
    visitor.ask("And now?")
    visitor.wait_for_end()
    roles = [message["role"] for message in visitor.sent[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert visitor.sent[-1]["messages"][1]["content"] == "Hello <b>you</b> & me."
    page.click("#new")
    assert page.locator("article").count() == 0
    visitor.ask("Again?")
    visitor.wait_for_end()
    assert len(visitor.sent[-1]["messages"]) == 1


def test_guesses_are_shown_beside_the_speed(browser: Any, start: Start):
    page = browser.new_page()
    running = start(speculation=Speculation(source="lookup", adaptive=False))
    visitor = Visitor(page, running)
    running.answers.append("</think>" + "one two three " * 20 + "<|im_end|>")
    visitor.ask("Count.")
    visitor.wait_for_end()
    shown = page.locator("#speed").inner_text()
    share, guesses = re.search(r", (\d+) % of (\d+) guesses right$", shown).groups()  # type: ignore[union-attr]
    assert int(guesses) > 0
    assert 0 < int(share) <= 100
    assert not visitor.faults
    page.close()


WATCH = """() => {
  window.lengths = [];
  const log = document.getElementById("log"), stop = document.getElementById("stop");
  const look = () => {
    const length = log.querySelector("article.assistant")?.textContent.length ?? 0;
    window.lengths.push(length);
    if (length > 200 && !window.isStopped) {
      window.isStopped = true;
      stop.click();
    }
  };
  new MutationObserver(look).observe(log, {subtree: true, childList: true, characterData: true});
}"""
"""Notes how long the answer is at each change, and stops it, as a user would, while it grows."""


def test_an_answer_is_shown_while_it_grows_and_can_be_stopped(visitor: Visitor):
    visitor.running.answers.append(LONG)
    visitor.page.evaluate(WATCH)
    visitor.ask("Count")
    visitor.page.wait_for_function("() => window.isStopped")
    visitor.wait_for_end()
    lengths = visitor.page.evaluate("() => window.lengths")
    assert len(set(lengths)) > 5
    shown = visitor.answer
    assert shown.startswith("0 1 2 3")
    assert len(shown) < 2500, "it was not stopped"
    visitor.running.wait_until_empty()
    # what was shown is part of the conversation
    visitor.running.answers[:] = [ANSWER]
    visitor.ask("Go on")
    visitor.wait_for_end()
    assert visitor.sent[-1]["messages"][1]["content"].strip() == shown.strip()
    assert visitor.answer == "Hello <b>you</b> & me."


def test_the_slider_bounds_the_reasoning(visitor: Visitor):
    page = visitor.page
    shown = page.locator("#budget-value")
    playwright.expect(shown).to_have_text("no limit")
    page.fill("#tokens", "8")
    page.focus("#budget")
    page.keyboard.press("Home")
    playwright.expect(shown).to_have_text("0")
    visitor.ask("Hello")
    visitor.wait_for_end()
    assert visitor.sent[-1]["reasoning_budget"] == 0
    assert not page.locator("article.assistant details").last.is_visible()
    page.focus("#budget")
    page.keyboard.press("ArrowRight")
    playwright.expect(shown).to_have_text("16")
    page.keyboard.press("End")
    page.uncheck("#thinks")
    visitor.ask("Hello")
    visitor.wait_for_end()
    assert "reasoning_budget" not in visitor.sent[-1]
    assert visitor.sent[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_refusal_is_a_sentence_and_gives_the_question_back(visitor: Visitor):
    visitor.page.fill("#tokens", "5000")
    visitor.ask("Hello")
    visitor.wait_for_end()
    visitor.faults.clear()  # the browser notes the status 400
    said = visitor.page.locator("article.error").last.inner_text()
    assert "the model takes 2000 together" in said
    assert visitor.page.input_value("#text") == "Hello"
    visitor.page.fill("#tokens", "5")
    visitor.page.click("#send")
    visitor.wait_for_end()
    assert [message["content"] for message in visitor.sent[-1]["messages"]] == ["Hello"]


def test_a_key_is_asked_for(browser: Any, start: Start):
    locked = start(KEY)
    locked.answers.append(ANSWER)
    page = browser.new_page()
    visitor = Visitor(page, locked)
    playwright.expect(page.locator("#key-label")).to_be_visible()
    assert "API key" in page.locator("#speed").inner_text()
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    playwright.expect(page.locator("h1")).to_have_text("tiny")
    visitor.ask("Hello")
    visitor.wait_for_end()
    assert visitor.answer == "Hello <b>you</b> & me."
    page.close()
