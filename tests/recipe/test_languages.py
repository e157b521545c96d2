"""Languages that scripts cannot part."""

import pytest

from nemotron.recipe.languages import _scripts


@pytest.mark.parametrize(
    ("languages", "said"),
    [
        (("en", "es"), "cannot part en from es, which share the script LATIN; use source."),
        (("yue", "ja"), "cannot part yue from ja, which share the script CJK; use source."),
        (("yue", "low"), "cannot say which tokens are low; use source, or one of zh, yue"),
    ],
)
def test_languages_of_one_script_need_their_sources(languages: tuple[str, ...], said: str) -> None:
    [finding] = list(_scripts(languages))
    assert finding.key == "data.language_of"
    assert said in finding.rule
    assert not list(_scripts(("yue", "en", "ru")))
