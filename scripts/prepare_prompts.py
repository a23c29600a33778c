"""Prepare prompt sets that training loads fast: TensorFlow Datasets folders (ArrayRecord; without TensorFlow).

    python -m scripts.prepare_prompts generate-geneval --leave-out evaluation_metadata.jsonl --output data/geneval
    python -m scripts.prepare_prompts geneval --train train_metadata.jsonl --test evaluation_metadata.jsonl \\
        --output data/geneval
    python -m scripts.prepare_prompts ocr --train ocr/train.txt --test ocr/test.txt --output data/ocr
    python -m scripts.prepare_prompts prompts --train pick/train.txt --test pick/test.txt --output data/pickscore
    python -m scripts.prepare_prompts prompts --test DrawBench.csv --output data/drawbench
    python -m scripts.prepare_prompts prompts --test dpg_bench/prompts --output data/dpg
    python -m scripts.prepare_prompts prompts --test prompts.json --prompt-key dense_prompt --output data/dense

Training and udm_grpo.sample --prompts read one split of such a folder: prompts.train is data/geneval:train,
prompts.heldout is data/geneval:test. The published recipes (configs/geneval.py, ocr.py, pickscore.py) read
data/geneval, data/ocr and data/pickscore; their pages say where the raw files come from.

geneval           GenEval's metadata; each line is checked by the rules of GenEval's judge
ocr               prompts with the target text in double quotes; each is checked by the rules of the OCR judge, and
                  ambiguous ones are listed with the text that is used
prompts           all others: .jsonl (objects with a prompt), .json (an array of them), .txt (one a line), .csv (with a
                  header), a folder of .txt
generate-geneval  a seeded draw from GenEval's grammar over its 80 classes; the file to leave out becomes the split test

All bad lines are reported in one error with their numbers; --drop-bad leaves them out with a warning.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from rewards_bridge.scorers.text_match import ambiguity, target_text
from udm_grpo import devices
from udm_grpo.data import geneval_prompts
from udm_grpo.data.prompt_dataset import write_dataset
from udm_grpo.data.prompt_files import PROMPT, Parsed, Row, parse_file
from udm_grpo.data.prompt_text import PromptsError
from udm_grpo.files.atomic import replace_file
from udm_grpo.files.folder_lock import lock_beside
from udm_grpo.files.places import local_args

Splits = dict[str, Sequence[Row]]


def ocr_problem(row: Row) -> str:
    """Return why the OCR judge cannot use a row; "" if it can."""
    try:
        target_text(row["prompt"])
    except ValueError as error:
        return str(error)
    return ""


def geneval_problem(row: Row) -> str:
    """Return why GenEval's judge cannot use a row; "" if it can."""
    # Imports PyTorch, which the other commands do not need.
    from rewards_bridge.scorers.geneval import check_metadata

    problems = check_metadata([row["prompt"]], [row])
    return "; ".join(text.removeprefix(f"prompt 0 ({row['prompt']!r}): ") for text in problems)


def warn_of_ambiguity(parsed: Parsed) -> None:
    """List the prompts whose target text is ambiguous, each with the text that is used."""
    texts = [ambiguity(row["prompt"]) for row in parsed.rows]
    ambiguous = [(place, text) for place, text in zip(parsed.places, texts, strict=True) if text]
    if ambiguous:
        warn(parsed.listed("prompts with an ambiguous target text", ambiguous))


PROBLEMS: dict[str, Callable[[Row], str]] = {"geneval": geneval_problem, "ocr": ocr_problem, "prompts": lambda row: ""}
"""Command -> the check of a row."""


def rows_of(parsed: dict[str, Parsed], drop_bad: bool) -> Splits:
    """Return split -> rows; raises PromptsError with the bad lines of all files unless `drop_bad`."""
    bad = [one for one in parsed.values() if one.bad]
    if bad and not drop_bad:
        advice = "correct or remove them, or leave them out with --drop-bad"
        raise PromptsError("\n".join(one.bad_text(advice) for one in bad))
    for one in bad:
        warn(one.bad_text("left out"))
    for one in parsed.values():
        for remark in one.remarks():
            warn(remark)
        if one.bad and not one.rows:
            raise PromptsError(f"{one.path}: no prompt is left; every one of its {one.unit}s is bad")
    return {split: replace(one, bad=()).all_or_error() for split, one in parsed.items()}


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr)


def unrepeated(splits: Splits, unique: bool) -> Splits:
    """Warn of prompts that repeat in a split or are in both train and test; return the splits.

    If `unique`, only the first occurrence of a prompt is kept, and one that is also in test is removed from train.
    """
    advice = "left out" if unique else "kept; --unique leaves them out"
    first: dict[str, dict[str, Row]] = {split: {} for split in splits}
    for split, rows in splits.items():
        for row in rows:
            first[split].setdefault(row["prompt"], row)
        repeats = len(rows) - len(first[split])
        if repeats:
            warn(f"{split}: prompts that repeat an earlier one: {repeats} of {len(rows)} ({advice})")
    shared = [prompt for prompt in first.get("train", {}) if prompt in first.get("test", {})]
    if shared:
        warn(f"train: prompts that are also in test: {len(shared)}, such as {shared[0]!r} ({advice})")
    if not unique:
        return splits
    for prompt in shared:
        del first["train"][prompt]
    if not all(first.values()):
        raise PromptsError("no training prompt is left: all of them are also in test")
    return {split: list(rows.values()) for split, rows in first.items()}


