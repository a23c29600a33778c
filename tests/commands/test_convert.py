"""Conversion between checkpoint formats: nothing is lost, and differences are found."""

import json
import shutil
from pathlib import Path

import checkpoint_copies as copies
import jax
import numpy as np
import pytest
import torch
from golden_data import GoldenCase, assert_close, first_case, golden_cases, golden_paths
from running import ONE_AVERAGED, train
from safetensors.numpy import load_file

from scripts.torch_reference import load_reference
from udm_grpo.checkpoints.checkpoint import Checkpoints, read_meta
from udm_grpo.convert import difference, main
from udm_grpo.released.weights import load_folder, load_transformer

SHAPES = Path(__file__).resolve().parents[2] / "udm_grpo" / "assets" / "ursa-shapes"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration with a moving average, whose export holds that average."""
    output = tmp_path_factory.mktemp("convert") / "run"
    done = train(output, *ONE_AVERAGED)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A writable copy of a golden folder."""
    return copies.copy_checkpoint(tmp_path / "golden")


def as_training(folder: Path, output: Path) -> Path:
    """Save a training checkpoint with the transformer of a released folder."""
    params = jax.tree.map(np.asarray, load_folder(folder).transformer)
    Checkpoints(output, keep=1).save(0, {"state": {"params": params}}, {})
    return output


def call(*words: object) -> int:
    return main([str(word) for word in words])


def equal(a: Path, b: Path, *words: object) -> bool:
    return call("verify", a, b, *words) == 0


def change_weight(folder: Path, by: float) -> None:
    copies.change(folder, "transformer", lambda state: state["model.norm.weight"].__setitem__(3, by))


