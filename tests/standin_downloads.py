"""Stand-in for hf, curl, wget and pip: copies files from the folder that STANDINS names instead of downloading them.

    python standin_downloads.py hf|curl|wget|pip ARGUMENTS

An unknown address or option is an error, so that no command of a page passes because it was misread.
"""

import argparse
import itertools
import os
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

REPOSITORIES = {
    "BAAI/URSA-1.7B-IBQ512": "models/URSA-1.7B-IBQ512",
    "openai/clip-vit-large-patch14": "models/clip-vit-large-patch14",
    "timm/vit_large_patch14_clip_224.openai": "models/vit_large_patch14_clip_224.openai",
    "yuvalkirstain/PickScore_v1": "models/PickScore_v1",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "models/PickScore_v1",  # the processor is the same
    "xswu/HPSv2": "models/HPSv2",
}
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
TEXTS = ("pickscore/train.txt", "pickscore/test.txt", "ocr/train.txt", "ocr/test.txt")
ADDRESSES = {
    f"download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/{DETECTOR}": (
        f"models/{DETECTOR}"
    ),
    **{
        f"raw.githubusercontent.com/{place}": f"data/{file}"
        for place, file in (
            ("djghosh13/geneval/main/prompts/evaluation_metadata.jsonl", "geneval/evaluation_metadata.jsonl"),
            ("yifan123/flow_grpo/main/dataset/geneval/train_metadata.jsonl", "geneval/train_metadata.jsonl"),
            ("Yovecent/UDM-GRPO/main/raw_rl_data/geneval/train_metadata.jsonl", "geneval/train_metadata.jsonl"),
            *((f"yifan123/flow_grpo/main/dataset/{name}", name) for name in TEXTS),
            *((f"Yovecent/UDM-GRPO/main/raw_rl_data/{name}", name) for name in TEXTS if name != "ocr/test.txt"),
        )
    },
}


def hf(words: list[str], source: Path) -> None:
    """`hf download REPOSITORY [FILE ...] --local-dir FOLDER`."""
    parser = argparse.ArgumentParser(prog="hf")
    parser.add_argument("action", choices=["download"])
    parser.add_argument("repository", choices=REPOSITORIES)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--local-dir", type=Path, required=True)
    args = parser.parse_args(words)
    folder = source / REPOSITORIES[args.repository]
    for file in args.files or sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        copy(folder / file, args.local_dir / file)


def curl(words: list[str], source: Path) -> None:
    """`curl [-L] [-f] [-C OFFSET] [--create-dirs] -o FILE ADDRESS`, or with -O instead of -o FILE."""
    parser = argparse.ArgumentParser(prog="curl")
    parser.add_argument("-L", "--location", action="store_true")
    parser.add_argument("-f", "--fail", action="store_true")
    parser.add_argument("-C", "--continue-at")
    parser.add_argument("--create-dirs", action="store_true")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("-o", "--output", type=Path)
    place.add_argument("-O", "--remote-name", action="store_true")
    parser.add_argument("address")
    args = parser.parse_args(words)
    target = args.output or Path(Path(urlparse(args.address).path).name)
    if not args.create_dirs and not target.parent.is_dir():
        sys.exit(f"curl: (23) Failed to open the file {target}: No such file or directory")
    copy(source / known(args.address), target)


def wget(words: list[str], source: Path) -> None:
    """`wget [-c] [-O FILE | -P FOLDER] ADDRESS`."""
    parser = argparse.ArgumentParser(prog="wget")
    parser.add_argument("-c", "--continue", action="store_true")
    parser.add_argument("-O", dest="file", type=Path)
    parser.add_argument("-P", dest="folder", type=Path, default=Path())
    parser.add_argument("address")
    args = parser.parse_args(words)
    if args.file and not args.file.parent.is_dir():
        sys.exit(f"{args.file}: No such file or directory")
    copy(source / known(args.address), args.file or args.folder / Path(urlparse(args.address).path).name)


def pip(words: list[str], source: Path) -> None:
    """`pip install ...`: check only that the named files exist; .ci/run installs them for real."""
    if words[:1] != ["install"]:
        sys.exit(f"pip: {words} is not an installation")
    for option, value in itertools.pairwise(words):
        if option in ("-r", "-c", "-e") and not Path(value.split("[")[0]).exists():
            sys.exit(f"ERROR: Could not open requirements file: {value}")


def known(address: str) -> str:
    """Return the stand-in file for an address; exit for an unknown address."""
    parts = urlparse(address)
    place = f"{parts.netloc}{unquote(parts.path)}"
    if parts.scheme != "https" or place not in ADDRESSES:
        sys.exit(f"404: there is no stand-in for {address}")
    return ADDRESSES[place]


def copy(source: Path, target: Path) -> None:
    """Copy a file; create the folder of the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


if __name__ == "__main__":
    {"hf": hf, "curl": curl, "wget": wget, "pip": pip}[sys.argv[1]](sys.argv[2:], Path(os.environ["STANDINS"]))
