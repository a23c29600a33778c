"""Wrong, missing and damaged released folders and full disks: every problem is named, and nothing is lost."""

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint_copies as copies
import jax
import jax.numpy as jnp
import pytest
import torch
from golden_data import first_case

from udm_grpo.files import atomic
from udm_grpo.released.weights import ReleasedModel, Scheduler, WeightsError, load_folder, new_checkpoint, save_folder

CODEBOOK = "scheduler/scheduler_model.pth"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copies.copy_checkpoint(tmp_path / "released")


@pytest.fixture(scope="module")
def released() -> ReleasedModel:
    return load_folder(first_case().checkpoint)


def problems_of(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_folder(folder)
    return str(caught.value)


def edit_json(file: Path, **values: Any) -> None:
    """Set values; None removes a key."""
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_all_that_is_wrong_with_tensors_comes_in_one_error(folder: Path):
    def spoil_transformer(state: copies.State) -> None:
        del state["model.norm.weight"]
        state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3, 4)
        state["lm_head.weight"] = state["lm_head.weight"].T.contiguous()

    def spoil_vae(state: copies.State) -> None:
        state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"].to(torch.int32)
        del state["quant_conv.bias"]

    head = copies.read_state(folder / "transformer")["lm_head.weight"].shape
    copies.change(folder, "transformer", spoil_transformer)
    copies.change(folder, "vae", spoil_vae)
    torch.save({"path.emb": torch.zeros(5, 4), "other": torch.zeros(1)}, folder / CODEBOOK)
    message = problems_of(folder)
    for line in (
        "7 problem(s)",
        f"missing: model.norm.weight, shape ({head[1]},)",
        "not known: model.layers.9.mlp.up_proj.weight, shape (3, 4)",
        f"wrong shape: lm_head.weight is ({head[1]}, {head[0]}), expected ({head[0]}, {head[1]})",
        "wrong dtype: decoder.conv_out.bias is I32, expected one of",
        "missing: quant_conv.bias",
        f"wrong shape: path.emb is (5, 4), expected ({head[0]}, 4)",
        "not known: other",
    ):
        assert line in message
    assert str(folder / "transformer") in message
    assert str(folder / "vae") in message


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated safetensors": ("vae/diffusion_pytorch_model.safetensors", truncate, "truncated or damaged.*Download"),
    "empty safetensors": (
        "transformer/diffusion_pytorch_model.safetensors",
        lambda file: file.write_bytes(b""),
        "truncated or damaged, 0 bytes",
    ),
    "a Git LFS pointer": (
        "vae/diffusion_pytorch_model.safetensors",
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"),
        "git lfs pull",
    ),
    "no weights": ("vae/diffusion_pytorch_model.safetensors", Path.unlink, "no weights; expected"),
    "truncated pth": (CODEBOOK, truncate, "truncated or damaged.*Download"),
    "garbage pth": (CODEBOOK, lambda file: file.write_bytes(b"garbage" * 50), "truncated or damaged"),
    "empty pth": (CODEBOOK, lambda file: file.write_bytes(b""), "truncated or damaged, 0 bytes"),
    "no pth": (CODEBOOK, Path.unlink, "no such file"),
    "no tensors in pth": (CODEBOOK, lambda file: torch.save({"path.emb": "text"}, file), "expected a dict of tensors"),
    "a list in pth": (CODEBOOK, lambda file: torch.save([1, 2], file), "expected a dict of tensors"),
    "no path.emb": (CODEBOOK, lambda file: torch.save({}, file), "missing: path.emb"),
    "flat path.emb": (CODEBOOK, lambda file: torch.save({"path.emb": torch.zeros(6)}, file), r"path.emb is \(6,\)"),
    "whole numbers": (
        CODEBOOK,
        lambda file: torch.save({"path.emb": torch.zeros(6, 4, dtype=torch.int64)}, file),
        "path.emb is int64",
    ),
    "no config": ("transformer/config.json", Path.unlink, "cannot be read"),
    "cut config": ("vae/config.json", truncate, "is not JSON"),
    "a list for a config": ("vae/config.json", lambda file: file.write_text("[]"), "holds a list"),
    "no tokenizer": ("tokenizer/tokenizer.json", lambda file: shutil.rmtree(file.parent), "the tokenizer is missing"),
    "no tokenizer files": (
        "tokenizer/tokenizer.json",
        lambda file: [path.unlink() for path in file.parent.iterdir()],
        "no tokenizer.json",
    ),
    "cut tokenizer": ("tokenizer/tokenizer.json", truncate, "is not a tokenizer that can be read"),
    "wrong sum": ("transformer/config.json", lambda file: edit_json(file, vocab_size=99), "vocab_size is 99"),
    "no bov": ("transformer/config.json", lambda file: edit_json(file, bov_token_id=None), "lacks bov_token_id"),
    "text for a size": (
        "transformer/config.json",
        lambda file: edit_json(file, hidden_size="64"),
        "hidden_size is '64'",
    ),
    "infinite size": (
        "transformer/config.json",
        lambda file: edit_json(file, rope_theta=float("inf")),
        "rope_theta is",
    ),
    "foreign bov": ("transformer/config.json", lambda file: edit_json(file, bov_token_id=9999), "9999 is not one of"),
    "other code count": ("vae/config.json", lambda file: edit_json(file, num_vq_embeddings=7), "number of codes"),
    "unknown quantizer": (
        "vae/config.json",
        lambda file: edit_json(file, _quantizer_name="X"),
        "_quantizer_name is 'X'",
    ),
    "a video model": (
        "vae/config.json",
        lambda file: edit_json(file, _class_name="AutoencoderVQCosmos3D", _quantizer_name="FSQuantizer", patch_size=4),
        r"1 problem\(s\):\n  vae/config.json: AutoencoderVQCosmos3D is the tokenizer of a video model; only image",
    ),
    "frames in a token": ("vae/config.json", lambda file: edit_json(file, temporal_stride=4), "of a video model"),
    "negative alpha": ("scheduler/scheduler_config.json", lambda file: edit_json(file, alpha=-1), "alpha is -1"),
    "a huge c": ("scheduler/scheduler_config.json", lambda file: edit_json(file, c=10**400), "c is 1000"),
    "text for a shift": ("scheduler/scheduler_config.json", lambda file: edit_json(file, shift="1"), "shift is '1'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(damage: str, folder: Path):
    name, spoil, message = DAMAGES[damage]
    spoil(folder / name)
    with pytest.raises(WeightsError, match=message) as caught:
        load_folder(folder)
    assert Path(name).parts[0] in str(caught.value)


def test_a_tokenizer_of_another_model_is_named(folder: Path):
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    edit_json(file, lm_vocab_size=config["lm_vocab_size"] + 3, vocab_size=config["vocab_size"] + 3)
    words = config["lm_vocab_size"]
    assert f"the tokenizer has {words} ids, transformer/config.json says lm_vocab_size {words + 3}" in problems_of(
        folder
    )


def test_a_tokenizer_without_padding_is_named(folder: Path):
    edit_json(folder / "tokenizer" / "tokenizer_config.json", pad_token=None)
    (folder / "tokenizer" / "special_tokens_map.json").unlink()
    assert "no pad token" in problems_of(folder)


def test_no_folder(tmp_path: Path):
    assert "no such folder" in problems_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "problem(s)" in problems_of(tmp_path / "empty")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_folder(first_case().checkpoint, dtype="int8")


def test_shards_and_index_have_to_fit(folder: Path):
    copies.shard(folder)
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shards = sorted(set(whole["weight_map"].values()))
    moved = next(name for name, shard in whole["weight_map"].items() if shard == shards[0])
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {moved: shards[1]}}))
    assert f"does not fit its shards: {moved} in {shards[1]}" in problems_of(folder)
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {moved: "../elsewhere.safetensors"}}))
    assert "1 missing file(s): ../elsewhere.safetensors" in problems_of(folder)
    index.write_text(json.dumps({}))
    assert "no weight_map" in problems_of(folder)
    index.write_text(json.dumps(whole))
    (folder / "vae" / shards[2]).unlink()
    assert f"1 missing file(s): {shards[2]}" in problems_of(folder)


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return Path.touch, (Path("ran.txt"),)


