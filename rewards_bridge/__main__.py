"""python -m rewards_bridge serve|score|doctor: serve a scorer, score image files, check what a scorer needs."""

from __future__ import annotations

import argparse
import json
import os
import sys

import numpy as np

from rewards_bridge import doctor
from rewards_bridge.client import BridgeConfig, RewardsClient
from rewards_bridge.errors import USER_ERROR_STATUS, PromptError, UsageError, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.options import parse_pairs, read_file
from rewards_bridge.redaction import guarded, redacted
from rewards_bridge.scorers import SCORERS
from rewards_bridge.server import ServeConfig, serve

CONNECT_S, LOAD_S, SCORE_S = 10.0, 3600.0, 3600.0
"""How long `score` waits for a server, for loading a scorer, and for the score of one image."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; 2, with one line on stderr, for invalid arguments."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # characters that a terminal cannot show become \u00e9
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    has_config = parsed.command == "doctor" and parsed.config
    if rest and not (has_config and all(word.startswith("--config.") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if parsed.command == "serve":
            return serve(_serve_config(parsed))
        if parsed.command == "doctor":
            return _doctor(parsed, rest)
        return _score(parsed)
    except (UserError, OSError) as error:
        print(redacted(f"rewards_bridge {parsed.command}: {error}"), file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return 130


def _doctor(parsed: argparse.Namespace, rest: list[str]) -> int:
    if parsed.config:
        if parsed.scorer or parsed.option or parsed.options_file or parsed.device:
            raise UsageError("--config sets scorers, options and devices; leave --scorer, --option and --device out")
        return doctor.hand_over(parsed.config, rest)
    checks = doctor.Checks(parsed.device, parsed.memory, not parsed.no_load, not parsed.no_check_example)
    return doctor.report(parsed.scorer, _options(parsed), checks)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m rewards_bridge", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="load a scorer and serve it until stopped")
    scoring = commands.add_parser("score", help="score images; print one JSON object per line")
    examining = commands.add_parser("doctor", help="report whether each scorer is ready, and how to fix it if not")
    names = f'{", ".join(sorted(SCORERS))}, or your own "module:Class"'
    examining.add_argument("--scorer", action="append", default=[], help=f"{names}; may be repeated; default: all")
    what = "check everything that this training configuration needs; accepts --config.field=value"
    examining.add_argument("--config", type=_path, metavar="FILE", help=what)
    examining.add_argument("--memory", type=float, metavar="GIB", help="device memory available to the scorer")
    examining.add_argument("--no-load", action="store_true", help="check only packages and memory")
    for command in (serving, scoring):
        command.add_argument("--scorer", required=True, help=names)
    for command in (serving, scoring, examining):
        command.add_argument(
            "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the scorer"
        )
        what = "more options, as a JSON object of texts that other users cannot see; -: first line of standard input"
        command.add_argument("--options-file", metavar="FILE", help=what)
    for command in (serving, examining):
        command.add_argument("--device", help="such as cuda:0; for scorers that take a device, if no option names one")
    serving.add_argument(
        "--memory-fraction", type=float, metavar="PART", help="maximum share of the GPU's memory for PyTorch, 0 to 1"
    )
    serving.add_argument(
        "--deadline", type=float, metavar="S", help="seconds that clients wait for a batch, for scorers that use it"
    )
    serving.add_argument("--listen", required=True, metavar="ADDRESS", help="unix:/path or HOST:PORT (port 0: any)")
    serving.add_argument("--tls-cert", type=_path, metavar="PEM")
    serving.add_argument("--tls-key", type=_path, metavar="PEM")
    serving.add_argument("--token-file", type=_path, metavar="FILE", help="file with the token that clients must send")
    serving.add_argument("--exit-with-parent", action="store_true", help="exit when standard input is closed")
    scoring.add_argument("--prompt", required=True)
    scoring.add_argument("--address", help="of a running server of this scorer; default: start one for these images")
    scoring.add_argument(
        "--tls-ca", type=_path, metavar="PEM", help="certificates to verify a server on another machine"
    )
    scoring.add_argument("--token-file", type=_path, metavar="FILE", help="file with the token of such a server")
    for command in (scoring, examining):
        command.add_argument(
            "--no-check-example", action="store_true", help="only warn if a scorer gets its own test images wrong"
        )
    scoring.add_argument("--metadata", default="{}", metavar="JSON")
    scoring.add_argument("images", type=_path, nargs="+", metavar="IMAGE")
    return parser


def _path(text: str) -> str:
    return os.path.expanduser(text)  # shells do not expand the ~ in --token-file=~/x


def _serve_config(parsed: argparse.Namespace) -> ServeConfig:
    return ServeConfig(
        scorer=parsed.scorer,
        listen=parsed.listen,
        options=_options(parsed),
        tls_cert=parsed.tls_cert,
        tls_key=parsed.tls_key,
        token_file=parsed.token_file,
        exit_with_parent=parsed.exit_with_parent,
        device=parsed.device,
        memory_fraction=parsed.memory_fraction,
        deadline_s=parsed.deadline,
    )


def _options(parsed: argparse.Namespace) -> dict[str, str]:
    """Return the options of --options-file and --option; the latter take precedence."""
    return {**(read_file(parsed.options_file) if parsed.options_file else {}), **parse_pairs(parsed.option)}


def _score(parsed: argparse.Namespace) -> int:
    try:
        metadata = json.loads(parsed.metadata)
    except ValueError as error:
        raise UsageError(f"--metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise UsageError(f"--metadata must be a JSON object; found {parsed.metadata}")
    pictures = [_read_picture(path) for path in parsed.images]
    with RewardsClient(_client_config(parsed)) as client:
        for text in client.warnings():
            print(f"rewards_bridge score: warning: {text}", file=sys.stderr)
        try:
            problem = client.check([parsed.prompt], [metadata]).get(0)
        except ValueError as error:  # a prompt or metadata that cannot be sent
            raise UsageError(str(error)) from error
        if problem:
            raise PromptError(f"the prompt and its --metadata cannot be scored: {problem}")
        for note in client.notes([parsed.prompt], [metadata]).values():
            print(f"rewards_bridge score: warning: the prompt: {note}", file=sys.stderr)
        client.try_out(parsed.prompt, metadata, *pictures[0].shape[:2])
        for path, pixels in zip(parsed.images, pictures, strict=True):
            scores = client.submit(pixels[None], [parsed.prompt], [metadata]).result()
            line = {
                "image": path,
                "scorer": parsed.scorer,
                "score": float(scores.score[0]),
                "raw": {name: float(values[0]) for name, values in scores.raw.items()},
                "reasons": scores.reasons[0],
            }
            print(json.dumps(line), flush=True)
    return 0


def _read_picture(path: str) -> np.ndarray:
    from rewards_bridge.picture_files import PictureError, read_picture  # only `score` needs Pillow

    try:
        picture = read_picture(path)
    except PictureError as error:
        raise UsageError(f"cannot score {path}: it {error}") from error
    if picture.is_transparent:
        print(f"rewards_bridge score: warning: {path} is partly transparent and is scored on white", file=sys.stderr)
    return picture.pixels


def _client_config(parsed: argparse.Namespace) -> BridgeConfig:
    """Return the config of the server at --address or of a process of our own, with the checks that training makes."""
    timeout_s = CONNECT_S if parsed.address else LOAD_S
    return BridgeConfig(
        scorer=parsed.scorer,
        options=_options(parsed),
        address=parsed.address or None,
        deadline_s=SCORE_S,
        start_timeout_s=timeout_s,
        max_restarts=0,
        tls_ca=parsed.tls_ca,
        token_file=parsed.token_file,
        check_example=not parsed.no_check_example,
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
