"""Explain why a folder has no usable weights: variants, shards without an index, interrupted downloads."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
"""Name endings of files that hf, curl scripts, browsers and aria2 are still writing, or never finished."""
FOREIGN = (".msgpack", ".h5", ".onnx", ".gguf", ".ckpt", ".pkl", ".npz")
"""Name endings of weights in formats that are not supported."""
HUB_CACHE = Path(".cache") / "huggingface" / "download"
"""Where `hf download --local-dir` keeps unfinished files, relative to that folder."""


def interrupted(folder: Path) -> str:
    """Return what to do about unfinished downloads into a folder; empty if there are none."""
    files = [file for file in _files(folder) if file.name.endswith(UNFINISHED)]
    for above in (folder, *folder.parents[:2]):
        files += sorted((above / HUB_CACHE).glob("**/*.incomplete"))
    if not files:
        return ""
    names = ", ".join(str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in files[:3])
    return f"A download was interrupted ({names}): run the same download again to finish it."


def other_weights(folder: Path, stems: Sequence[str]) -> str:
    """Return what the folder holds instead of the usual weights, and what to do; empty if nothing is recognised."""
    return interrupted(folder) or _shards(folder, stems) or _variant(folder, stems) or _foreign(folder)


def _variant(folder: Path, stems: Sequence[str]) -> str:
    """Return what to do about files such as diffusion_pytorch_model.fp16.safetensors or an index of such shards."""
    stem = "|".join(map(re.escape, stems))
    single = re.compile(rf"({stem})\.(\w+)\.(safetensors|bin)(\.index\.json)?")
    index = re.compile(rf"({stem})\.(safetensors|bin)\.index\.(\w+)\.json")
    usual_names: dict[str, str] = {}
    for file in _files(folder):
        if match := single.fullmatch(file.name):
            usual_names[file.name] = f"{match[1]}.{match[3]}{match[4] or ''}"
        elif match := index.fullmatch(file.name):
            usual_names[file.name] = f"{match[1]}.{match[2]}.index.json"
    if not usual_names:
        return ""
    old, new = next(iter(usual_names.items()))
    command = shlex.join(["mv", str(folder / old), str(folder / new)])
    what = "a variant" if len(usual_names) == 1 else "variants"
    names = ", ".join(usual_names)
    return f"The folder holds {what}, {names}. Download the usual files, or use the variant instead: {command}"


def _shards(folder: Path, stems: Sequence[str]) -> str:
    """Return what to do about shards such as diffusion_pytorch_model-00001-of-00003.safetensors without their index."""
    names = "|".join(map(re.escape, stems))
    part = re.compile(rf"({names})(?:\.\w+)?-(\d+)-of-(\d+)(?:\.\w+)?\.(safetensors|bin)")
    matches = [match for file in _files(folder) if (match := part.fullmatch(file.name))]
    if not matches or any(file.name.endswith(".json") and ".index." in file.name for file in _files(folder)):
        return ""
    count = max(int(match[3]) for match in matches)
    there = {int(match[2]) for match in matches}
    missing = [str(number) for number in range(1, count + 1) if number not in there]
    index = f"{matches[0][1]}.{matches[0][4]}.index.json"
    also = f" and the shards {', '.join(missing)}" if missing else ""
    return f"The folder holds {len(there)} of {count} shards, without their index. Download {index}{also}."


def _foreign(folder: Path) -> str:
    names = [file.name for file in _files(folder) if file.suffix in FOREIGN]
    if not names:
        return ""
    return f"{', '.join(names[:3])} cannot be read; convert or download the weights as .safetensors."


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