def save(output: Path, splits: Splits) -> None:
    """Write the prepared folder and print its contents."""
    write_dataset(output, splits)
    for split, rows in splits.items():
        tags = Counter(row["tag"] for row in rows)
        print(f"{output}:{split}: {len(rows)} ({', '.join(f'{tags[tag]} {tag}' for tag in sorted(tags))})")


def prepare(args: argparse.Namespace) -> None:
    """Run one of the commands geneval, ocr and prompts."""
    files = {split: file for split, file in (("train", args.train), ("test", args.test)) if file}
    if not files:
        raise PromptsError("there is nothing to prepare; set --train FILE, --test FILE or both")
    columns = {"column": args.column, "tag_column": args.tag_column} if args.command == "prompts" else {}
    check = PROBLEMS[args.command]
    columns["key"] = args.prompt_key
    parsed = {split: parse_file(file, **columns).checked(check) for split, file in files.items()}
    if args.command == "ocr":
        for one in parsed.values():
            warn_of_ambiguity(one)
    save(args.output, unrepeated(rows_of(parsed, args.drop_bad), args.unique))


def generate(args: argparse.Namespace) -> None:
    """Run the command generate-geneval."""
    leave_out: Sequence[Row] = ()
    if args.leave_out:
        leave_out = parse_file(args.leave_out).checked(geneval_prompts.unknown_words).all_or_error()
    ratio = dict(args.ratio or geneval_prompts.RATIO)
    drawn = geneval_prompts.generate(args.count, args.seed, ratio, leave_out, args.plurals, args.repeats)
    for tag, share in drawn.shares.items():
        if share.available < share.target:
            what = "they repeat" if args.repeats else "all of them are included, and other tags fill the rest"
            warn(f"{tag} has {share.available} different prompts, but a share of {share.target}: {what}")
    if args.jsonl:
        lines = "".join(json.dumps(row) + "\n" for row in drawn.rows)
        replace_file(args.jsonl, partial(Path.write_text, data=lines, encoding="utf-8"))
    save(args.output, {"train": drawn.rows} | ({"test": leave_out} if leave_out else {}))
    if {tag: share.count for tag, share in drawn.shares.items()} != {tag: s.target for tag, s in drawn.shares.items()}:
        settings = (f"--config.prompts.tag_weights.{tag}={weight}" for tag, weight in ratio.items())
        print("The set itself does not have this ratio; training draws prompts in it with", *settings)
        if ratio == geneval_prompts.RATIO:
            print("which configs/geneval.py already sets.")


def tag_share(text: str) -> tuple[str, float]:
    """Return (tag, share) for TAG=NUMBER of the command line."""
    tag, equals, number = text.partition("=")
    if not equals or tag not in geneval_prompts.TAGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not TAG=NUMBER with one of {', '.join(geneval_prompts.TAGS)}")
    try:
        return tag, float(number) if "." in number else int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{number!r} in {text!r} is not a number") from None


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m scripts.prepare_prompts", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("geneval", "GenEval's metadata, a JSON object a line"),
        ("ocr", "prompts with the target text in double quotes"),
        ("prompts", "any .jsonl, .json, .txt or .csv file, or a folder of .txt files (one prompt a file)"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--train", type=Path, metavar="FILE", help="source of the split train")
        command.add_argument("--test", type=Path, metavar="FILE", help="source of the split test")
        command.add_argument(
            "--prompt-key",
            default=PROMPT,
            metavar="KEY",
            help="key of the prompts in .json and .jsonl files (default: prompt)",
        )
        if name == "prompts":
            columns = "column of a .csv file with the {} (default: {})"
            command.add_argument("--column", default="", help=columns.format("prompts", "prompt, caption or text"))
            command.add_argument("--tag-column", default="", help=columns.format("tags", "tag or category"))
        command.add_argument("--drop-bad", action="store_true", help="leave out bad lines, with a warning")
        command.add_argument("--unique", action="store_true", help="leave out repeats, and from train what is in test")
        command.set_defaults(run=prepare)
    text = "draw training prompts from GenEval's grammar, without repeats"
    command = commands.add_parser("generate-geneval", help=text, description=text, allow_abbrev=False)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--leave-out", type=Path, metavar="FILE", help="evaluation metadata that is never drawn; becomes the split test"
    )
    what.add_argument("--leave-nothing-out", action="store_true", help="draw from the whole grammar; no split test")
    command.add_argument("--count", type=int, default=50_000, help="prompts to draw (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    published = " ".join(f"{tag}={share}" for tag, share in geneval_prompts.RATIO.items())
    command.add_argument("--ratio", type=tag_share, nargs="+", metavar="TAG=NUMBER", help=f"default: {published}")
    command.add_argument("--repeats", action="store_true", help="keep the ratio exactly, by repeating prompts")
    command.add_argument(
        "--plurals",
        choices=geneval_prompts.PLURALS,
        default="benchmark",
        help='as in GenEval\'s own prompts ("two knifes", the default), or as in English',
    )
    command.add_argument("--jsonl", type=Path, metavar="FILE", help="also write the drawn metadata as JSON lines")
    command.set_defaults(run=generate)
    for command in commands.choices.values():
        command.add_argument(
            "--output",
            type=Path,
            metavar="FOLDER",
            required=True,
            help="folder to write; replaced if it was prepared earlier",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user's mistake, reported without a traceback."""
    devices.prepare()
    args = local_args(_parser(), argv)
    try:
        with lock_beside(args.output):
            args.run(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
