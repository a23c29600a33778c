"""Addresses instead of local paths: every field and flag supports or refuses them, and no folder is ever created."""

import argparse
import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest

from configs import shapes
from rewards_bridge.scorers import ocr_models
from scripts import compile_table, demo, prepare_prompts, pretrain_shapes
from udm_grpo import convert, evaluate, pretrain, report, sample, train
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.compile_check import compile_only
from udm_grpo.config import ConfigError, ScorerConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.files.buckets import local, local_prompts
from udm_grpo.files.places import SUPPORTED_FIELDS, PlaceError, check_flags, expand_config, problem, scheme
from udm_grpo.pipeline import load_pipeline

ASSETS = Path(train.__file__).parent / "assets"
ADDRESSES = (
    "gs://bucket/some/where",
    "s3://bucket/some/where",
    "https://example.org/x",
    "hf://org/name",
    "gs:/bucket/x",
)


@pytest.fixture
def gcsfs(monkeypatch):
    """Pretend that gcsfs is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("os" if name == "gcsfs" else name))


def text_fields(section, prefix=""):
    """Yield (dotted name, the object that has the field, its name) of every field that holds a text."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from text_fields(value, f"{name}.")
        elif isinstance(value, str):
            yield name, section, field.name
        elif name == "rewards.scorers":
            yield from text_fields(value["shapes"], f"{name}.shapes.")


FIELDS = [name for name, _, _ in text_fields(shapes.get_config("smoke"))]


def test_the_fields_of_a_config_are_found():
    assert set(SUPPORTED_FIELDS) < set(FIELDS)
    assert {"rewards.scorers.shapes.token_file", "rewards.scorers.shapes.interpreter"} < set(FIELDS)


@pytest.mark.usefixtures("gcsfs")
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("field", [name for name in FIELDS if name != "distributed.coordinator"])
def test_every_field_of_a_config_takes_an_address_or_refuses_it(field, address):
    config = shapes.get_config("smoke")
    section, name = next(entry[1:] for entry in text_fields(config) if entry[0] == field)
    setattr(section, name, address)
    if field in SUPPORTED_FIELDS and address.startswith("gs://"):
        validate(config)
        return
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("gs://bucket/some/where", "gcsfuse --implicit-dirs bucket /mnt/bucket) and give /mnt/bucket/some/where"),
        ("s3://bucket/x", "mount-s3 bucket /mnt/bucket"),
        ("hf://org/name", "hf download org/name --local-dir"),
        ("https://example.org/x", "curl -fLO https://example.org/x"),
        ("oci://b/x", "give the local path"),
    ],
)
def test_a_refusal_says_what_to_do(address, advice):
    assert advice in problem("model.transformer", address)


def test_what_is_no_address():
    for text in ("", "outputs/run", "/mnt/x", "C:/x", "data/geneval:train", "v5p:2x2x4", "node-0:8476", Path("x:y")):
        assert scheme(text) == ""
        assert problem("x", text) == ""


PATHS = [name for name in FIELDS if not name.startswith("distributed.")]


