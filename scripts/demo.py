"""A page in the browser: a prompt, the base and the trained model side by side from the same noise, and their scores.

    python -m scripts.demo --base udm_grpo/assets/ursa-shapes --run outputs/shapes
    python -m scripts.demo --base udm_grpo/assets/ursa-shapes --trained outputs/shapes/export --scorer jpeg --port 7861
    python -m scripts.demo --base URSA-1.7B-IBQ512 --transformer checkpoint-100 --scorer jpeg

Without a trained model the page shows the base alone. Scores need what the scorer needs: `shapes` prompts of its world,
`jpeg`, `pickscore` and the like any prompt. Only this machine can reach the page; for others give --host, --auth-file,
--tls-cert and --tls-key. The page and its server ask nobody else for anything: fonts, telemetry, a link to share.
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
    """Held-out prompts of the shapes world, two of each tag that has them, `color_attr` more often."""
    found: dict[str, list[str]] = {}
    for row in shapes.heldout_prompts():
        found.setdefault(row["tag"], []).append(row["prompt"])
    return [text for tag, texts in found.items() for text in texts[:: 20 if tag == "color_attr" else 6][:4]]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="FOLDER", required=True, help="a checkpoint in the released format")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--trained", metavar="FOLDER", help="another: the export/ of a training run")
    trained.add_argument(
        "--transformer",
        metavar="FILE|FOLDER",
        help="trained weights for --base: a .safetensors or .bin, its folder, or a checkpoint-N of the public release",
    )
    trained.add_argument("--run", metavar="OUTPUT_DIR", help="a training run, at its latest checkpoint")
    parser.add_argument("--step", help="of --run: a number, latest (the default) or best")
    names = f'{", ".join(sorted(SCORERS))}, or your own "module:Class"'
    parser.add_argument("--scorer", default="shapes", help=f"{names} (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the scorer")
    parser.add_argument(
        "--devices",
        metavar="GPU",
        default="",
        help="of the scorer: a GPU that the models leave alone; auto (the last one, else the CPU), cpu or shared",
    )
    parser.add_argument("--no-check-example", action="store_true", help="only warn if the scorer gets its tests wrong")
    parser.add_argument(
        "--example", action="append", metavar="PROMPT", help="to click on (default: held-out ones of the shapes world)"
    )
    size = f"pixels (default: the run's, else {SHAPES_SIZE} with the scorer shapes, else 32 tokens)"
    parser.add_argument("--height", type=int, help=size)
    parser.add_argument("--width", type=int, help=size)
    parser.add_argument("--steps", type=int, default=25, help="where the slider stands at first (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one (default: %(default)s)")
    parser.add_argument("--auth-file", metavar="FILE", help="a line USER:PASSWORD for everyone who may see the page")
    parser.add_argument("--tls-cert", metavar="PEM")
    parser.add_argument("--tls-key", metavar="PEM")
    return parser


def check_access(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Users and passwords, none if everyone on this machine may come in; raises DemoError, OSError."""
    if not 0 <= given.port <= 65535:
        raise DemoError(f"--port is {given.port}; choose 0 to 65535.")
    if not 1 <= given.steps <= 50:
        raise DemoError(f"--steps is {given.steps}; choose 1 to 50.")
    if given.step and not given.run:
        raise DemoError("--step chooses from a training run; give it as --run OUTPUT_DIR.")
    if (given.tls_cert is None) != (given.tls_key is None):
        raise DemoError("--tls-cert and --tls-key belong together; one of them is missing.")
    if given.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(given.tls_cert, given.tls_key)
        except OSError as error:
            raise DemoError(
                f"--tls-cert {given.tls_cert} and --tls-key {given.tls_key} are no certificate and its key: {error}"
            ) from error
    host = f"[{given.host}]" if ":" in given.host else given.host
    if not transport.is_local(f"{host}:{given.port}") and not (given.auth_file and given.tls_cert):
        raise DemoError(
            f"--host is {given.host}, which other machines can reach; give --auth-file FILE with lines "
            "USER:PASSWORD, --tls-cert and --tls-key, or leave --host out."
        )
    return read_users(Path(given.auth_file)) if given.auth_file else []


