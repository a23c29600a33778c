"""Tests of scorers' secrets: no other user sees them, no output shows them, and no scorer gets those of others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bridge_helpers as helpers
import pytest

from rewards_bridge import options, redaction
from rewards_bridge.client import BridgeConfig, RewardsClient
from rewards_bridge.environment import allowed_environment, is_allowed
from rewards_bridge.errors import BridgeError, UsageError
from rewards_bridge.peer import examine
from rewards_bridge.scorers import load_scorer
from udm_grpo.config import RunConfig, ScorerConfig, as_dict
from udm_grpo.reporting.metrics import write_json
from udm_grpo.scoring.folder_scores import made_by

KEY = "sesame-open-4711"


def test_a_scorer_gets_its_key_unseen_and_tells_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "not-for-scorers")
    monkeypatch.setenv("JUDGE_ACCOUNT", "for-this-scorer")
    environment = {**helpers.ENVIRONMENT, "ACCOUNT": "$JUDGE_ACCOUNT"}
    config = helpers.config("Leaking", options={"api_key": KEY}, environment=environment, max_restarts=0)
    with RewardsClient(config) as client:
        said = json.loads(client.submit(*helpers.batch(0, 1)).result(20).reasons[0])
        assert said["key_length"] == len(KEY)  # it received the key
        assert said["key"] == "***"
        assert "WANDB_API_KEY" not in said["environment"]
        assert said["environment"]["ACCOUNT"] == "for-this-scorer"
        for process in helpers.children_of(os.getpid()):
            assert KEY not in Path(f"/proc/{process}/cmdline").read_text()
        with pytest.raises(BridgeError) as caught:
            client.submit(*helpers.batch(0, 1, fail=True)).result(20)
    assert "the judge refused ***" in str(caught.value)
    assert KEY not in str(caught.value)


def test_what_a_dead_scorer_printed_is_shown_without_its_key():
    config = helpers.config("Leaking", options={"api_key": KEY, "dies": "true"}, max_restarts=0)
    with pytest.raises(BridgeError, match=r"dying with \*\*\*") as caught:
        RewardsClient(config)
    assert KEY not in str(caught.value)
    ready, text = examine(config)
    assert not ready
    assert KEY not in text


@pytest.mark.parametrize("place", ["env", "file"])
def test_any_scorer_takes_its_secret_from_a_variable_or_file(tmp_path: Path, monkeypatch, place: str):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / "key").write_text(f"{KEY}\n")
    secret = {"api_key_env": "JUDGE_KEY"} if place == "env" else {"api_key_file": str(tmp_path / "key")}
    scorer = load_scorer("bridge_scorers:Leaking", secret)
    assert scorer._api_key == KEY
    assert redaction.redacted(f"say {KEY}") == "say ***"


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env names NO_SUCH_KEY, which is not set"),
        ({"api_key_file": "/no/such/file"}, "api_key_file: .*No such file"),
        ({"api_key": KEY, "api_key_file": "x"}, "api_key is set twice"),
        ({"url_env": "HOME", "api_key": KEY}, "unexpected keyword argument 'url_env'"),
        ({"retries": KEY, "api_key": KEY}, "option retries='sesame.* is not a valid int"),
    ],
)
def test_secrets_that_cannot_be_read_are_refused(secrets: dict, message: str):
    with pytest.raises(UsageError, match=message):
        load_scorer("bridge_scorers:WithSecrets", {"url": "x", **secrets})


def test_options_come_from_a_file(tmp_path: Path):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"quality": 90, "api_key": KEY}))
    assert options.read_file(str(file)) == {"quality": "90", "api_key": KEY}
    assert redaction.redacted(KEY) == "***"
    for text in ("{", "[1]", json.dumps({"a": [KEY]})):
        file.write_text(text)
        with pytest.raises(UsageError, match="options-file") as caught:
            options.read_file(str(file))
        assert KEY not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        options.read_file(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="the limit is"):
        options.as_line({"prompt": "x" * 60_000})


@pytest.mark.parametrize("name", ["PATH", "HOME", "LC_ALL", "CUDA_VISIBLE_DEVICES", "HF_HOME", "OMP_NUM_THREADS"])
def test_variables_that_scorers_get(name: str):
    assert is_allowed(name)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "UDM_GRPO_SECRET", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_VARIABLE"]
)
def test_variables_that_scorers_do_not_get(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "x")
    assert name not in allowed_environment({}, {})
    assert allowed_environment({name: f"${name}"}, {})[name] == "x"
    assert allowed_environment({}, {"api_key_env": name})[name] == "x"


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(UsageError, match=r"environment\.A is \$NO_SUCH_THING, but NO_SUCH_THING is not set"):
        allowed_environment({"A": "$NO_SUCH_THING"}, {})
    assert allowed_environment({"PRICE": "$5"}, {})["PRICE"] == "$5"


def test_texts_are_shown_without_secrets():
    odd = 'pass"word/4711'
    redaction.remember({"api_key": KEY, "token": "abc", "url": "https://me:opensesame@host/v1", "password": odd})
    text = f"key {KEY}, at https://me:opensesame@host/v1, opensesame, abc, {json.dumps(odd)}, pass%22word%2F4711"
    assert redaction.redacted(text) == 'key ***, at https://***@host/v1, ***, abc, "***", ***'
    redaction.remember({"API_TOKEN": "$JUDGE_TOKEN"}, {"JUDGE_TOKEN": "from-a-variable"})
    assert redaction.redacted("from-a-variable, $JUDGE_TOKEN") == "***, $JUDGE_TOKEN"
    nested = {"a": {"api_key": "abc", "list": [f"x{KEY}"], "pair": (KEY, 3)}, "api_key_env": "JUDGE_KEY"}
    shown = {"a": {"api_key": "***", "list": ["x***"], "pair": ("***", 3)}, "api_key_env": "JUDGE_KEY"}
    assert redaction.redacted_values(nested) == shown


def test_a_key_of_prompts_or_the_place_of_a_certificate_is_no_secret():
    redaction.remember_start({}, ["--config.prompts.prompt_key=caption", "--prompt-key=caption", "--tls-key=/etc/tls"])
    assert redaction.redacted("caption of /etc/tls") == "caption of /etc/tls"
    assert redaction.redacted_values({"prompt_key": "caption"}) == {"prompt_key": "caption"}


def test_no_file_of_a_run_has_the_key(tmp_path: Path):
    config = RunConfig()
    config.rewards.scorers["shapes"] = ScorerConfig(
        options={"api_key": KEY, "endpoint": f"https://me:{KEY}@host"}, environment={"JUDGE_TOKEN": KEY}
    )
    BridgeConfig(options=config.rewards.scorers["shapes"].options)  # as for a scorer that is started
    assert KEY not in json.dumps(made_by(config.rewards.scorers))
    write_json(tmp_path / "config.json", as_dict(config))
    assert KEY not in (tmp_path / "config.json").read_text()
    redaction.remember({"password": "123456"})
    write_json(tmp_path / "summary.json", {"said": f"401 for {KEY}, 123456", "score": 0.123456})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"said": "401 for ***, ***", "score": 0.123456}


def test_a_command_prints_logs_and_raises_without_secrets():
    code = (
        "import logging, os, sys; from rewards_bridge.redaction import guarded\n"
        "def main():\n"
        "    print('out', os.environ['JUDGE_KEY']); logging.warning('log %s', sys.argv[1])\n"
        "    raise ValueError(os.environ['JUDGE_KEY'])\n"
        "sys.exit(guarded(main))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--option=vlm.api_key=argument-4711"],
        env={**os.environ, "JUDGE_KEY": KEY, "PYTHONPATH": str(helpers.TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == "out ***\n"
    assert "WARNING:root:log --option=vlm.api_key=***" in done.stderr
    assert done.stderr.endswith("ValueError: ***\n")