def test_a_tilde_is_the_home_folder_in_every_field(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--config=configs/shapes.py:smoke", "--config.output_dir=~/run", "--config.prompts.train=~/x:train"]
    config = parse([*words, "--config.rewards.scorers.shapes.options.detector=~/d.pth"])
    assert (config.output_dir, config.prompts.train) == ("/home/me/run", "/home/me/x:train")
    assert config.rewards.scorers["shapes"].options["detector"] == "/home/me/d.pth"
    for field in PATHS:
        config = shapes.get_config("smoke")
        section, name = next(entry[1:] for entry in text_fields(config) if entry[0] == field)
        setattr(section, name, "~/x")
        with pytest.raises(ConfigError, match="give the path in full"):
            validate(config)
        expand_config(config)
        section, name = next(entry[1:] for entry in text_fields(config) if entry[0] == field)
        assert getattr(section, name) == "/home/me/x", field


def test_a_tilde_is_the_home_folder_for_every_reader(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(ASSETS / "ursa-shapes")
    assert local("~/x") == tmp_path / "x"
    assert local_prompts("~/x:train") == f"{tmp_path}/x:train"
    assert str(Checkpoints("~/run", keep=1).folder) == f"{tmp_path}/run"
    load_pipeline("~/base")
    args = argparse.Namespace(output=Path("~/o"), runs=["~/a", "b"], prompt=["~"], option=["s.model=~/m", "k=v~"])
    check_flags(args)
    assert (args.output, args.runs) == (tmp_path / "o", [f"{tmp_path}/a", "b"])
    assert (args.prompt, args.option) == (["~"], [f"s.model={tmp_path}/m", "k=v~"])


def test_a_tilde_without_a_home_folder_is_refused():
    with pytest.raises(ConfigError, match=r"output_dir is '~nobody.here/x', but there is no home folder for that"):
        parse(["--config=configs/shapes.py:smoke", "--config.output_dir=~nobody.here/x"])
    with pytest.raises(PlaceError, match=r"--output is '~nobody.here', .*or ./~nobody.here for a folder of that name"):
        check_flags(argparse.Namespace(output="~nobody.here"))
    check_flags(argparse.Namespace(output="~weird name"))


def test_options_of_scorers_are_looked_at_too():
    config = shapes.get_config("smoke")
    options = {"detector": "gs://bucket/detector.pth", "endpoint": "http://judge:8000/v1"}
    config.rewards.scorers["shapes"] = ScorerConfig(options=options, addresses=("unix:/tmp/x",))
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert "rewards.scorers.shapes.options.detector is 'gs://bucket/detector.pth'" in str(caught.value)
    assert "judge" not in str(caught.value)
    assert "unix" not in str(caught.value)


def test_an_address_in_a_bucket_needs_a_path_and_a_package(gcsfs, monkeypatch):
    assert "written gs://BUCKET/PATH" in problem("output_dir", "gs://bucket", True)
    assert problem("output_dir", "gs://bucket/run", True) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in problem("output_dir", "gs://bucket/run", True)


@pytest.mark.usefixtures("gcsfs")
@pytest.mark.parametrize("letter", ["[", "]", "*", "?", "\\"])
def test_an_address_in_a_bucket_has_no_letters_of_patterns(letter):
    address = f"gs://bucket/runs/lr={letter}1e-4/a"
    for field in SUPPORTED_FIELDS:
        config = shapes.get_config("smoke")
        section, name = next(entry[1:] for entry in text_fields(config) if entry[0] == field)
        setattr(section, name, address)
        with pytest.raises(ConfigError) as caught:
            validate(config)
        assert f"{field} is {address!r}, with {letter} in it" in str(caught.value)
        assert "mount the bucket" in str(caught.value)
    assert problem("output_dir", f"outputs/lr={letter}1e-4", True) == ""


HERE = {
    "--leave-out": "x",
    "--train": "x",
    "--checkpoint": "x",
    "--data": "x",
    "--output": "x",
    "--updates": "1",
    "--samples": "x",
    "--base": "x",
}
COMMANDS = {
    "sample": (sample.main, ["--prompt", "a dog"], ["--run", "--checkpoint", "--prompts", "--adapter", "--output"]),
    "evaluate": (evaluate.main, ["--scorer", "jpeg"], ["--samples", "--output", "--compare", "--config"]),
    "report": (report.main, ["run"], ["--output", ""]),
    "convert to-pytorch": (
        convert.main,
        [],
        ["--checkpoint", "--base", "--output", "--transformer-only", "--adapter"],
    ),
    "convert info": (convert.main, [], [""]),
    "pretrain": (pretrain.main, [], ["--checkpoint", "--data", "--output"]),
    "pretrain_shapes": (pretrain_shapes.main, [], ["--output"]),
    "compile_table": (compile_table.main, [], ["--output"]),
    "demo": (demo.main, [], ["--base", "--trained", "--run", "--auth-file", "--tls-cert", "--tls-key"]),
    "prepare_prompts ocr": (prepare_prompts.main, [], ["--train", "--test", "--output"]),
    "prepare_prompts generate-geneval": (prepare_prompts.main, [], ["--leave-out", "--jsonl", "--output"]),
    "ocr_models": (ocr_models.main, [], ["--output"]),
    "train": (train.main, [], ["--config"]),
    "compile_only": (compile_only.main, ["--config", "configs/shapes.py:smoke", "--compile-only"], ["--report"]),
}
NEEDED = {
    "sample": ["--checkpoint", "--output"],
    "evaluate": ["--samples", "--output"],
    "convert to-pytorch": ["--checkpoint", "--base", "--output"],
    "pretrain": ["--checkpoint", "--data", "--output", "--updates"],
    "demo": ["--base"],
    "prepare_prompts ocr": ["--train", "--output"],
    "prepare_prompts generate-geneval": ["--leave-out", "--output"],
}
INSTEAD = {"--run": "--checkpoint", "--transformer-only": "--output", "--adapter": "--output", "--prompts": "--prompt"}
"""Flag -> the flag that it excludes."""


@pytest.mark.parametrize("address", ["gs://bucket/some/where", "s3://bucket/some/where"])
@pytest.mark.parametrize(
    ("command", "flag"), [(name, flag) for name, (_, _, flags) in COMMANDS.items() for flag in flags]
)
def test_every_flag_takes_an_address_or_refuses_it(command, flag, address, tmp_path, monkeypatch, capsys):
    """gcsfs is hidden, so that the missing package is named where a bucket is supported."""
    main, words, _ = COMMANDS[command]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    monkeypatch.chdir(tmp_path)
    os.symlink(ASSETS.parent.parent / "configs", tmp_path / "configs")
    excluded = "" if (command, flag) == ("sample", "--adapter") else INSTEAD.get(flag, "")
    argv = command.split()[1:]
    argv += words if flag and excluded not in words else []
    argv += [word for name in NEEDED.get(command, []) if name not in (flag, excluded) for word in (name, HERE[name])]
    argv += [flag, address] if flag else [address]
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    said = " ".join(capsys.readouterr().err.split())
    assert address in said
    assert "gcsfuse" in said or "mount-s3" in said or "needs the package gcsfs" in said, said
    assert [entry.name for entry in tmp_path.iterdir()] == ["configs"]


def test_texts_are_no_paths():
    check_flags(
        argparse.Namespace(prompt=["http://x is on a sign"], address=["a=unix:/x"], option=["vlm.url=http://x"])
    )
    with pytest.raises(PlaceError, match="--option is 'gs://b/x'"):
        check_flags(argparse.Namespace(option=["geneval.detector=gs://b/x"]))


@pytest.mark.parametrize("field", ["output_dir", "model.path", "prompts.train"])
def test_training_refuses_before_anything_is_made(field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(ASSETS.parent.parent / "configs" / "shapes.py:smoke")
    assert train.main(["--config", config, f"--config.{field}=s3://bucket/x"]) == 2
    assert f"{field} is 's3://bucket/x'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_notebook_neither_reads_nor_writes_where_no_path_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlaceError, match="hf download org/name"):
        load_pipeline("hf://org/name")
    loaded = load_pipeline(ASSETS / "ursa-shapes")
    for address in ("gs://bucket/model", Path("gs://bucket/model")):
        with pytest.raises(PlaceError, match="gcsfuse"):
            loaded.save(address)
    assert not list(tmp_path.iterdir())
