"""Where a CLIP's files are, and how they are read: tensors only, with errors that say what to do.

Nothing that is loaded can run code: weights are safetensors, or PyTorch files read with weights_only.
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
"""What of a hub repository is its processor, without weights, as arguments of `hf download`."""
TIMM_NAME = re.compile(r"vit_\w+_clip_\w+\.\w+")
"""Names of timm's repositories with a whole CLIP for open_clip, such as vit_large_patch14_clip_224.openai."""
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin")
"""What of such a repository is the CLIP; model.safetensors and pytorch_model.bin there are its image half alone."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
LOCAL_FOLDERS = ("checkpoints", "ckpts", "data", "downloads", "models", "pretrained", "weights")


@dataclass(frozen=True)
class Source:
    """Where a scorer's files are to be found, and what an error about them says."""

    scorer: str
    option: str
    """The scorer's option that named the place."""
    place: str
    """A local folder or file, or a hub name owner/name."""
    published: str
    """The hub name of what is published, to download if the place is a local one."""
    download: tuple[str, ...] = ()
    """Further arguments of `hf download`: file names or patterns."""

    @property
    def path(self) -> Path:
        """The place as a local path, which need not exist."""
        return Path(self.place).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether the place is a local path and not a hub name; what exists is local.

        models/PickScore_v1 has the form of a hub name. It counts as a path if the folder before the slash exists or
        has a usual name for downloads, or if the name after it is that of the published model.
        """
        if self.path.exists() or not HUB_NAME.fullmatch(self.place):
            return True
        if self.place == self.published:
            return False
        owner, name = self.place.split("/")
        return self.path.parent.is_dir() or owner.lower() in LOCAL_FOLDERS or name == self.published.split("/")[-1]

    @property
    def where(self) -> str:
        """The place as transformers takes it."""
        return str(self.path) if self.is_local else self.place

    def has(self, *names: str) -> bool:
        """Whether the place is a local folder with all these files."""
        return all((self.path / name).is_file() for name in names)

    def missing(self, what: str, reason: object) -> UsageError:
        """Return the error for something that is not there: says how to download it and which option to give."""
        name, folder = (self.published, self.place) if self.is_local else (self.place, self.place.split("/")[-1])
        folder, files = folder or self.published.split("/")[-1], self.download
        if TIMM_NAME.fullmatch(self.path.name):
            name, files = f"timm/{self.path.name}", OPEN_CLIP_FILES
        command = shlex.join(["hf", "download", name, *files, "--local-dir", folder])
        return UsageError(
            f"scorer {self.scorer!r}: no {what} at {self.option}={self.place!r} ({_first_line(reason)}). "
            f"Download it with: {command}; and give the option {self.option}={folder}"
        )

    def wrong(self, problem: str) -> UsageError:
        """Return the error for something that is there and cannot be used."""
        return UsageError(f"scorer {self.scorer!r}: {self.option}={self.place!r}: {problem}")

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Turn what goes wrong inside into a UsageError: not there, unreadable, or more than tensors."""
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
        except Exception as error:  # of many types, for a file may be damaged in many ways
            if re.search(r"Unsupported (global|class|operand)", str(error)):
                reason = f"the {what} holds more than tensors, and loading that could run code; wanted .safetensors"
                raise self.wrong(reason) from None
            if "TorchScript" in str(error):
                reason = f"the {what} are a TorchScript program, which is not run; expected a state dict of tensors"
                raise self.wrong(reason) from None
            raise self.wrong(f"cannot read the {what} ({_first_line(error)}); download it again") from error


def load_tensors(source: Source, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors or PyTorch file by name, on the CPU, those under "state_dict" if there is
    one.

    A PyTorch file is read with weights_only. Raises UsageError if it is damaged or holds something else.
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
            raise source.wrong(f"{path.name} is no dict of tensors by name, as a state dict is")
        return loaded


def refuse_differences(
    source: Source,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise UsageError that names the tensors, unless there are none; misshapen is name -> (found, wanted) shape."""
    shapes = [f"{name} is {list(found)}, wanted {list(wanted)}" for name, (found, wanted) in misshapen.items()]
    kinds = {"missing": missing, "not of this model": unexpected, "of another shape": shapes}
    problems = [f"{len(names)} {kind}: {_some(sorted(names))}" for kind, names in kinds.items() if names]
    if problems:
        raise source.wrong(f"the weights are not those of the architecture wanted; {'; '.join(problems)}")


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(reason: object) -> str:
    # torch's first lines advise to load the file without weights_only; what is wrong with it comes after.
    lines = str(reason).split("WeightsUnpickler error: ")[-1].strip().splitlines()
    return lines[0][:200] if lines else type(reason).__name__
