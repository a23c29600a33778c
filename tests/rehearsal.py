"""Run the pages' commands as a user would: by bash, in a folder like a fresh clone, in the order of the page.

Only smaller sizes and fewer iterations are appended to a command. RULES lists what is appended to which command, and on
how many virtual devices and processes it runs. Downloads come from the stand-ins (standins.py, standin_downloads.py).
"""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pages import Command, commands
from running import COMPILED_QUICKLY, ROOT, environment, free_port

TESTS = Path(__file__).resolve().parent
LIMIT_S = float(os.environ.get("UDM_GRPO_REHEARSAL_LIMIT_S", "400"))
"""Time limit of one command."""


@dataclass(frozen=True)
class Rule:
    """How to run the commands that match a pattern.

    append: text added to the command: sizes, counts, paths, and {remote}, which starts the recipe's scorer behind TLS
    and a token and is replaced by the settings that reach it; before: a command that creates what a page expects the
    user to have. how: run (to its end), serve (until it listens, and in the background until the page's end), elsewhere
    (by `test`). devices, processes: of jax, with `devices` per process; optimised: keep XLA's optimisations, as for one
    device if the stage is not quick; statuses: exit statuses of success.
    """

    pattern: str
    append: str = ""
    before: str = ""
    how: str = "run"
    devices: int = 1
    processes: int = 1
    optimised: bool = False
    statuses: tuple[int, ...] = (0,)
    test: str = ""
    """For how="elsewhere": the test that runs the command, file::function or a file."""


def rule_for(command: Command, rules: tuple[Rule, ...]) -> Rule | None:
    """Return the first rule whose pattern matches a command."""
    return next((rule for rule in rules if re.search(rule.pattern, command.text)), None)


