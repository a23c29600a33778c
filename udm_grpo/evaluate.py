"""Score a folder of pictures with any scorers of rewards_bridge, and compare two such folders.

    python -m udm_grpo.evaluate --samples outputs/geneval --output outputs/geneval-scores \\
        --scorer geneval --option geneval.detector=detector.pth --option geneval.clip=clip-vit-large-patch14
    python -m udm_grpo.evaluate --samples outputs/drawbench --output outputs/drawbench-scores \\
        --scorer pickscore --scorer clipscore --scorer hpsv2 --compare outputs/drawbench-base-scores

--samples is what `udm_grpo.sample` writes, or GenEval's own layout (00000/metadata.jsonl, 00000/samples/00000.png), or
DPG-Bench's (ID.png, the four pictures of a prompt in a 2 x 2 grid; --prompts prompts.json has the prompts by id).
The output has

    scores.jsonl                     a line a picture and scorer; the same command again continues where it stopped
    summary.json, summary.md         means with bootstrap intervals over prompts; GenEval's per-task table
    prompt_notes.json                what the scorers say of the prompts: those that they cut, ambiguous texts
    results.jsonl                    what GenEval's evaluate_images.py writes, for its summary_scores.py
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


_OF_A_SCORER: dict[str, tuple[Callable[[str], Any], str]] = {
    "replicas": (int, "processes that are started and share the pictures"),
    "address": (str, "of a running server; may be repeated, and they share the pictures"),
    "interpreter": (str, "Python that runs the scorer"),
    "devices": (_words, "GPUs as 6,7, a process on each; or auto (the last GPU, else the CPU) or cpu"),
    "memory_fraction": (float, "largest part of a GPU's memory for one process of the scorer"),
    "deadline_s": (float, "seconds a batch may take to score"),
    "start_timeout_s": (float, "seconds the scorer may take to load"),
    "max_restarts": (int, "times that a dead process is started again, or a lost server is called again"),
    "tls_ca": (str, "certificate that servers on other machines are checked against"),
    "token_file": (str, "file with the token that such servers want"),
    "check_example": (_truth, "true or false: whether a scorer that gets its test images wrong is an error"),
}
"""Flag -> type of its value and what it is, each given as NAME=VALUE."""


def evaluate(
    folder: SampleFolder, scorers: dict[str, ScorerConfig], output: Path, given: argparse.Namespace
) -> tuple[Scored, str]:
    """Score a folder and write everything that is about it alone; returns the scores and summary.md.

    Raises what `score_folder` raises.
    """
    scored, warnings = score_folder(folder, scorers, output, given.batch, _warn)
    summary = summarize(scored, [*folder.warnings, *warnings], given.resamples, given.seed)
    _warn(summary["warnings"][len(folder.warnings) + len(warnings) :])  # those before have been told of
    text = summary_text(summary)
    write_official(scored, output)
    replace_file(output / "summary.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(output / "summary.json", summary)  # last: it says that all is there
    return scored, text


def compare_with(before: Scored, scored: Scored, output: Path, given: argparse.Namespace) -> str:
    """Compare scores with those of another folder, and write all about it; returns comparison.md.

    Raises what `compare` and `draw_changed` raise.
    """
    comparison = compare(before, scored, given.changed, given.resamples, given.seed)
    _warn(comparison["warnings"])
    text = comparison_text(comparison, draw_changed(comparison, output))
    replace_file(output / "comparison.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(output / "comparison.json", comparison)
    return text


def open_other(
    other: Path, scorers: dict[str, ScorerConfig], allow_missing: bool, prompts: Rows | None = None
) -> Scored | SampleFolder:
    """Return the folder to compare with: its scores, or its pictures to be scored by these scorers too.

    Raises ScoringError or SampleFolderError if it cannot be compared with what these scorers will say.
    """
    if not is_scored(other):
        return _read(other, allow_missing, prompts)
    before = load_scored(other)
    common_scorers(before, made_by(scorers))
    if not before.samples.is_dir():
        raise ScoringError(f"{other} is of {before.samples}, which is not there to be shown; put it back.")
    return before


def _read(samples: Path, allow_missing: bool, prompts: Rows | None) -> SampleFolder:
    folder = read_samples(samples, allow_missing, prompts)
    _warn(folder.warnings)
    return folder


def read_listed(given: argparse.Namespace) -> Rows | None:
    """Return the prompts of --prompts; raises ScoringError if no folder of pictures lacks its own."""
    if given.prompt_key and not given.prompts:
        raise ScoringError("--prompt-key chooses a text of --prompts FILE; give that as well.")
    if not given.prompts:
        return None
    folders = [Path(folder) for folder in (given.samples, given.compare) if folder]
    if all(folder.is_dir() and (is_scored(folder) or has_prompts(folder)) for folder in folders):
        raise ScoringError("--prompts is for folders of DPG-Bench's ID.png; these pictures have prompts of their own.")
    return read_prompts(given.prompts, key=given.prompt_key or PROMPT).metadata


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
    parser.add_argument("--samples", metavar="FOLDER", required=True, help="the pictures")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="for the scores")
    parser.add_argument("--compare", metavar="FOLDER", help="the same before: of scores, or of pictures to score too")
    parser.add_argument("--prompts", metavar="FILE", help="of pictures that have none beside them: DPG-Bench's ID.png")
    parser.add_argument("--prompt-key", metavar="KEY", help="of --prompts: the text that was drawn (default: prompt)")
    parser.add_argument(
        "--allow-missing", action="store_true", help="count missing and unreadable pictures, and continue"
    )
    for name, default, meaning in (
        ("batch", 32, "pictures that are scored together"),
        ("changed", 16, "prompts of the comparison that are shown; 0: none"),
        ("resamples", 10_000, "of the bootstrap"),
        ("seed", 0, "of the bootstrap"),
    ):
        parser.add_argument(flag(name), type=int, default=default, help=f"{meaning} (default: %(default)s)")
    what = parser.add_argument_group("scorers")
    what.add_argument(
        "--scorer",
        metavar="[NAME=]SCORER",
        action="append",
        default=[],
        help="one of rewards_bridge, or module:Class; may be repeated; NAME (default: its own) is what it is called",
    )
    what.add_argument("--config", metavar="FILE", help="the scorers of a training; --config.field=value as there")
    for name, metavar in (("option", "NAME.KEY=VALUE"), ("environment", "NAME.VARIABLE=VALUE")):
        what.add_argument(flag(name), metavar=metavar, action="append", default=[], help="may be repeated")
    for name, (_, meaning) in _OF_A_SCORER.items():
        what.add_argument(flag(name), metavar="NAME=VALUE", action="append", default=[], help=meaning)
    return parser


def read_scorers(given: argparse.Namespace, overrides: Sequence[str]) -> dict[str, ScorerConfig]:
    """Return the scorers of the command line by name.

    Raises ScoringError (ConfigError for --config) for what cannot be.
    """
    scorers: dict[str, ScorerConfig] = {}
    if given.config:
        scorers.update(parse([f"--config={given.config}", *overrides]).rewards.scorers)
    elif overrides:
        raise ScoringError(f"{' '.join(overrides)} needs --config FILE; without one, use --option and its like.")
    for text in given.scorer:
        name, equals, scorer = text.partition("=")
        name = name if equals else text.rpartition(":")[2]
        if not re.fullmatch(r"\w[\w-]*", name) or not (scorer or not equals):
            raise ScoringError(f"--scorer {text}: wanted SCORER or NAME=SCORER, the name of letters, digits, _ and -.")
        if name in scorers:
            raise ScoringError(f"--scorer {text}: there is a scorer {name} already; give this one as OTHER={text}.")
        scorers[name] = ScorerConfig(scorer=scorer or text)
    if not scorers:
        raise ScoringError("there is no scorer; give --scorer SCORER (such as pickscore) or --config FILE.")
    for argument in ("option", "environment"):
        for text in vars(given)[argument]:
            name, key, value = _split(argument, text, scorers, dotted=True)
            held = scorers[name].options if argument == "option" else scorers[name].environment
            held[key] = value
    for argument in _OF_A_SCORER:
        for text in vars(given)[argument]:
            name, _, value = _split(argument, text, scorers, dotted=False)
            _set(scorers[name], argument, value)
    _check_scorers(scorers)
    return scorers


def _split(argument: str, text: str, scorers: dict[str, ScorerConfig], dotted: bool) -> tuple[str, str, str]:
    """(scorer, key, value) of NAME.KEY=VALUE or NAME=VALUE."""
    left, equals, value = text.partition("=")
    name, dot, key = left.partition(".") if dotted else (left, ".", "")
    if not equals or not dot or name not in scorers or (dotted and not key):
        wanted = "NAME.KEY=VALUE" if dotted else "NAME=VALUE"
        raise ScoringError(f"{flag(argument)} {text}: wanted {wanted}, the name one of {', '.join(scorers)}.")
    return name, key, value


def _set(scorer: ScorerConfig, argument: str, text: str) -> None:
    read, meaning = _OF_A_SCORER[argument]
    try:
        value = read(text)
    except ValueError:
        raise ScoringError(f"{flag(argument)}: {text!r} cannot be read; give the {meaning}.") from None
    if argument == "address":
        scorer.addresses = (*scorer.addresses, text)
    else:
        assert argument in {field.name for field in fields(scorer)}
        setattr(scorer, argument, value)


def _check_scorers(scorers: dict[str, ScorerConfig]) -> None:
    wrong = []
    for name, given in scorers.items():
        if given.replicas < 1:
            wrong.append(f"{name} has {given.replicas} replicas; give at least 1.")
    if wrong:
        raise ScoringError("\n  ".join(wrong))


def _check_numbers(given: argparse.Namespace) -> None:
    least = {"batch": 1, "changed": 0, "resamples": 100, "seed": 0}
    named = vars(given)
    wrong = [
        f"{flag(name)} is {named[name]}; choose at least {low}." for name, low in least.items() if named[name] < low
    ]
    if wrong:
        raise ScoringError("\n  ".join(wrong))


def _run(scorers: dict[str, ScorerConfig], output: Path, given: argparse.Namespace) -> None:
    # Both folders are looked at before anything is scored.
    listed = read_listed(given)
    folder = _read(Path(given.samples), given.allow_missing, listed)
    other = open_other(Path(given.compare), scorers, given.allow_missing, listed) if given.compare else None
    scored, text = evaluate(folder, scorers, output, given)
    print(text)
    if isinstance(other, SampleFolder):
        other = evaluate(other, scorers, output / "compared", given)[0]
    if other is not None:
        print(compare_with(other, scored, output, given))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user's mistake, reported without a traceback."""
    prepare()
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    if len(overrides) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in overrides)}")
    output = Path(given.output)
    try:
        check_flags(given)
        _check_numbers(given)
        named = RewardsConfig(read_scorers(given, overrides))
        with lock_output(output), reserved(named, trainer=False) as (placed, lines):
            for line in lines:
                _say(line)
            _run(placed.scorers, output, given)
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
