"""The pages that list faults or promises name tests that exist."""

import re

import pytest

from tests.support.pages import ROOT

PAGES = {
    "docs/strangers.md": 38,
    "docs/security.md": 16,
    "docs/generate.md": 19,
    "docs/serve.md": 16,
}
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@pytest.mark.parametrize("page", PAGES)
def test_every_number_has_a_test_and_every_test_exists(page: str):
    rows: dict[int, str] = {}
    for line in (ROOT / page).read_text().splitlines():
        if found := re.match(r"\| (\d+) \|", line):
            rows[int(found[1])] = line
    assert sorted(rows) == list(range(1, PAGES[page] + 1))
    for number, line in rows.items():
        tests = NAMED.findall(line)
        assert tests or "`tools/" in line, f"{page}: {number} names no test"
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
