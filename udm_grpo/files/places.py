"""Tell local paths from addresses, and say what to do with an address where only a path works.

Some fields and flags take an address in a Google Cloud Storage bucket (gs://bucket/...; see buckets.py). Everything
else is a local path, and an address there is refused before anything is loaded: Python's own paths would create a
local folder named "gs:". A path that begins with ~ is below the home folder in every field and flag; a shell does not
expand the ~ of --config.output_dir=~/run.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards_bridge.errors import UserError
from rewards_bridge.flags import flag

BUCKET = "gs"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # pathlib turns gs://bucket into gs:/bucket
_HOW = {
    "gs": "mount the bucket (mkdir -p /mnt/{name} && gcsfuse --implicit-dirs {name} /mnt/{name}) and give "
    "/mnt/{name}/{rest}, or copy it (gcloud storage cp -r {address} .)",
    "s3": "mount the bucket (mkdir -p /mnt/{name} && mount-s3 {name} /mnt/{name}) and give /mnt/{name}/{rest}, or copy "
    "it (aws s3 cp --recursive {address} .)",
    "hf": "download it (hf download {name}/{rest} --local-dir FOLDER) and give that folder",
    "http": "download it (curl -fLO {address}) and give the file",
    "https": "download it (curl -fLO {address}) and give the file",
}
SUPPORTED_FIELDS = ("output_dir", "model.path", "prompts.train", "prompts.heldout", "checkpoint.resume")
"""Fields of a config that take an address in a bucket."""
_PATTERN_LETTERS = "*?[]\\"
"""Characters that an address in a bucket must not contain; a local path may."""
_HOME = re.compile(r"~[\w.-]*(/|$)")
_NO_PATHS = ("environment", "addresses", "coordinator")
"""Fields that hold no paths, whatever they look like (unix:/path is an address)."""
_TEXT_FLAGS = ("prompt", "metadata", "environment", "address", "ratio", "host", "listen")
"""Flags whose values are no paths."""

_POSITIONAL = ("a", "b", "path", "runs")
"""Arguments without a flag."""


class PlaceError(UserError, OSError):
    """An address that cannot be used where it was given; the message says what to do instead."""


def scheme(text: str | Path) -> str:
    """Return the scheme of an address in lower case (gs, s3, https, ...), "" for a local path."""
    match = _ADDRESS.match(str(text))
    return match[1].lower() if match else ""


def is_bucket(text: str | Path) -> bool:
    """Return whether a text is an address in a Google Cloud Storage bucket, gs://..."""
    return str(text).startswith(f"{BUCKET}://")


def problem(name: str, text: str | Path, supported: bool = False) -> str:
    """Return why `text` cannot be used for the field or flag `name`, with what to do; "" if it can.

    supported: whether an address in a bucket can be used there; that needs the package gcsfs.
    """
    match = _ADDRESS.match(str(text))
    if not match:
        return ""
    kind = match[1].lower()
    bucket, _, rest = match[2].partition("/")
    if kind == BUCKET and supported:
        if not is_bucket(text) or not bucket or not rest.strip("/"):
            return f"{name} is {str(text)!r}; an address in a bucket is written gs://BUCKET/PATH."
        if odd := sorted(set(_PATTERN_LETTERS) & set(match[2])):
            return (
                f"{name} is {str(text)!r}, with {' '.join(odd)} in it, which the storage libraries treat as a pattern: "
                "files would not be found again. Choose an address without these characters (gcloud storage mv renames "
                "what is there), or mount the bucket with gcsfuse and give the local path."
            )
        if importlib.util.find_spec("gcsfs") is None:
            return f'{name} is {str(text)!r}, which needs the package gcsfs: pip install "udm-grpo[gcs]" or gcsfs.'
        return ""
    address = f"{kind}://{match[2]}"
    how = _HOW.get(kind, "copy or mount it, and give the local path")
    advice = how.format(name=bucket or "BUCKET", rest=rest, address=address)
    expected = "a local path or an address in a bucket, gs://BUCKET/PATH" if supported else "a local path"
    return f"{name} is {address!r}, but must be {expected}; {advice}."


def with_home(name: str, text: str) -> str:
    """Return a path with its ~ or ~user replaced by the home folder.

    Raises PlaceError, naming the field or flag, where there is no such folder.
    """
    if not _HOME.match(text):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise PlaceError(
            f"{name} is {text!r}, but there is no home folder for that: HOME is not set, or there is no such user. "
            f"Give the path in full, or ./{text} for a folder of that name."
        )
    return path


def expand_config(section: Any, prefix: str = "") -> None:
    """Expand ~ in every path of a RunConfig, in place; raise PlaceError as `with_home` does."""

    def expanded(name: str, value: Any) -> Any:
        if isinstance(value, str):
            return with_home(name, value)
        if isinstance(value, tuple | list):
            return type(value)(expanded(name, part) for part in value)
        if isinstance(value, dict):
            return {key: expanded(f"{name}.{key}", part) for key, part in value.items()}
        if dataclasses.is_dataclass(value):
            expand_config(value, f"{name}.")
        return value

    for field in dataclasses.fields(section):
        if field.name not in _NO_PATHS:
            setattr(section, field.name, expanded(f"{prefix}{field.name}", getattr(section, field.name)))


def config_problems(config: Any) -> Iterator[str]:
    """Yield what is wrong with the addresses in all fields of a RunConfig."""
    for name, text in _texts("", dataclasses.asdict(config)):
        if any(part in _NO_PATHS for part in name.split(".")):
            continue
        if ".options." in name and scheme(text) in ("http", "https"):
            continue  # the endpoint of a vision-language judge
        message = problem(name, text, name in SUPPORTED_FIELDS)
        if not message and _HOME.match(text):
            message = f"{name} is {text!r}; give the path in full (expand_config expands the ~)."
        if message:
            yield message


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str | os.PathLike):
        yield name, os.fspath(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(name, part)


def local_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of a command that takes local paths only; an address is a usage error."""
    args = parser.parse_args(argv)
    try:
        check_flags(args)
    except PlaceError as error:
        parser.error(str(error))
    return args


def check_flags(args: argparse.Namespace, supported: Collection[str] = ()) -> None:
    """Expand ~ in every path; raise PlaceError for every flag that is an address instead of a local path.

    supported: names of flags that also take an address in a bucket.
    """
    for name, value in vars(args).items():
        if name not in _TEXT_FLAGS:
            setattr(args, name, _flag_with_home(_flag(name), value))
    problems = []
    for name, text in _texts("", vars(args)):
        shown = _flag(name)
        if name in _TEXT_FLAGS:
            continue
        left, equals, value = text.partition("=")
        if equals and not scheme(left):  # NAME.KEY=VALUE
            text = "" if scheme(value) in ("http", "https") else value
        problems.append(problem(shown, text, name in supported))
    if any(problems):
        raise PlaceError("\n  ".join(filter(None, problems)))


def _flag(name: str) -> str:
    return name.upper() if name in _POSITIONAL else flag(name)


def _flag_with_home(flag: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_flag_with_home(flag, part) for part in value]
    if isinstance(value, Path):
        return Path(with_home(flag, str(value))) if _HOME.match(str(value)) else value
    if not isinstance(value, str):
        return value
    left, equals, right = value.partition("=")  # NAME.KEY=VALUE
    return f"{left}={with_home(flag, right)}" if equals and _HOME.match(right) else with_home(flag, value)
