"""Score how well a picture shows the text that its prompt asks for, read by PaddleOCR 3.7, offline, on the CPU.

The model folders come from `python -m rewards_bridge.scorers.ocr_models --output FOLDER`, or from PaddleOCR itself.

Source: the OCR reward of UDM-GRPO (arXiv 2604.18518); PP-OCRv5 and PaddleOCR by the PaddlePaddle authors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards_bridge.errors import PromptError, UsageError
from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.text_match import ambiguity, check_prompts, is_exact, join_lines, match, target_text

PINS = {
    "paddleocr": "paddleocr==3.7.0",
    "onnxruntime": "onnxruntime==1.28.0",  # from 1.29 on, the Linux build sends telemetry
    "paddle": "paddlepaddle==3.2.2",
}
"""Module -> its pinned requirement."""
BROKEN_PADDLE = ("3.3.0", "3.3.1")
"""Versions that cannot run these models on a CPU: https://github.com/PaddlePaddle/Paddle/issues/77340 (oneDNN)."""

WEIGHTS = {
    "onnxruntime": (("inference.onnx",),),
    "paddle": (("inference.json", "inference.pdmodel"), ("inference.pdiparams",)),
}
"""Engine -> the files that a model folder needs besides inference.yml: one of every group."""

_MAKE = "create both with: python -m rewards_bridge.scorers.ocr_models --output FOLDER"

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # spinning threads make Paddle 30 times slower on busy cores
    "ORT_DISABLE_TELEMETRY": "1",
    "PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK": "True",  # otherwise it contacts model hosts on the network
}
"""Variables that the libraries read on import; existing values are kept."""


@dataclass(frozen=True)
class _Settings:
    """The settings of a _Reader."""

    detection: str
    detection_name: str
    recognition: str
    recognition_name: str
    engine: str
    cpu_threads: int
    enlarge: int


