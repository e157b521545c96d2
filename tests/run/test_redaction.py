"""Secrets stay out of files; what only sounds like one stays in."""

import pytest

from nemotron.run.redaction import (
    HIDDEN,
    names_a_secret,
    redact,
    redact_arguments,
    redact_text,
)


@pytest.mark.parametrize(
    "name", ["token", "api_key", "WANDB_API_KEY", "client-secret", "Password", "Authorization"]
)
def test_names_of_secrets_are_known(name):
    assert names_a_secret(name)


@pytest.mark.parametrize(
    "name", ["num_tokens", "tokens", "tokenizer", "keyboard", "monkey", "secretary", "keep"]
)
def test_words_that_only_contain_one_are_not(name):
    assert not names_a_secret(name)


@pytest.mark.parametrize(
    "name", ["DB_PASS", "PGPASSWORD", "DBPASSWD", "GITHUB_PAT", "OPENAI_APIKEY", "AWS_CREDENTIALS"]
)
def test_other_names_of_secrets(name: str):
    assert names_a_secret(name)
    assert not names_a_secret("data.path")
    assert not names_a_secret("num_passes")


def test_numbers_are_never_secrets():
    config = {"model": {"pad_token_id": 0, "num_key_value_heads": 2}, "password": "hunter2"}
    assert redact(config) == config | {"password": HIDDEN}


def test_user_info_in_a_url_is_hidden():
    text = "from https://me:pass@host.example/data and s3://bucket/x"
    assert redact_text(text) == f"from https://{HIDDEN}@host.example/data and s3://bucket/x"


def test_values_of_secret_environment_variables_are_hidden_everywhere(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-0123456789")
    monkeypatch.setenv("HOME_PAGE", "canary")
    nested = {"argv": ["x", "--note=canary-0123456789"], "text": "canary stays"}
    assert redact(nested) == {"argv": ["x", f"--note={HIDDEN}"], "text": "canary stays"}


def test_a_command_line_keeps_its_options_but_not_their_secrets():
    arguments = ["train", "x.yaml", "--api-key", "abc", "password=p", "schedule.peak=3e-4"]
    assert redact_arguments(arguments) == [
        "train",
        "x.yaml",
        "--api-key",
        HIDDEN,
        f"password={HIDDEN}",
        "schedule.peak=3e-4",
    ]
