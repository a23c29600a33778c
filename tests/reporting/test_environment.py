"""environment.json: what a start records, what it redacts, and what it does with an older file."""

import json
import platform
import sys

import jax
import pytest

from udm_grpo.files.redaction import hide_logins, is_secret, without_secrets
from udm_grpo.reporting.environment import begin


def starts(folder) -> list[dict]:
    return json.loads((folder / "environment.json").read_text())["starts"]


def test_a_start_notes_versions_machine_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", "--config.rewards.scorers.a.environment.HF_TOKEN=abc"])
    begin(tmp_path, None)
    (start,) = starts(tmp_path)
    assert start["python"] == platform.python_version()
    assert start["versions"]["jax"] == jax.__version__
    assert set(start["versions"]) == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert start["devices"] == {"cpu: cpu": jax.device_count()}
    assert start["command"] == "python -m x --config.rewards.scorers.a.environment.HF_TOKEN=***"
    assert start["processors"] >= 1
    assert start["memory_bytes"] > 2**20
    assert start["after_step"] == 0


def test_a_resume_is_noted_beside_the_start_and_moves_nothing(tmp_path):
    begin(tmp_path, None)
    (tmp_path / "pictures").mkdir()
    begin(tmp_path, 40)
    assert [start["after_step"] for start in starts(tmp_path)] == [0, 40]
    assert (tmp_path / "pictures").exists()


def test_a_start_notes_its_run_and_where_a_branch_comes_from(tmp_path):
    begin(tmp_path, None, "a")
    begin(tmp_path, 8, "a")
    begin(tmp_path, None, "b", {"run": "a", "checkpoint": "one/checkpoints/00000008"})
    assert json.loads((tmp_path / "environment.json").read_text())["run"] == "b"
    (start,) = starts(tmp_path)
    assert start["origin"] == {"run": "a", "checkpoint": "one/checkpoints/00000008"}


def test_a_damaged_note_does_not_keep_a_run_from_going_on(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    with pytest.warns(UserWarning, match=r"environment\.json is damaged"):
        begin(tmp_path, 3)
    assert [start["after_step"] for start in starts(tmp_path)] == [3]


@pytest.mark.parametrize(
    "name", ["api_key", "x.options.apikey", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db.password", "key"]
)
def test_names_of_secrets(name):
    assert is_secret(name)
    assert without_secrets([f"--config.{name}=sesame"]) == [f"--config.{name}=***"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            ["--config.x.environment.HF_TOKEN", "sesame", "--config.seed=1"],
            "--config.x.environment.HF_TOKEN *** --config.seed=1",
        ),
        (["--config.x.environment={'A': '1', \"HF_TOKEN\": 'sesame'}"], "--config.x.environment=***"),
        (["--config.x.environment", "{'HF_TOKEN' : 'se=same'}"], "--config.x.environment ***"),
        (["--option", "vlm.api_key=sesame"], "--option vlm.api_key=***"),
        (["--config.x.environment={'A': 'token'}", "--flag"], "--config.x.environment={'A': 'token'} --flag"),
    ],
)
def test_secrets_are_hidden_however_a_command_line_sets_them(words, shown):
    assert " ".join(without_secrets(words)) == shown


@pytest.mark.parametrize(
    "name",
    [
        "token_file",
        "api_key_env",
        "prompts.prompt_key",
        "server.tls_key",
        "model.text_length",
        "tokens",
        "monkey",
        "seed",
    ],
)
def test_names_of_no_secrets(name):
    assert not is_secret(name)
    assert without_secrets([f"--config.{name}=3"]) == [f"--config.{name}=3"]


def test_logins_in_addresses_are_hidden():
    assert hide_logins("url=https://me:sesame@host:80/a https://host/b") == "url=https://***@host:80/a https://host/b"