@dataclass
class Stage:
    """A folder to run commands in, and the servers that are running there."""

    folder: Path
    downloads: Path
    servers: list[subprocess.Popen] = field(default_factory=list)
    seconds: list[tuple[float, str]] = field(default_factory=list)
    remotes: dict[str, str] = field(default_factory=dict)
    """Scorer -> address of its server."""
    quick: bool = False
    """Compile programs for one device without XLA's optimisations, too, unless their rule asks for them."""

    def play(self, command: Command, rule: Rule) -> str:
        """Run a command by its rule; return its standard output, that of several processes concatenated."""
        text = f"{command.text} {rule.append}".strip()
        if "{remote}" in text:
            text = text.replace("{remote}", self.remote(command.page))
        began = time.monotonic()
        try:
            if rule.before:
                self.run(rule.before)
            if rule.how == "serve":
                return self.serve(text)
            if rule.processes > 1:
                return self.run_together(text, rule)
            return self.run(text, rule)
        finally:
            self.seconds.append((time.monotonic() - began, text))

    def run(self, text: str, rule: Rule = Rule("")) -> str:
        """Run a shell command to its end; fail unless its exit status is one of the rule's."""
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=self.folder,
            env=self.environment(rule),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if done.returncode not in rule.statuses:
            said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
            pytest.fail(f"exit status {done.returncode} of\n  {text}\n{said}", False)
        return done.stdout

    def run_together(self, text: str, rule: Rule) -> str:
        """Run a command in several processes that form one run."""
        port = free_port()
        processes, logs = [], []
        for index in range(rule.processes):
            logs.append(self.folder / f"process-{index}.log")
            own = f" --config.distributed.coordinator=127.0.0.1:{port} --config.distributed.process_id={index}"
            own += f" --config.distributed.processes={rule.processes}"
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        ["bash", "-c", text + own],
                        cwd=self.folder,
                        env=self.environment(rule),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            statuses = [process.wait(LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        said = [log.read_text() for log in logs]
        if any(statuses):
            pytest.fail(f"exit statuses {statuses} of\n  {text}\n" + "\n".join(one[-5000:] for one in said), False)
        return "".join(said)

    def serve(self, text: str) -> str:
        """Start a server that runs until the end of the stage; return the line with its address."""
        log, errors = (self.folder / f"server-{len(self.servers)}.{ending}" for ending in ("log", "err"))
        with log.open("w") as file, errors.open("w") as more:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"],
                cwd=self.folder,
                env=self.environment(Rule("")),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=more,
            )
        self.servers.append(process)
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end and process.poll() is None:
            listening = re.search(r".*(?:serving on |https?://).*\n", log.read_text())
            if listening:
                return listening[0]
            time.sleep(0.1)
        pytest.fail(f"not listening (status {process.poll()}):\n  {text}\n{errors.read_text()[-5000:]}", False)

    def remote(self, name: str) -> str:
        """Start a recipe's scorer behind TLS and a token unless it is running; return the settings that reach it."""
        if name not in self.remotes:
            secrets = self.folder / "secrets"
            if not secrets.is_dir():
                make_secrets(secrets)
            config = importlib.import_module(f"configs.{name}").get_config().rewards.scorers[name]
            options = "".join(f" --option {key}={value}" for key, value in config.options.items())
            command = f"python -m rewards_bridge serve --scorer {name}{options} --listen localhost:0"
            said = self.serve(f"{command} --tls-cert {CERTIFICATE} --tls-key {KEY} --token-file {TOKEN}")
            self.remotes[name] = f"localhost:{said.strip().rpartition(':')[2]}"
        fields = {"addresses": self.remotes[name], "tls_ca": CERTIFICATE, "token_file": TOKEN}
        return " ".join(f"--config.rewards.scorers.{name}.{field}={value}" for field, value in fields.items())

    def environment(self, rule: Rule) -> dict[str, str]:
        """Return a user's environment with only the virtual devices, the shared cache and the stand-ins added."""
        quick = (rule.devices > 1 or rule.processes > 1 or self.quick) and not rule.optimised
        left_out = {"PYTHONPATH", *COMPILED_QUICKLY}
        variables = {name: value for name, value in environment(rule.devices).items() if name not in left_out}
        variables |= COMPILED_QUICKLY if quick else {}
        variables |= {"STANDINS": str(self.downloads), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        return variables | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(self.folder)}

    def close(self) -> None:
        """End the servers."""
        for process in self.servers:
            process.send_signal(signal.SIGTERM)
        for process in self.servers:
            process.wait(60)


def play_page(user: Stage, page: str) -> dict[str, str]:
    """Run every command of a page in order, by rehearsal_rules.py; return the standard output of each."""
    from rehearsal_rules import RULES  # here, since that module imports Rule

    said = {}
    for command in commands(page):
        rule = rule_for(command, RULES[page])
        assert rule, f"no rule in rehearsal_rules.py matches: {command.text}"
        if rule.how != "elsewhere":
            said[command.text] = user.play(command, rule)
    return said


CERTIFICATE, KEY, TOKEN = "secrets/cert.pem", "secrets/key.pem", "secrets/token"


def make_secrets(folder: Path) -> None:
    """Create a certificate for localhost, its key and a token."""
    folder.mkdir()
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    (folder / "token").write_text("a-token-that-nobody-guesses\n")


@contextlib.contextmanager
def stage(place: Path) -> Iterator[Stage]:
    """Create a user's folder below `place` with only links to the project's files and tools that download stand-ins."""
    import standins  # here, since it imports torch, which tests that only read the pages do not need

    folder, downloads = place / "clone", standins.make(place / "network")
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("outputs", "models", "data", "runs") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("hf", "curl", "wget", "pip"):
        _script(tools / tool, f'exec {sys.executable} {TESTS}/standin_downloads.py {tool} "$@"')
    python = f'if [ "$1 $2" = "-m pip" ]; then shift 2; exec pip "$@"; fi\nexec {sys.executable} "$@"'
    _script(tools / "python", python)
    opened = Stage(folder, downloads)
    try:
        yield opened
    finally:
        opened.close()
        for seconds, text in opened.seconds:
            print(f"{seconds:6.1f} s  {text}")


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