def test_nothing_in_a_pth_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"path.emb": Payload()}, folder / CODEBOOK)
    assert "loading that could run code" in problems_of(folder)
    assert not (tmp_path / "ran.txt").exists()


def test_weights_that_do_not_fit_are_not_saved(released: ReleasedModel, tmp_path: Path):
    params = dict(released.transformer)
    width = released.transformer_config.hidden_size
    params["norm"] = {"scale": jnp.zeros(width + 1)}
    params["extra"] = {"scale": jnp.zeros(2)}
    del params["lm_head"]
    with pytest.raises(WeightsError) as caught:
        save_folder(dataclasses.replace(released, transformer=params), tmp_path / "export")
    message = str(caught.value)
    assert "missing: lm_head/kernel" in message
    assert "not known: extra/scale" in message
    assert f"wrong shape: norm/scale is ({width + 1},), expected ({width},)" in message
    assert not list(tmp_path.iterdir())


def test_values_beyond_the_dtype_are_not_saved(released: ReleasedModel, tmp_path: Path):
    large = jax.tree.map(lambda leaf: leaf * 1e6, released.transformer)
    with pytest.raises(WeightsError, match=r"too large for float16; save with dtype=.float32"):
        save_folder(dataclasses.replace(released, transformer=large), tmp_path / "export", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk() -> Iterator[Callable[[], None]]:
    """Return a function after whose call this process cannot write more than 300 kB into a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "over an older export"])
def test_a_full_disk_leaves_what_was_there(existing: bool, folder: Path, small_disk: Callable[[], None]):
    export = folder.parent / "export"
    released = load_folder(folder)
    if existing:
        save_folder(released, export)
        before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    changed = dataclasses.replace(released, vq=jax.tree.map(jnp.zeros_like, released.vq))
    small_disk()
    with pytest.raises(OSError, match=r"export cannot be written \(.*untouched; free some space"):
        save_folder(changed, export)
    assert sorted(path.name for path in folder.parent.iterdir()) == (["export"] if existing else []) + ["released"]
    if existing:
        assert {path: path.read_bytes() for path in export.rglob("*") if path.is_file()} == before


def test_a_failed_swap_brings_the_older_export_back(
    released: ReleasedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_folder(released, tmp_path / "export")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "exchange", lambda *_: False)  # as on NFS
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output error"):
            save_folder(released, tmp_path / "export")
    load_folder(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_a_kill_left_is_cleared_away(tmp_path: Path):
    (tmp_path / ".export.new" / "half").mkdir(parents=True)
    with atomic.replacing_folder(tmp_path / "export", "marker") as fresh:
        assert not list(fresh.iterdir())
        (fresh / "marker").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_that_a_kill_left_aside_comes_back(tmp_path: Path):
    """After a kill between the two renames, the older export still exists under its other name."""
    (tmp_path / ".export.old").mkdir()
    (tmp_path / ".export.old" / "marker").write_text("older")
    with pytest.raises(OSError, match="full"), atomic.replacing_folder(tmp_path / "export", "marker"):
        raise OSError("full")
    assert (tmp_path / "export" / "marker").read_text() == "older"


def test_other_folders_are_not_overwritten(released: ReleasedModel, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_folder(released, tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_folder(released, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_new_checkpoint_has_to_fit_together(released: ReleasedModel):
    config = dataclasses.replace(released.transformer_config, lm_vocab_size=5)
    with pytest.raises(WeightsError) as caught:
        new_checkpoint(
            config,
            released.transformer,
            released.vq_config,
            released.vq,
            released.path_codebook[1:],
            Scheduler(0.9, 3.0, 1e-5, 1.0),
            first_case().checkpoint / "tokenizer",
        )
    assert "ids, transformer/config.json says lm_vocab_size 5" in str(caught.value)
    assert "rows of path_codebook differ" in str(caught.value)