def read_users(file: Path) -> list[tuple[str, str]]:
    """Return the lines USER:PASSWORD of a file; raises DemoError naming bad ones by number alone, OSError."""
    users, bad = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        user, _, password = line.strip().partition(":")
        if user and password:
            users.append((user, password))
        elif line.strip():
            bad.append(str(number))
    if bad or not users:
        found = f"line {', '.join(bad)} is not" if bad else "there is no line"
        raise DemoError(f"--auth-file {file}: {found} USER:PASSWORD; write one such line for everyone who may come in.")
    return users


def read_options(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE by key; raises DemoError."""
    bad = [pair for pair in pairs if not pair.partition("=")[0] or "=" not in pair]
    if bad:
        raise DemoError(f"--option {bad[0]!r}: wanted KEY=VALUE.")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def read_scorer(given: argparse.Namespace) -> ScorerConfig:
    """Return the scorer of the command line; raises DemoError for options or devices that cannot be."""
    devices = tuple(word.strip() for word in given.devices.split(",")) if given.devices else ()
    if len(devices) - ("shared" in devices) > 1:
        raise DemoError(f"--devices is {given.devices}; one process scores here, so give one GPU.")
    return ScorerConfig(
        scorer=given.scorer,
        options=read_options(given.option),
        devices=devices,
        check_example=not given.no_check_example,
    )


def open_models(given: argparse.Namespace) -> tuple[list[Drawer], tuple[int, int]]:
    """Return the models of the page, base first, and the height and width of its pictures; raises as loading does."""
    base = load_pipeline(given.base)
    side = SHAPES_SIZE if given.scorer == "shapes" else 32 * base.stride
    sizes: dict[str, Any] = {"height": side, "width": side}
    drawers = [Drawer("Base", given.base, base)]
    if given.trained:
        drawers.append(Drawer("Trained", given.trained, sharing_programs(base, load_pipeline(given.trained))))
    elif given.transformer:
        trained = load_pipeline(given.base, transformer=given.transformer)
        drawers.append(Drawer("Trained", given.transformer, sharing_programs(base, trained)))
    elif given.run:
        model = open_run(given.run, given.step)
        sizes |= {name: model.defaults[name] for name in sizes}
        source = f"{given.run}, iteration {model.source['step']}"
        drawers.append(Drawer("Trained", source, sharing_programs(base, Pipeline(model.released))))
    return drawers, (given.height or sizes["height"], given.width or sizes["width"])


def serve(demo: Demo, given: argparse.Namespace, users: list[tuple[str, str]], listener: socket.socket) -> None:
    """Serve the page until the process is told to end."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
    import uvicorn

    from scripts.demo_page import make_app

    app = make_app(demo, given.example or default_examples(), given.steps, users)
    config = uvicorn.Config(
        app,
        log_level="warning",
        ssl_certfile=given.tls_cert,
        ssl_keyfile=given.tls_key,
        timeout_graceful_shutdown=1,  # an open page holds a connection for ever
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"http{'s' if given.tls_cert else ''}://{shown}:{port}/", flush=True)
    # uvicorn raises the signal again at its end; as KeyboardInterrupt it lets the scorer's process be ended in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise DemoError(f"cannot listen on {host}, port {port} ({error}); give another --host or --port.") from error
    with listener:
        yield listener


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a user's mistake, reported without a traceback."""
    prepare()
    given = _parser().parse_args(argv)
    try:
        check_flags(given, ("base", "trained", "run"))
        users = check_access(given)
        scorer = {given.scorer: read_scorer(given)}
        with reserved(RewardsConfig(scorer)) as (placed, lines), _listening(given.host, given.port) as listener:
            print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)
            check_devices()
            drawers, size = open_models(given)
            (config,) = bridge_configs(given.scorer, placed.scorers[given.scorer], None)
            with closing(Demo(drawers, size, config)) as demo:
                serve(demo, given, users, listener)
    except KeyboardInterrupt:
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