def say(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that fails, and return its one line on stderr."""
    try:
        status = call(*words)
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_folder(dtype: torch.dtype, golden: Path, tmp_path: Path):
    copies.cast(golden, dtype)
    as_training(golden, tmp_path / "orbax")
    base = shutil.copytree(golden, tmp_path / "base")
    change_weight(base, 9.0)
    back = tmp_path / "back"
    assert call("to-pytorch", "--checkpoint", tmp_path / "orbax", "--base", base, "--output", back) == 0
    files = sorted(path.relative_to(golden) for path in golden.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(back) for path in back.rglob("*") if path.is_file())
    for file in files:
        if file.suffix != ".pth":  # torch writes ids into those
            assert (back / file).read_bytes() == (golden / file).read_bytes(), file
    assert equal(back, golden)
    assert equal(back, tmp_path / "orbax")
    assert not equal(back, base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_of_what_is_written(dtype: str, golden: Path, tmp_path: Path):
    original = copies.read_state(golden / "transformer")
    orbax, files = as_training(golden, tmp_path / "orbax"), ("--base", golden, "--dtype", dtype)
    assert call("to-pytorch", "--checkpoint", orbax, *files, "--output", tmp_path / "trained") == 0
    assert call("rewrite", *files, "--output", tmp_path / "rewritten") == 0
    assert call("to-pytorch", "--checkpoint", orbax, *files, "--transformer-only", tmp_path / "one.bin") == 0
    alone = torch.load(tmp_path / "one.bin", weights_only=True)
    for state in (copies.read_state(tmp_path / "trained/transformer"), alone):
        assert all(torch.equal(state[name], tensor.to(getattr(torch, dtype))) for name, tensor in original.items())
    assert equal(tmp_path / "trained", tmp_path / "rewritten")
    assert {tensor.dtype for tensor in copies.read_state(tmp_path / "rewritten" / "vae").values()} == {torch.float32}


def test_a_trained_checkpoint_is_its_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for weights in ("params", "ema"):
        words = ("--base", SHAPES, "--output", tmp_path / weights, "--weights", weights)
        assert call("to-pytorch", "--checkpoint", trained, *words) == 0
        assert equal(tmp_path / weights, trained / "checkpoints", "--weights", weights)
    for name in (WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "ema" / name).read_bytes() == (trained / "export" / name).read_bytes()
    assert (tmp_path / "params" / WEIGHTS).read_bytes() == (trained / "export_raw" / WEIGHTS).read_bytes()
    assert not equal(tmp_path / "params", trained / "export")
    capsys.readouterr()
    assert call("info", trained / "checkpoints" / "00000001", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["step"], info["ema"]) == ("training checkpoint", 1, True)
    assert {"state/params", "state/ema", "state/opt_state", "state/step", "reference"} == info["parts"].keys()
    assert info["parts"]["state/params"] == {"parameters": 857728, "dtypes": {"float32": 857728}}
    assert info["fingerprint"] == read_meta(trained / "checkpoints" / "00000001")["fingerprint"]
    assert info["bytes"] > 3 * 4 * 857728


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_transformer_alone(ending: str, golden: Path, tmp_path: Path):
    orbax, file = tmp_path / "orbax", tmp_path / "new" / f"transformer.{ending}"
    as_training(golden, orbax)
    assert call("to-pytorch", "--checkpoint", orbax, "--base", golden, "--transformer-only", file) == 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    released = load_folder(golden)
    transformer = load_transformer(file, released.transformer_config)
    jax.tree.map(np.testing.assert_array_equal, transformer, released.transformer)
    state = copies.load_file(file) if ending == "safetensors" else torch.load(file, weights_only=True)
    assert state.keys() == copies.read_state(golden / "transformer").keys()


def test_the_best_one(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    params = jax.tree.map(np.asarray, load_folder(golden).transformer)
    Checkpoints(tmp_path / "checkpoints", keep=1).save_best(7, {"params": params}, {"score": 0.5})
    assert equal(tmp_path / "checkpoints" / "best", golden)
    assert equal(golden, tmp_path / "checkpoints" / "best" / "1-step-7")
    words = ("--base", golden, "--output", tmp_path / "out", "--weights", "ema")
    text = say(capsys, "to-pytorch", "--checkpoint", tmp_path / "checkpoints" / "best", *words)
    assert "contains no ema: found params, expected state/ema/; use --weights params" in text


def test_info_of_a_released_folder(capsys: pytest.CaptureFixture[str]):
    assert call("info", SHAPES, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    tensors = load_file(SHAPES / WEIGHTS)
    count = sum(tensor.size for tensor in tensors.values())
    assert info["parts"]["transformer"] == {"parameters": count, "dtypes": {"float32": count}}
    assert info["scheduler"] == {"alpha": 0.9, "c": 15.0, "eps": 1e-5, "shift": 1.0}
    assert info["tokenizer"] == {"length": 10, "vocabulary": 28}
    assert info["transformer"]["hidden_size"] == 128
    assert info["vae"]["stride"] == 8
    assert info["files"][WEIGHTS] == (SHAPES / WEIGHTS).stat().st_size
    assert info["bytes"] == sum(path.stat().st_size for path in SHAPES.rglob("*") if path.is_file())
    assert call("info", SHAPES) == 0
    text = capsys.readouterr().out
    assert "  hidden_size: 128\n" in text
    assert f"    parameters: {count}" not in text.split("vae:")[0].split("transformer:")[0]
    assert f"parameters: {count}\n" in text


def test_info_counts_dtypes(golden: Path, capsys: pytest.CaptureFixture[str]):
    copies.cast_some(golden)
    assert call("info", golden, "--json") == 0
    part = json.loads(capsys.readouterr().out)["parts"]["transformer"]
    assert part["dtypes"].keys() == {"float32", "float16", "bfloat16"}
    assert sum(part["dtypes"].values()) == part["parameters"]


def test_verify_names_what_differs(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = shutil.copytree(golden, tmp_path / "other")
    before = float(copies.read_state(golden / "transformer")["model.norm.weight"][3])
    change_weight(other, before + 0.25)
    assert not equal(golden, other)
    out = capsys.readouterr().out
    assert "transformer: differs: model.norm.weight by 0.25" in out
    assert "vae: " in out
    assert "vae: differs" not in out
    assert equal(golden, other, "--tolerance", 0.26)
    assert not equal(golden, other, "--tolerance", 0.24)
    copies.change(other, "transformer", lambda state: state.update({"extra": state.pop("lm_head.weight")}))
    capsys.readouterr()
    assert not equal(golden, other, "--tolerance", 9)
    out = capsys.readouterr().out
    assert "missing in B: lm_head.weight (256, 64)" in out
    assert "only in B: extra (256, 64)" in out


def test_verify_of_another_model(capsys: pytest.CaptureFixture[str]):
    assert not equal(golden_paths()[0] / "checkpoint", SHAPES, "--forward", "--tolerance", 1e9)
    out = capsys.readouterr().out
    assert "wrong shape: lm_head.weight is (256, 64) in A, (256, 128) in B" in out
    assert "only in B: model.layers.3.mlp.up_proj.weight (256, 128)" in out
    assert "forward" not in out


def test_differences():
    one = np.array([1.0, -0.0, np.nan, np.inf, 4.0], np.float32)
    assert difference(one, one.copy()) is None
    assert difference(one[:2], np.array([1.0, 0.0], np.float32)) == (0.0, 0.0)
    assert difference(one[[0, 4]], np.array([1.5, 5.0], np.float32)) == (1.0, pytest.approx(1 / 3))
    assert difference(one, np.array([1.0, -0.0, 3.0, np.inf, 4.0], np.float32)) == (np.inf, np.inf)


@golden_cases()
def test_the_reference_computes_what_the_release_computes(case: GoldenCase):
    with torch.inference_mode():
        ids = (torch.from_numpy(np.array(case.arrays[name])) for name in ("prompt_ids", "image_ids"))
        logits = load_reference(case.checkpoint)(*ids).numpy()
    assert_close(logits, case.arrays["logits_image"])


def test_forward_agrees_on_the_shipped_checkpoint(capsys: pytest.CaptureFixture[str]):
    assert equal(SHAPES, SHAPES, "--forward")
    assert "forward: largest difference" in capsys.readouterr().out


def test_forward_finds_a_changed_weight(golden: Path, capsys: pytest.CaptureFixture[str]):
    change_weight(golden, 5.0)
    assert not equal(first_case().checkpoint, golden, "--forward", "--tolerance", 10)
    assert "expected a ratio of at most 0.0001" in capsys.readouterr().out


def test_errors(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    orbax, taken, free = tmp_path / "orbax", tmp_path / "taken", tmp_path / "free"
    as_training(golden, orbax)
    taken.mkdir()
    (taken / "transformer.bin").write_text("something")
    base = ("to-pytorch", "--checkpoint", orbax, "--base")
    cases = {
        "taken exists and is not empty": (*base, golden, "--output", taken),
        "taken exists": ("rewrite", "--base", golden, "--dtype", "float16", "--output", taken),
        "rewrite needs --transformer or --dtype": ("rewrite", "--base", golden, "--output", free),
        "invalid choice: 'int8'": ("rewrite", "--base", golden, "--dtype", "int8", "--output", free),
        "--adapter, which is always written in float32": (*base, golden, "--adapter", free, "--dtype", "float16"),
        "transformer.bin exists": (*base, golden, "--transformer-only", taken / "transformer.bin"),
        "a.onnx; expected a name that ends": (*base, golden, "--transformer-only", free / "a.onnx"),
        "is of another model than": (*base, SHAPES, "--output", free),
        "wrong shape: lm_head.weight is (256, 64), expected (256, 128)": (*base, SHAPES, "--output", free),
        "nowhere: no such folder": (*base, tmp_path / "nowhere", "--output", free),
        "nowhere does not exist; expected a run's": ("info", tmp_path / "nowhere"),
        "taken contains no complete checkpoint": ("info", taken),
        "is a released folder; expected": ("to-pytorch", "--checkpoint", SHAPES, "--base", SHAPES, "--output", free),
        "problem(s)": ("rewrite", "--base", orbax, "--dtype", "float16", "--output", free),
        "convert them with to-pytorch first": ("verify", golden, orbax, "--forward"),
        "one of the arguments --output --transformer-only --adapter is required": (*base, golden),
        "are required: COMMAND": (),
    }
    for text, words in cases.items():
        assert text in say(capsys, *words), text
    assert not free.exists()
    (golden / "transformer" / "config.json").write_text("{}")
    assert "config.json lacks hidden_size" in say(capsys, "info", golden)
    copies.file_of(golden, "vae").write_bytes(b"not tensors")
    assert "truncated or damaged" in say(capsys, "verify", golden, SHAPES)


def test_a_failing_reference_is_told(golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("udm_grpo.convert.REFERENCE", golden / "no_such_script.py")
    assert "no_such_script.py failed (" in say(capsys, "verify", golden, golden, "--forward")


@pytest.mark.parametrize("command", ["to-pytorch", "rewrite", "info", "verify"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        call(command, "--help")
    assert left.value.code == 0
    assert f"udm_grpo.convert {command}" in capsys.readouterr().out
