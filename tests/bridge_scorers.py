"""Correct and faulty scorers for the tests of the bridge; server processes load them as "bridge_scorers:Class"."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rewards_bridge.scorers.base import Scores


def _scores(score: np.ndarray, prompts: Sequence[str]) -> Scores:
    return Scores(np.array(score, np.float32), {"raw": np.array(score, np.float32)}, list(prompts))


class Echo:
    """Returns what it saw of each image: its first two bytes as a number, its mean, its prompt and its metadata."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        time.sleep(self.delay)
        number = images[:, 0, 0, 0] + 256.0 * images[:, 0, 0, 1]
        raw = {"mean": images.mean((1, 2, 3)), "number": np.array([item.get("number", -1) for item in metadata])}
        return Scores(number.astype(np.float32), raw, [f"seen: {prompt}" for prompt in prompts])


class Picky(Echo):
    """Accepts only prompts with an even number; raises for 13 in `problem` and for 26 in `note`."""

    def problem(self, prompt: str, metadata: dict) -> str:
        if metadata["number"] == 13:
            raise LookupError("thirteen")
        return f"{metadata['number']} is odd" if metadata["number"] % 2 else ""

    def note(self, prompt: str, metadata: dict) -> str:
        if metadata["number"] == 26:
            raise LookupError("twenty-six")
        return "divisible by four" if metadata["number"] % 4 == 0 else ""


class First:
    """Reads one byte per image, so that timings with it measure the bridge."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        return _scores(images[:, 0, 0, 0], prompts)


class Where:
    """Returns in its reasons in which process and environment it runs."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        process = {"pid": os.getpid(), "executable": sys.executable, "environment": dict(os.environ)}
        return Scores(np.zeros(len(prompts), np.float32), {}, [json.dumps(process)] * len(prompts))


class Gate(Echo):
    """Answers once a file exists."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = Path(gate)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        while not self.gate.exists():
            time.sleep(0.01)
        return super().score(images, prompts, metadata)


class Crash:
    """Ends its process at every batch whose metadata says "crash"; with a flag file, only at the first."""

    def __init__(self, flag: str = "", how: str = "exit") -> None:
        self.flag = Path(flag) if flag else None
        self.how = how

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        if any("crash" in item for item in metadata) and not (self.flag and self.flag.exists()):
            if self.flag:
                self.flag.touch()
            print("the card is on fire", file=sys.stderr, flush=True)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(7)
        return Echo().score(images, prompts, metadata)


class FailsToLoadAgain(Crash):
    """Crashes as Crash does; the next process cannot load, and all later ones can."""

    def __init__(self, folder: str) -> None:
        super().__init__(f"{folder}/crashed")
        if self.flag.exists() and not Path(f"{folder}/failed").exists():
            Path(f"{folder}/failed").touch()
            raise RuntimeError("the card's memory is not free yet")


class Hang:
    """Never answers a batch whose metadata says "hang"; with a flag file, only the first."""

    def __init__(self, flag: str = "") -> None:
        self.flag = Path(flag) if flag else None

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        if any("hang" in item for item in metadata) and not (self.flag and self.flag.exists()):
            if self.flag:
                self.flag.touch()
            time.sleep(1000)
        return Echo().score(images, prompts, metadata)


class WithChild(Hang):
    """Starts a child process and returns both process ids in its reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        super().score(images, prompts, metadata)
        pids = json.dumps([os.getpid(), self.child.pid])
        return Scores(np.zeros(len(prompts), np.float32), {}, [pids] * len(prompts))


class Raise:
    """Raises an error with a message of the requested length."""

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        return self._look_closely(prompts)

    def _look_closely(self, prompts: Sequence[str]) -> Scores:
        raise LookupError(f"the judge is confused by {prompts[0]!r}" + "é" * self.length + " at the end")


class Wrong:
    """Returns what the metadata of the first image asks for: nan, inf, raw nan, too few of something, no Scores."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        wish = metadata[0].get("wish", "")
        score = np.arange(len(prompts), dtype=np.float32)
        scores = _scores(score, prompts)
        if wish == "nan":
            scores.score[[1, 3]] = np.nan
        if wish == "inf":
            scores.score[0] = -np.inf
        if wish == "raw nan":
            scores.raw["raw"] = score * np.float32(np.nan)
        if wish == "too few":
            scores = Scores(score[1:], {}, list(prompts))
        if wish == "raw too few":
            scores.raw["raw"] = score[:-1]
        if wish == "too few reasons":
            scores.reasons.pop()
        if wish == "too few details":
            scores.details.append("{}")
        if wish == "no Scores":
            return score.tolist()
        return scores


class Equal:
    """Returns the same score for every image, and raw values with awkward names, two of which alternate by batch."""

    def __init__(self) -> None:
        self._batches = 0

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        self._batches += 1
        ones = np.ones(len(prompts), np.float32)
        raw = dict.fromkeys(("score", "tags", "step", "even" if self._batches % 2 == 0 else "odd"), 2 * ones)
        return Scores(np.float32(0.7) * ones, raw, [""] * len(prompts))


class OneForAll:
    """Returns a single number regardless of the number of images."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        return Scores(np.array([images.mean()], np.float32), {}, [""] * len(prompts))


class WithSecrets(Echo):
    """Takes options, some of which are secret."""

    def __init__(self, api_key: str, url: str, retries: int = 3) -> None:
        super().__init__()


class KilledWhileLoading(Echo):
    """Is killed while it loads, the first `times` times."""

    def __init__(self, folder: str, times: int = 1) -> None:
        super().__init__()
        for number in range(times):
            flag = Path(folder) / str(number)
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)


class FailsToLoad:
    """Cannot find its weights."""

    def __init__(self) -> None:
        raise RuntimeError("no weights in /nowhere")


class NotAScorer:
    """Has no score method."""


class Slow:
    """Takes very long to load."""

    def __init__(self) -> None:
        print("reading many weights", flush=True)
        time.sleep(1000)


class Leaking(Echo):
    """Has a key, and reveals it wherever it can."""

    def __init__(self, api_key: str, dies: bool = False) -> None:
        super().__init__()
        self._api_key = api_key
        if dies:
            print(f"dying with {api_key}", flush=True)
            os._exit(3)

    def score(self, images, prompts, metadata):
        if metadata[0].get("fail"):
            raise RuntimeError(f"the judge refused {self._api_key}")
        leak = {"key": self._api_key, "key_length": len(self._api_key), "environment": dict(os.environ)}
        return Scores(super().score(images, prompts, metadata).score, {}, [json.dumps(leak)] * len(prompts))
