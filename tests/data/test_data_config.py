import pytest
from pydantic import ValidationError

from nemotron.data.config import DataConfig, SourceConfig


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            [{"name": "web"}],
            "'web' has no path and is not an embedded domain; add the path of its shards",
        ),
        ([{"name": "code"}, {"name": "code", "path": "x"}], "names 'code' twice; give each"),
        ([], "at least 1 item"),
        ([{"name": "code", "weight": 0.0}], "greater than 0"),
        ([{"name": "code", "weight": float("nan")}], "finite"),
    ],
)
def test_sources_that_make_no_blend_are_refused(sources: list[dict[str, object]], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        DataConfig.model_validate({"sources": sources})


def test_a_source_of_ones_own_needs_only_a_name_and_a_path():
    config = DataConfig(sources=[SourceConfig(name="web", path="shards/web")])
    assert config.sources[0].weight == 1.0
