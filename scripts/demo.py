"""Serve a web page that shows the base and the trained model side by side, from the same noise, with their scores.

    python -m scripts.demo --base udm_grpo/assets/ursa-shapes --run outputs/shapes
    python -m scripts.demo --base udm_grpo/assets/ursa-shapes --trained outputs/shapes/export --scorer jpeg --port 7861
    python -m scripts.demo --base URSA-1.7B-IBQ512 --transformer checkpoint-100 --scorer jpeg

Without a trained model the page shows the base alone. Which prompts can be scored depends on the scorer: `shapes` takes
prompts of its own world, `jpeg`, `pickscore` and others any prompt. Only this machine can reach the page; to serve
others, set --host, --auth-file, --tls-cert and --tls-key. Neither the page nor its server contacts any other machine:
there are no external fonts, no telemetry and no share link.
"""

import argparse
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rewards_bridge import transport
from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from rewards_bridge.scorers import SCORERS
from scripts.demo_models import Demo, DemoError, Drawer, sharing_programs
from udm_grpo.config import RewardsConfig, ScorerConfig
from udm_grpo.devices import check_devices, prepare
from udm_grpo.files.places import check_flags
from udm_grpo.machine.gpu_split import reserved
from udm_grpo.pipeline import Pipeline, load_pipeline
from udm_grpo.sample import open_run
from udm_grpo.scoring.rewards import bridge_configs
from udm_grpo.worlds import shapes

SHAPES_SIZE = 32  # pixels of the shapes world


def default_examples() -> list[str]:
    """Return held-out prompts of the shapes world: at most four of each tag, spread over its list."""
    prompts: dict[str, list[str]] = {}
    for row in shapes.heldout_prompts():
        prompts.setdefault(row["tag"], []).append(row["prompt"])
    return [text for tag, texts in prompts.items() for text in texts[:: 20 if tag == "color_attr" else 6][:4]]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="FOLDER", required=True, help="base model in the released format")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--trained", metavar="FOLDER", help="trained model: the export/ of a training run")
    trained.add_argument(
        "--transformer",
        metavar="FILE|FOLDER",
        help="trained weights for --base: a .safetensors or .bin, its folder, or a checkpoint-N of the public release",
    )
    trained.add_argument("--run", metavar="OUTPUT_DIR", help="training run, at its latest checkpoint")
    parser.add_argument("--step", help="checkpoint of --run: a number, latest (the default) or best")
    names = f'{", ".join(sorted(SCORERS))}, or your own "module:Class"'
    parser.add_argument("--scorer", default="shapes", help=f"{names} (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the scorer")
    parser.add_argument(
        "--devices",
        metavar="GPU",
        default="",
        help="device of the scorer: a GPU that the models do not use, auto (the last GPU, else the CPU), cpu or shared",
    )
    parser.add_argument("--no-check-example", action="store_true", help="only warn if the scorer fails its self-test")
    parser.add_argument(
        "--example",
        action="append",
        metavar="PROMPT",
        help="example prompt to click on; may be repeated (default: held-out prompts of the shapes world)",
    )
    size = f"pixels (default: the run's, else {SHAPES_SIZE} with the scorer shapes, else 32 tokens)"
    parser.add_argument("--height", type=int, help=size)
    parser.add_argument("--width", type=int, help=size)
    parser.add_argument("--steps", type=int, default=25, help="initial value of the slider (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port; 0: any free one (default: %(default)s)")
    parser.add_argument("--auth-file", metavar="FILE", help="file with a line USER:PASSWORD for every user")
    parser.add_argument("--tls-cert", metavar="PEM", help="TLS certificate of the server")
    parser.add_argument("--tls-key", metavar="PEM", help="private key of --tls-cert")
    return parser


