"""Copies of a golden released folder in other dtypes and file layouts, written and read with PyTorch's own tools."""

import json
import shutil
from pathlib import Path

import torch
from golden_data import first_case
from safetensors.torch import load_file, save_file

PARTS = ("transformer", "vae")
STEM = "diffusion_pytorch_model"

State = dict[str, torch.Tensor]


def copy_checkpoint(folder: Path) -> Path:
    """Return a writable copy of a golden released folder, with its tensors in float32 safetensors."""
    shutil.copytree(first_case().checkpoint, folder)
    for part in PARTS:
        state = {name: tensor.float() for name, tensor in read_state(folder / part).items()}
        for file in (folder / part).iterdir():
            if file.name != "config.json":
                file.unlink()
        save_file(state, file_of(folder, part), metadata={"format": "pt"})
    return folder


def file_of(folder: Path, part: str) -> Path:
    return folder / part / f"{STEM}.safetensors"


def read_state(folder: Path) -> State:
    """Return all tensors of a part's folder, however they are stored."""
    state: State = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            state |= load_file(file)
        elif file.suffix in (".bin", ".pth"):
            state |= torch.load(file, weights_only=True)
    return state


def change(folder: Path, part: str, edit) -> None:
    """Rewrite a part's tensors after `edit` has changed their dict in place."""
    state = load_file(file_of(folder, part))
    edit(state)
    save_file(state, file_of(folder, part), metadata={"format": "pt"})


def cast(folder: Path, dtype: torch.dtype) -> None:
    for part in PARTS:
        change(folder, part, lambda state: state.update({name: tensor.to(dtype) for name, tensor in state.items()}))


def cast_some(folder: Path) -> None:
    """Use every dtype of the format in one folder, and store the codebook in half precision."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def edit(state: State) -> None:
        state.update({name: state[name].to(dtypes[i % 3]) for i, name in enumerate(sorted(state))})

    for part in PARTS:
        change(folder, part, edit)
    codebook = folder / "scheduler" / "scheduler_model.pth"
    torch.save({"path.emb": torch.load(codebook, weights_only=True)["path.emb"].half()}, codebook)


def shard(folder: Path, ending: str = ".safetensors") -> None:
    """Spread each part over three files with an index, as diffusers does."""
    for part in PARTS:
        state = load_file(file_of(folder, part))
        file_of(folder, part).unlink()
        weight_map = {}
        for i in range(3):
            file = f"{STEM}-{i + 1:05d}-of-00003{ending}"
            members = {name: state[name] for name in sorted(state)[i::3]}
            weight_map |= dict.fromkeys(members, file)
            if ending == ".bin":
                torch.save(members, folder / part / file)
            else:
                save_file(members, folder / part / file, metadata={"format": "pt"})
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / part / f"{STEM}{ending}.index.json").write_text(json.dumps(index))


def as_bin(folder: Path, legacy: bool = False) -> None:
    """Store each part as a .bin file; with `legacy`, in the format of PyTorch before 1.6."""
    for part in PARTS:
        state = load_file(file_of(folder, part))
        file_of(folder, part).unlink()
        torch.save(state, folder / part / f"{STEM}.bin", _use_new_zipfile_serialization=not legacy)


def as_bfloat16_bin(folder: Path) -> None:
    cast(folder, torch.bfloat16)
    as_bin(folder)