class OcrScorer:
    """Scores pictures by the text read in them: score = raw["ocr"] = 1 - distance / length of the target text.

    raw["exact"] is 1 where only the target was read: "17" gets the full score for "7", but is not exact. Options:
        extra           text beside the target: "free" (the published rule) or "counts" as errors. On short targets
                        training exploits "free": it draws strokes beside a number that are read as more digits
        texts           if several texts are quoted: "first" (the published rule) or "all", in their order
        detection, recognition              model folders: inference.yml and inference.onnx (or Paddle's files)
        detection_name, recognition_name    names of the models; default: those in the folders
        engine          "onnxruntime" or "paddle"
        enlarge         minimum pixels of the shorter side; smaller pictures are enlarged to it (bicubic); 0: never.
                        224 reads single digits on pictures of 64 and 128 pixels best, out of 96 to 320
        batch_size      pictures sent to a process at a time; scores do not depend on it
        cpu_threads     threads per process; those of ONNX Runtime spin, so prefer more processes to more threads
        processes       number of processes that share a batch; with 1, this process does the reading
    """

    def __init__(
        self,
        detection: str = "",
        recognition: str = "",
        detection_name: str = "",
        recognition_name: str = "",
        extra: str = "free",
        texts: str = "first",
        engine: str = "onnxruntime",
        enlarge: int = 224,
        batch_size: int = 4,
        cpu_threads: int = 1,
        processes: int = 1,
    ) -> None:
        _check_packages(engine)
        if min(batch_size, cpu_threads, processes) < 1 or enlarge < 0:
            raise UsageError(
                "the ocr scorer needs batch_size, cpu_threads and processes of at least 1, enlarge of at least 0; "
                f"found {batch_size=}, {cpu_threads=}, {processes=}, {enlarge=}"
            )
        if extra not in ("free", "counts"):
            raise UsageError(f"the ocr scorer's option extra is {extra!r}; expected free or counts")
        if texts not in ("first", "all"):
            raise UsageError(f"the ocr scorer's option texts is {texts!r}; expected first or all")
        self._extra_is_free, self._every = extra == "free", texts == "all"
        self._settings = _Settings(
            detection,
            _model_name("detection", detection, detection_name, engine),
            recognition,
            _model_name("recognition", recognition, recognition_name, engine),
            engine,
            cpu_threads,
            enlarge,
        )
        self._batch_size = batch_size
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")  # forking is unsafe while threads of gRPC are running
            self._pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_prepare_process)
        self._read(
            np.zeros((processes * batch_size, 32, 32, 3), np.uint8)
        )  # loads the models, so that errors occur now

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] by the quoted texts of their prompts; the reasons are the texts read.

        Raises ValueError for images of another form and PromptError, which lists them all, for prompts without quotes.
        """
        check_batch("ocr", images, prompts, metadata)
        problems = check_prompts(prompts)
        if problems:
            raise PromptError("\n".join(problems))
        targets = [target_text(prompt, self._every) for prompt in prompts]
        texts = [join_lines(lines) for lines in self._read(images)]
        pairs = list(zip(texts, targets, strict=True))
        score = np.array([match(*pair, self._extra_is_free) for pair in pairs], dtype=np.float32)
        exact = np.array([is_exact(*pair) for pair in pairs], dtype=np.float32)
        return Scores(score=score, raw={"ocr": score, "exact": exact}, reasons=texts)

    def problem(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return why pictures of this prompt cannot be scored (it quotes no text), or ""."""
        try:
            target_text(prompt)
        except ValueError as error:
            return str(error)
        return ""

    def note(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return why the target text of a prompt may not be the intended one, and which target is used."""
        try:
            return ambiguity(prompt, self._every)
        except ValueError:
            return ""  # `problem` reports it

    def close(self) -> None:
        """Stop the processes; with several processes, nothing can be scored afterwards."""
        if self._pool is not None:
            self._pool.shutdown()

    def _read(self, images: np.ndarray) -> list[list[str]]:
        """Return the lines read in each picture."""
        parts = [images[start : start + self._batch_size] for start in range(0, len(images), self._batch_size)]
        share = map if self._pool is None else self._pool.map
        try:
            return [lines for read in share(_read_part, repeat(self._settings), parts) for lines in read]
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process of the ocr scorer died, perhaps because it ran out of memory (about 0.5 GB each); "
                "restart the scorer, with fewer processes if that is the reason"
            ) from error


class _Reader:
    """PaddleOCR with its models loaded."""

    def __init__(self, settings: _Settings) -> None:
        engine: dict[str, Any] = {"engine": settings.engine, "cpu_threads": settings.cpu_threads}
        if settings.engine == "onnxruntime":
            engine = {"engine": settings.engine, "engine_config": _onnxruntime_config(settings.cpu_threads)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern code that is not ours
            from paddleocr import PaddleOCR

            try:
                self._paddle = PaddleOCR(
                    text_detection_model_dir=settings.detection,
                    text_detection_model_name=settings.detection_name,
                    text_recognition_model_dir=settings.recognition,
                    text_recognition_model_name=settings.recognition_name,
                    use_doc_orientation_classify=False,
                    use_doc_unwarping=False,
                    use_textline_orientation=False,
                    device="cpu",
                    **engine,
                )
            except Exception as error:
                raise UsageError(
                    f"PaddleOCR cannot load {settings.detection} and {settings.recognition} with the engine "
                    f"{settings.engine}: {type(error).__name__}: {error}; {_MAKE}"
                ) from error
        self._enlarge = settings.enlarge

    def read(self, images: np.ndarray) -> list[list[str]]:
        """Return the text lines in each of images u8[B,H,W,3] (RGB), from top to bottom."""
        pictures = [_prepare(image, self._enlarge) for image in images]
        return [list(result["rec_texts"]) for result in self._paddle.predict(pictures)]


_reader = functools.cache(_Reader)


def _read_part(settings: _Settings, images: np.ndarray) -> list[list[str]]:
    """Read pictures in this process; load the models on the first call."""
    return _reader(settings).read(images)


def _prepare_process() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare(image: np.ndarray, enlarge: int) -> np.ndarray:
    """Return a picture u8[H,W,3] as PaddleOCR needs it: in BGR, and large enough to detect text."""
    height, width = image.shape[:2]
    if min(height, width) < enlarge:
        scale = enlarge / min(height, width)
        size = (round(width * scale), round(height * scale))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(image[..., ::-1])


def _onnxruntime_config(threads: int) -> dict[str, int]:
    # 3: errors only, to suppress warnings about output shapes that the model files leave open.
    return {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "log_severity_level": 3}


def _check_packages(engine: str) -> None:
    if engine not in WEIGHTS:
        raise UsageError(f"the ocr scorer has no engine {engine!r}; expected one of {', '.join(WEIGHTS)}")
    missing = [PINS[module] for module in ("paddleocr", engine) if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"the ocr scorer with the engine {engine} needs {' and '.join(missing)}: "
            f"{sys.executable} -m pip install {' '.join(missing)}"
        )
    if engine == "paddle" and importlib.metadata.version("paddlepaddle") in BROKEN_PADDLE:
        raise UsageError(
            f"paddlepaddle {importlib.metadata.version('paddlepaddle')} cannot run these models on a CPU: "
            f"{sys.executable} -m pip install {PINS['paddle']}"
        )


def _model_name(option: str, folder: str, name: str, engine: str) -> str:
    """Return the name of the model in a folder; `name` is the one that the user expects, "" for any.

    Raises UsageError that says what is missing or wrong.
    """
    path = Path(folder)
    if not folder or not path.is_dir():
        problem = f"{folder} is not a folder" if folder else "it is not set"
        raise UsageError(f"the ocr scorer's option {option} must name a model folder, but {problem}; {_MAKE}")
    present = {file.name for file in path.iterdir()}
    missing = [" or ".join(files) for files in (("inference.yml",), *WEIGHTS[engine]) if not present & set(files)]
    if missing:
        raise UsageError(
            f"the {option} folder {folder} lacks {', '.join(missing)} for the engine {engine}; "
            f"found {', '.join(sorted(present)) or 'nothing'}; {_MAKE}"
        )
    # Parsed by hand, because a YAML parser takes more than a second for the file of a recognition model.
    stated = re.search(r"^\s+model_name:\s*['\"]?([\w.\-]+)", (path / "inference.yml").read_text("utf-8"), re.MULTILINE)
    if stated is None:
        raise UsageError(f"{path / 'inference.yml'} has no Global.model_name; {_MAKE}")
    if name and name != stated[1]:
        raise UsageError(
            f"the ocr scorer's option {option}_name is {name}, but {path / 'inference.yml'} says {stated[1]}; "
            "remove the option, or choose another folder"
        )
    kind = {"detection": "_det", "recognition": "_rec"}[option]
    if kind not in stated[1]:
        raise UsageError(f"the {option} folder {folder} contains {stated[1]}, which is not a {option} model")
    return stated[1]