def check_access(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (user, password) pairs, none if the page needs no login; raises DemoError, OSError."""
    if not 0 <= args.port <= 65535:
        raise DemoError(f"--port is {args.port}; choose 0 to 65535.")
    if not 1 <= args.steps <= 50:
        raise DemoError(f"--steps is {args.steps}; choose 1 to 50.")
    if args.step and not args.run:
        raise DemoError("--step selects a checkpoint of a training run; name the run with --run OUTPUT_DIR.")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise DemoError("--tls-cert and --tls-key belong together; one of them is missing.")
    if args.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.tls_cert, args.tls_key)
        except OSError as error:
            raise DemoError(
                f"--tls-cert {args.tls_cert} and --tls-key {args.tls_key} are not a certificate and its key: {error}"
            ) from error
    host = f"[{args.host}]" if ":" in args.host else args.host
    if not transport.is_local(f"{host}:{args.port}") and not (args.auth_file and args.tls_cert):
        raise DemoError(
            f"--host is {args.host}, which other machines can reach; set --auth-file FILE with lines "
            "USER:PASSWORD, --tls-cert and --tls-key, or leave --host out."
        )
    return read_users(Path(args.auth_file)) if args.auth_file else []


def read_users(file: Path) -> list[tuple[str, str]]:
    """Return the USER:PASSWORD lines of a file; raises OSError, and DemoError that names bad lines by number only."""
    users, bad = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        user, _, password = line.strip().partition(":")
        if user and password:
            users.append((user, password))
        elif line.strip():
            bad.append(str(number))
    if bad or not users:
        problem = f"line {', '.join(bad)} is not" if bad else "there is no line"
        raise DemoError(f"--auth-file {file}: {problem} USER:PASSWORD; write one such line for every user.")
    return users


def read_options(pairs: Sequence[str]) -> dict[str, str]:
    """Return the options KEY=VALUE as a dictionary; raises DemoError."""
    bad = [pair for pair in pairs if not pair.partition("=")[0] or "=" not in pair]
    if bad:
        raise DemoError(f"--option {bad[0]!r}: expected KEY=VALUE.")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def read_scorer(args: argparse.Namespace) -> ScorerConfig:
    """Return the scorer of the command line; raises DemoError for invalid options or devices."""
    devices = tuple(word.strip() for word in args.devices.split(",")) if args.devices else ()
    if len(devices) - ("shared" in devices) > 1:
        raise DemoError(f"--devices is {args.devices}; the demo scores in one process, so name one GPU.")
    return ScorerConfig(
        scorer=args.scorer,
        options=read_options(args.option),
        devices=devices,
        check_example=not args.no_check_example,
    )


def open_models(args: argparse.Namespace) -> tuple[list[Drawer], tuple[int, int]]:
    """Return the models of the page, base first, and the height and width of its images; raises as loading does."""
    base = load_pipeline(args.base)
    side = SHAPES_SIZE if args.scorer == "shapes" else 32 * base.stride
    sizes: dict[str, Any] = {"height": side, "width": side}
    drawers = [Drawer("Base", args.base, base)]
    if args.trained:
        drawers.append(Drawer("Trained", args.trained, sharing_programs(base, load_pipeline(args.trained))))
    elif args.transformer:
        trained = load_pipeline(args.base, transformer=args.transformer)
        drawers.append(Drawer("Trained", args.transformer, sharing_programs(base, trained)))
    elif args.run:
        model = open_run(args.run, args.step)
        sizes |= {name: model.defaults[name] for name in sizes}
        source = f"{args.run}, iteration {model.source['step']}"
        drawers.append(Drawer("Trained", source, sharing_programs(base, Pipeline(model.released))))
    return drawers, (args.height or sizes["height"], args.width or sizes["width"])


def serve(demo: Demo, args: argparse.Namespace, users: list[tuple[str, str]], listener: socket.socket) -> None:
    """Serve the page until the process is interrupted or terminated."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    import uvicorn

    from scripts.demo_page import make_app

    app = make_app(demo, args.example or default_examples(), args.steps, users)
    config = uvicorn.Config(
        app,
        log_level="warning",
        ssl_certfile=args.tls_cert,
        ssl_keyfile=args.tls_key,
        timeout_graceful_shutdown=1,  # an open page never closes its connection
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"http{'s' if args.tls_cert else ''}://{shown}:{port}/", flush=True)
    # uvicorn raises the signal again when it ends; as a KeyboardInterrupt it lets the scorer's process end in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise DemoError(f"cannot listen on {host}, port {port} ({error}); choose another --host or --port.") from error
    with listener:
        yield listener


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user's mistake, reported without a traceback."""
    prepare()
    args = _parser().parse_args(argv)
    try:
        check_flags(args, ("base", "trained", "run"))
        users = check_access(args)
        scorer = {args.scorer: read_scorer(args)}
        with reserved(RewardsConfig(scorer)) as (placed, lines), _listening(args.host, args.port) as listener:
            print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)
            check_devices()
            drawers, size = open_models(args)
            (config,) = bridge_configs(args.scorer, placed.scorers[args.scorer], None)
            with closing(Demo(drawers, size, config)) as demo:
                serve(demo, args, users, listener)
    except KeyboardInterrupt:
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
