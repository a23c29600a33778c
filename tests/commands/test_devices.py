"""Terminals without UTF-8, JAX's variables, failing devices: commands work, or one line says what to change."""

import contextlib
import io
import os
import subprocess
import sys
import warnings

import jax
import pytest
from checkpoint_helpers import ROOT
from jax.errors import JaxRuntimeError

from rewards_bridge import doctor
from rewards_bridge.__main__ import main as bridge
from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.clip_files import Source
from rewards_bridge.surroundings import environment_advice
from scripts import demo, prepare_prompts, pretrain_shapes
from udm_grpo import convert, devices, evaluate, pretrain, report, sample, train
from udm_grpo import doctor as trainer_doctor
from udm_grpo.devices import DeviceError, check_devices, device_errors, prepare
from udm_grpo.lifecycle import run_needs


def test_a_terminal_that_is_not_utf_8_shows_every_text(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    prepare()
    print("caf\u00e9")
    print("\u5b57", file=sys.stderr, flush=True)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9\n"
    assert sys.stderr.buffer.getvalue() == b"\\u5b57\n"


COMMANDS = [train, sample, evaluate, convert, report, pretrain, prepare_prompts, pretrain_shapes, demo, trainer_doctor]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_prepares_its_surroundings(command, monkeypatch, capsys):
    monkeypatch.setattr(run_needs, "report", lambda words, environment: 0)
    jax.config.update("jax_enable_x64", True)
    try:
        with contextlib.suppress(SystemExit):
            command.main(["--config=configs/shapes.py:smoke"] if command is trainer_doctor else ["--help"])
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert "is not used: this command computes with False" in capsys.readouterr().err


def test_the_commands_of_the_bridge_show_every_text_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert bridge(["score", "--scorer", "jpeg", "--prompt", "x", "caf\u00e9.png"]) == 2
    sys.stderr.flush()
    assert b"cannot score caf\\xe9.png" in sys.stderr.buffer.getvalue()


@pytest.mark.parametrize(("name", "value"), [("jax_enable_x64", True), ("jax_random_seed_offset", 3)])
def test_settings_that_change_results_are_put_back_with_a_line(name, value, monkeypatch, capsys):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        prepare()
        assert getattr(jax.config, name) == before
    finally:
        jax.config.update(name, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {name.upper()}={value} is not used")
    prepare()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_for_compiled_programs_that_cannot_be_written_is_one_line(tmp_path, exists, monkeypatch, capsys):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    place = str(tmp_path) if exists else str(tmp_path / "file" / "cache")
    if exists:
        monkeypatch.setattr(devices.os, "access", lambda *_: False)
    jax.config.update("jax_compilation_cache_dir", place)
    try:
        with warnings.catch_warnings():
            prepare()
            warnings.warn("Error writing persistent compilation cache entry for 'x': no", stacklevel=1)
        assert jax.config.jax_compilation_cache_dir == (place if exists else None)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: JAX_COMPILATION_CACHE_DIR={place} cannot store compiled programs (")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "new"))
        monkeypatch.undo()
        prepare()
        assert (tmp_path / "new").is_dir()
        assert capsys.readouterr().err == ""
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_an_error_of_a_device_is_one_line(monkeypatch, capsys):
    def fail(text: str) -> None:
        with device_errors():
            raise JaxRuntimeError(text)

    with pytest.raises(DeviceError, match=r"too little memory \(RESOURCE_EXHAUSTED: 9 GiB\). Lower rollout"):
        fail("RESOURCE_EXHAUSTED: 9 GiB\nmany\nlines")
    monkeypatch.setattr(train, "train", lambda config: fail("INTERNAL: an illegal memory access\nmore"))
    assert train.main(["--config=configs/shapes.py:smoke"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a device failed (INTERNAL: an illegal memory access). If it happens again")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu': x\ny")])
def test_a_platform_that_is_not_there_is_named_with_its_variable(monkeypatch, error):
    def no_backend() -> None:
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(jax, "default_backend", no_backend)
    with pytest.raises(DeviceError) as caught:
        check_devices()
    text = str(caught.value)
    assert "(the environment has JAX_PLATFORMS=cuda, CUDA_VISIBLE_DEVICES='-1')" in text
    assert "unset JAX_PLATFORMS" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"])
def test_a_variable_that_jax_cannot_read_is_one_line(name):
    words = [sys.executable, "-m", "udm_grpo.convert", "--help"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {name: "banana"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: JAX cannot read {name} in the environment: ")
    assert "'banana'" in line or '"banana"' in line


def test_the_scorers_gpus_are_reserved_before_jax_looks_for_devices():
    """`train` reserves them first: once JAX has looked, it is too late to hide them."""
    names = train.train.__code__.co_names
    assert names.index("reserved") < names.index("check_devices")
    assert "default_backend" not in train.main.__code__.co_names


def test_a_run_says_so_and_not_more(tmp_path):
    """A real process reports a platform that is not installed in one line."""
    words = [sys.executable, "-m", "udm_grpo.train", "--config=configs/shapes.py:smoke"]
    environment = os.environ | {"JAX_PLATFORMS": "nonsense", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*words, f"--config.output_dir={tmp_path}/run"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "JAX_PLATFORMS=nonsense" in lines[0]
    assert "Traceback" not in done.stderr


def test_what_the_environment_keeps_from_working_is_not_called_missing(monkeypatch, capsys):
    def refuse(module: str) -> None:
        raise PermissionError(13, "Permission denied", "/.cache")

    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    assert bridge(["doctor", "--scorer", "jpeg"]) == 1
    said = capsys.readouterr().out
    assert "PIL is installed but cannot be imported (PermissionError: [Errno 13] Permission denied: '/.cache')" in said
    assert "under HOME (/), XDG_CACHE_HOME" in said
    assert "pip install" not in said


def test_advice_looks_at_what_an_error_came_from():
    error = RuntimeError("Could not import module")
    error.__cause__ = KeyError("getpwuid(): uid not found: 12345")
    assert "has no name; set USER and HOME" in environment_advice(error)
    assert "set HOME" in environment_advice(RuntimeError("Could not determine home directory."))
    assert environment_advice(OSError("owner/name does not appear to have a file")) == ""
    assert environment_advice(ValueError("x")) == ""


def test_a_folder_that_may_not_be_read_is_not_downloaded_again(tmp_path):
    source = Source("pickscore", "model", str(tmp_path), "yuvalkirstain/PickScore_v1")
    with pytest.raises(UsageError) as caught, source.reading("weights"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "config.json"))
    assert "Permission denied" in str(caught.value)
    assert "hf download" not in str(caught.value)


def test_devices_are_looked_for_without_a_word_where_all_is_well(capsys):
    check_devices()
    assert capsys.readouterr().err == ""
    assert devices.SETTINGS["jax_enable_x64"] is False
