"""python -m rewards_bridge serve|score: hold a scorer for a trainer, or score a few images by hand."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import KNOWN, load_scorer
from rewards_bridge.server import ServeConfig, serve


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 and one line on stderr if its arguments cannot work."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "serve":
            return serve(_serve_config(parsed))
        return _score(parsed)
    except UsageError as error:
        print(f"rewards_bridge {parsed.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rewards_bridge", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="load a scorer and serve it until stopped")
    scoring = commands.add_parser("score", help="score images in this process, one JSON object a line")
    for command in (serving, scoring):
        command.add_argument("--scorer", required=True, help=f'{", ".join(sorted(KNOWN))}, or your own "module:Class"')
        command.add_argument(
            "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the scorer"
        )
    serving.add_argument("--listen", required=True, metavar="ADDRESS", help="unix:/path or HOST:PORT (port 0: any)")
    serving.add_argument("--tls-cert", metavar="PEM")
    serving.add_argument("--tls-key", metavar="PEM")
    serving.add_argument("--token-file", metavar="FILE", help="callers have to know this token")
    serving.add_argument("--exit-with-parent", action="store_true", help="end when standard input ends")
    scoring.add_argument("--prompt", required=True)
    scoring.add_argument("--metadata", default="{}", metavar="JSON")
    scoring.add_argument("images", nargs="+", metavar="IMAGE")
    return parser


def _serve_config(parsed: argparse.Namespace) -> ServeConfig:
    return ServeConfig(
        scorer=parsed.scorer,
        listen=parsed.listen,
        options=_options(parsed.option),
        tls_cert=parsed.tls_cert,
        tls_key=parsed.tls_key,
        token_file=parsed.token_file,
        exit_with_parent=parsed.exit_with_parent,
    )


def _options(pairs: list[str]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--option {pair!r}: wanted KEY=VALUE")
        options[key] = value
    return options


def _score(parsed: argparse.Namespace) -> int:
    from PIL import Image  # only this command reads image files

    try:
        metadata = json.loads(parsed.metadata)
    except ValueError as error:
        raise UsageError(f"--metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise UsageError(f"--metadata has to be a JSON object; found {parsed.metadata}")
    scorer = load_scorer(parsed.scorer, _options(parsed.option))
    for path in parsed.images:
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise UsageError(f"cannot read image {path}: {error}") from error
        scores = scorer.score(pixels[None], [parsed.prompt], [metadata])
        line = {
            "image": path,
            "scorer": parsed.scorer,
            "score": float(scores.score[0]),
            "raw": {name: float(values[0]) for name, values in scores.raw.items()},
            "reasons": scores.reasons[0],
        }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
