"""Score a folder of pictures with any scorers of rewards_bridge, and compare two such folders.

    python -m udm_grpo.evaluate --samples outputs/geneval --output outputs/geneval-scores \\
        --scorer geneval --option geneval.detector=detector.pth --option geneval.clip=clip-vit-large-patch14
    python -m udm_grpo.evaluate --samples outputs/drawbench --output outputs/drawbench-scores \\
        --scorer pickscore --scorer clipscore --scorer hpsv2 --compare outputs/drawbench-base-scores

--samples is what `udm_grpo.sample` writes, or GenEval's own layout (00000/metadata.jsonl, 00000/samples/00000.png), or
DPG-Bench's (ID.png, the four pictures of a prompt in a 2 x 2 grid; --prompts prompts.json has the prompts by id).
The output folder has

    scores.jsonl                     a line per picture and scorer; rerunning the command continues where it stopped
    summary.json, summary.md         means with bootstrap intervals over prompts; GenEval's per-task table
    prompt_notes.json                notes of the scorers on prompts: truncated ones, ambiguous texts
    results.jsonl                    as GenEval's evaluate_images.py writes it, for its summary_scores.py
    comparison.json, .md, .png       with --compare: differences, and the prompts that changed most
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rewards_bridge.errors import USER_ERROR_STATUS, BridgeError, UserError
from rewards_bridge.flags import Parser, flag
from rewards_bridge.redaction import guarded
from udm_grpo.config import RewardsConfig, ScorerConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.data.prompt_files import PROMPT, Row
from udm_grpo.data.prompts import read_prompts
from udm_grpo.devices import prepare
from udm_grpo.files.atomic import replace_file
from udm_grpo.files.bucket_lock import lock_output
from udm_grpo.files.places import check_flags
from udm_grpo.machine.gpu_split import reserved
from udm_grpo.reporting.metrics import write_json
from udm_grpo.scoring.comparison import common_scorers, compare, draw_changed
from udm_grpo.scoring.folder_scores import Scored, ScoringError, is_scored, load_scored, made_by, score_folder
from udm_grpo.scoring.sample_folder import SampleFolder, has_prompts, read_samples
from udm_grpo.scoring.score_summary import summarize, write_official
from udm_grpo.scoring.score_tables import comparison_text, summary_text

Rows = Sequence[Row]


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


_SCORER_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "replicas": (int, "number of processes to start, which share the pictures"),
    "address": (str, "address of a running server; repeat it for several, which share the pictures"),
    "interpreter": (str, "Python interpreter that runs the scorer"),
    "devices": (_words, "GPUs such as 6,7, with a process on each; or auto (the last GPU, else the CPU) or cpu"),
    "memory_fraction": (float, "largest fraction of a GPU's memory for one process of the scorer"),
    "deadline_s": (float, "seconds that scoring a batch may take"),
    "start_timeout_s": (float, "seconds that loading the scorer may take"),
    "max_restarts": (int, "number of times that a dead process is restarted or a lost server is called again"),
    "tls_ca": (str, "certificate with which servers on other machines are verified"),
    "token_file": (str, "file with the token that such servers require"),
    "check_example": (_truth, "true or false: whether a scorer that misjudges its test images is an error"),
}
"""Flags of a scorer, each passed as NAME=VALUE: the type of the value and its meaning."""


def evaluate(
    folder: SampleFolder, scorers: dict[str, ScorerConfig], output: Path, args: argparse.Namespace
) -> tuple[Scored, str]:
    """Score a folder and write its scores and summary; return the scores and the text of summary.md.

    Raises what `score_folder` raises.
    """
    scored, warnings = score_folder(folder, scorers, output, args.batch, _warn)
    summary = summarize(scored, [*folder.warnings, *warnings], args.resamples, args.seed)
    _warn(summary["warnings"][len(folder.warnings) + len(warnings) :])  # the ones before have been shown
    text = summary_text(summary)
    write_official(scored, output)
    replace_file(output / "summary.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(output / "summary.json", summary)  # last: it marks a complete output
    return scored, text


def compare_with(before: Scored, scored: Scored, output: Path, args: argparse.Namespace) -> str:
    """Compare scores with those of another folder, and write the comparison; return the text of comparison.md.

    Raises what `compare` and `draw_changed` raise.
    """
    comparison = compare(before, scored, args.changed, args.resamples, args.seed)
    _warn(comparison["warnings"])
    text = comparison_text(comparison, draw_changed(comparison, output))
    replace_file(output / "comparison.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(output / "comparison.json", comparison)
    return text


def open_other(
    other: Path, scorers: dict[str, ScorerConfig], allow_missing: bool, prompts: Rows | None = None
) -> Scored | SampleFolder:
    """Return the folder to compare with: its scores, or its pictures if these scorers have to score them too.

    Raises ScoringError or SampleFolderError if it cannot be compared with the results of these scorers.
    """
    if not is_scored(other):
        return _read(other, allow_missing, prompts)
    before = load_scored(other)
    common_scorers(before, made_by(scorers))
    if not before.samples.is_dir():
        raise ScoringError(f"{other} has scores of {before.samples}, which is missing; restore it to show pictures.")
    return before


def _read(samples: Path, allow_missing: bool, prompts: Rows | None) -> SampleFolder:
    folder = read_samples(samples, allow_missing, prompts)
    _warn(folder.warnings)
    return folder


def read_listed(args: argparse.Namespace) -> Rows | None:
    """Return the prompts of --prompts; raise ScoringError if all folders of pictures have their own."""
    if args.prompt_key and not args.prompts:
        raise ScoringError("--prompt-key chooses a text of --prompts FILE; give that as well.")
    if not args.prompts:
        return None
    folders = [Path(folder) for folder in (args.samples, args.compare) if folder]
    if all(folder.is_dir() and (is_scored(folder) or has_prompts(folder)) for folder in folders):
        raise ScoringError("--prompts is for folders of DPG-Bench's ID.png; these pictures have prompts of their own.")
    return read_prompts(args.prompts, key=args.prompt_key or PROMPT).metadata


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m udm_grpo.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--samples", metavar="FOLDER", required=True, help="folder of pictures to score")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder for the scores")
    parser.add_argument("--compare", metavar="FOLDER", help="folder of scores, or of pictures to score too")
    parser.add_argument("--prompts", metavar="FILE", help="prompts of pictures without their own: DPG-Bench's ID.png")
    parser.add_argument("--prompt-key", metavar="KEY", help="key of the drawn text in --prompts (default: prompt)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="count missing and unreadable pictures, and continue"
    )
    for name, default, meaning in (
        ("batch", 32, "pictures to score at a time"),
        ("changed", 16, "prompts to show in the comparison; 0: none"),
        ("resamples", 10_000, "number of bootstrap resamples"),
        ("seed", 0, "seed of the bootstrap"),
    ):
        parser.add_argument(flag(name), type=int, default=default, help=f"{meaning} (default: %(default)s)")
    what = parser.add_argument_group("scorers")
    what.add_argument(
        "--scorer",
        metavar="[NAME=]SCORER",
        action="append",
        default=[],
        help="a scorer of rewards_bridge, or module:Class; may be repeated; NAME: its name here (default: its own)",
    )
    what.add_argument("--config", metavar="FILE", help="config of a run, for its scorers; --config.field=value too")
    for name, metavar in (("option", "NAME.KEY=VALUE"), ("environment", "NAME.VARIABLE=VALUE")):
        what.add_argument(flag(name), metavar=metavar, action="append", default=[], help="may be repeated")
    for name, (_, meaning) in _SCORER_FLAGS.items():
        what.add_argument(flag(name), metavar="NAME=VALUE", action="append", default=[], help=meaning)
    return parser


def read_scorers(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, ScorerConfig]:
    """Return the scorers of the command line by name.

    Raises ScoringError (ConfigError for --config) for flags that are not valid.
    """
    scorers: dict[str, ScorerConfig] = {}
    if args.config:
        scorers.update(parse([f"--config={args.config}", *overrides]).rewards.scorers)
    elif overrides:
        raise ScoringError(f"{' '.join(overrides)} needs --config FILE; without it, use --option and the like.")
    for text in args.scorer:
        name, equals, scorer = text.partition("=")
        name = name if equals else text.rpartition(":")[2]
        if not re.fullmatch(r"\w[\w-]*", name) or not (scorer or not equals):
            raise ScoringError(f"--scorer {text}: expected SCORER or NAME=SCORER; a NAME has letters, digits, _, -.")
        if name in scorers:
            raise ScoringError(f"--scorer {text}: there is a scorer {name} already; give this one as OTHER={text}.")
        scorers[name] = ScorerConfig(scorer=scorer or text)
    if not scorers:
        raise ScoringError("there is no scorer; give --scorer SCORER (such as pickscore) or --config FILE.")
    for argument in ("option", "environment"):
        for text in vars(args)[argument]:
            name, key, value = _split(argument, text, scorers, dotted=True)
            held = scorers[name].options if argument == "option" else scorers[name].environment
            held[key] = value
    for argument in _SCORER_FLAGS:
        for text in vars(args)[argument]:
            name, _, value = _split(argument, text, scorers, dotted=False)
            _set(scorers[name], argument, value)
    _check_scorers(scorers)
    return scorers


def _split(argument: str, text: str, scorers: dict[str, ScorerConfig], dotted: bool) -> tuple[str, str, str]:
    """Return (scorer, key, value) of NAME.KEY=VALUE or NAME=VALUE."""
    left, equals, value = text.partition("=")
    name, dot, key = left.partition(".") if dotted else (left, ".", "")
    if not equals or not dot or name not in scorers or (dotted and not key):
        expected = "NAME.KEY=VALUE" if dotted else "NAME=VALUE"
        raise ScoringError(f"{flag(argument)} {text}: expected {expected}, with NAME one of {', '.join(scorers)}.")
    return name, key, value


def _set(scorer: ScorerConfig, argument: str, text: str) -> None:
    read, meaning = _SCORER_FLAGS[argument]
    try:
        value = read(text)
    except ValueError:
        raise ScoringError(f"{flag(argument)}: {text!r} is not valid; expected: {meaning}.") from None
    if argument == "address":
        scorer.addresses = (*scorer.addresses, text)
    else:
        assert argument in {field.name for field in fields(scorer)}
        setattr(scorer, argument, value)


def _check_scorers(scorers: dict[str, ScorerConfig]) -> None:
    wrong = []
    for name, scorer in scorers.items():
        if scorer.replicas < 1:
            wrong.append(f"{name} has {scorer.replicas} replicas; give at least 1.")
    if wrong:
        raise ScoringError("\n  ".join(wrong))


def _check_numbers(args: argparse.Namespace) -> None:
    least = {"batch": 1, "changed": 0, "resamples": 100, "seed": 0}
    named = vars(args)
    wrong = [
        f"{flag(name)} is {named[name]}; choose at least {low}." for name, low in least.items() if named[name] < low
    ]
    if wrong:
        raise ScoringError("\n  ".join(wrong))


def _run(scorers: dict[str, ScorerConfig], output: Path, args: argparse.Namespace) -> None:
    # Both folders are read before anything is scored.
    listed = read_listed(args)
    folder = _read(Path(args.samples), args.allow_missing, listed)
    other = open_other(Path(args.compare), scorers, args.allow_missing, listed) if args.compare else None
    scored, text = evaluate(folder, scorers, output, args)
    print(text)
    if isinstance(other, SampleFolder):
        other = evaluate(other, scorers, output / "compared", args)[0]
    if other is not None:
        print(compare_with(other, scored, output, args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user error, which is reported without a traceback."""
    prepare()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    if len(overrides) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in overrides)}")
    output = Path(args.output)
    try:
        check_flags(args)
        _check_numbers(args)
        named = RewardsConfig(read_scorers(args, overrides))
        with lock_output(output), reserved(named, trainer=False) as (placed, lines):
            for line in lines:
                _say(line)
            _run(placed.scorers, output, args)
    except BridgeError as error:
        _say(f"error: {error}\nWhat was scored is in {output}; the same command resumes from there.")
        return USER_ERROR_STATUS
    except (UserError, OSError) as error:
        _say(f"error: {error}")
        return USER_ERROR_STATUS
    _say(f"the scores are in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
