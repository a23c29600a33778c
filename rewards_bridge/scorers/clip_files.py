"""Locate and read the files of a CLIP model: tensors only, with errors that say how to fix them.

Loading never runs code: weights are safetensors, or PyTorch files read with weights_only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from rewards_bridge.errors import UsageError
from rewards_bridge.surroundings import environment_advice

PROCESSOR_FILES = ("--include", "*.json", "--include", "merges.txt")
"""Arguments of `hf download` for the processor of a hub repository, without weights."""
TIMM_NAME = re.compile(r"vit_\w+_clip_\w+\.\w+")
"""Names of timm repositories with a complete CLIP for open_clip, such as vit_large_patch14_clip_224.openai."""
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin")
"""The files of the CLIP in such a repository; its model.safetensors and pytorch_model.bin are only the image half."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
LOCAL_FOLDERS = ("checkpoints", "ckpts", "data", "downloads", "models", "pretrained", "weights")


@dataclass(frozen=True)
class Source:
    """The location of a scorer's files, with what its error messages need."""

    scorer: str
    option: str
    """The scorer's option that set the place."""
    place: str
    """A local folder or file, or a hub name owner/name."""
    published: str
    """The hub name of the published files, to download if the place is local."""
    download: tuple[str, ...] = ()
    """More arguments of `hf download`: file names or patterns."""

    @property
    def path(self) -> Path:
        """The place as a local path, which need not exist."""
        return Path(self.place).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether the place is a local path rather than a hub name; existing paths are local.

        models/PickScore_v1 has the form of a hub name. It counts as a path if the folder before the slash exists or
        has a common name for downloads, or if the name after the slash is that of the published model.
        """
        if self.path.exists() or not HUB_NAME.fullmatch(self.place):
            return True
        if self.place == self.published:
            return False
        owner, name = self.place.split("/")
        return self.path.parent.is_dir() or owner.lower() in LOCAL_FOLDERS or name == self.published.split("/")[-1]

    @property
    def where(self) -> str:
        """The place in the form that transformers expects."""
        return str(self.path) if self.is_local else self.place

    def has(self, *names: str) -> bool:
        """Return whether the place is a local folder with all these files."""
        return all((self.path / name).is_file() for name in names)

    def missing(self, what: str, reason: object) -> UsageError:
        """Return the error for something that is missing; it says how to download it and which option to set."""
        name, folder = (self.published, self.place) if self.is_local else (self.place, self.place.split("/")[-1])
        folder, files = folder or self.published.split("/")[-1], self.download
        if TIMM_NAME.fullmatch(self.path.name):
            name, files = f"timm/{self.path.name}", OPEN_CLIP_FILES
        command = shlex.join(["hf", "download", name, *files, "--local-dir", folder])
        return UsageError(
            f"scorer {self.scorer!r}: no {what} at {self.option}={self.place!r} ({_first_line(reason)}). "
            f"Download it with: {command}; and set the option {self.option}={folder}"
        )

    def wrong(self, problem: str) -> UsageError:
        """Return the error for something that exists but cannot be used."""
        return UsageError(f"scorer {self.scorer!r}: {self.option}={self.place!r}: {problem}")

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Convert errors of the block into UsageErrors: missing, unreadable, or more than tensors."""
        try:
            if self.is_local and not self.path.exists():
                raise FileNotFoundError("no such file or folder")
            yield
        except UsageError:
            raise
        except OSError as error:
            if advice := environment_advice(error):
                raise self.wrong(f"the {what} cannot be loaded: {advice}") from error
            raise self.missing(what, error) from error
        except Exception as error:  # of many types, because files can be damaged in many ways
            if re.search(r"Unsupported (global|class|operand)", str(error)):
                reason = f"the {what} contain more than tensors, which could run code; expected .safetensors"
                raise self.wrong(reason) from None
            if "TorchScript" in str(error):
                reason = f"the {what} are a TorchScript program, which is not run; expected a state dict of tensors"
                raise self.wrong(reason) from None
            raise self.wrong(f"cannot read the {what} ({_first_line(error)}); download it again") from error


def load_tensors(source: Source, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors or PyTorch file by name, on the CPU.

    A PyTorch file is read with weights_only, and "state_dict" in it is unwrapped. Raises UsageError if the file is
    damaged or contains something else.
    """
    with source.reading(f"weights {path.name}"):
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        if isinstance(loaded, dict) and "state_dict" in loaded:
            loaded = loaded["state_dict"]
        if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
            raise source.wrong(f"{path.name} is not a state dict (a dict of tensors by name)")
        return loaded


def refuse_differences(
    source: Source,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise UsageError that names these tensors, if there are any; misshapen is name -> (actual, expected) shape."""
    shapes = [f"{name} is {list(actual)}, expected {list(expected)}" for name, (actual, expected) in misshapen.items()]
    kinds = {"missing": missing, "not of this model": unexpected, "of another shape": shapes}
    problems = [f"{len(names)} {kind}: {_some(sorted(names))}" for kind, names in kinds.items() if names]
    if problems:
        raise source.wrong(f"the weights do not fit the architecture; {'; '.join(problems)}")


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(reason: object) -> str:
    # The first lines of torch's message advise loading without weights_only; the actual problem comes after them.
    lines = str(reason).split("WeightsUnpickler error: ")[-1].strip().splitlines()
    return lines[0][:200] if lines else type(reason).__name__
