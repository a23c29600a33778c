"""The demo page in a real browser: what it draws, scores and says; whom it talks to; who may see it."""

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from browser import PHONE, Browser, open_browser
from PIL import Image
from running import ROOT, environment
from selenium.webdriver.common.keys import Keys

from rewards_bridge.scorers.shapes import ShapesScorer
from scripts import demo
from scripts.demo_models import DemoError, Wish, checked_wish, sharing_programs
from udm_grpo.host.checkpoint import Checkpoints
from udm_grpo.host.shapes import all_prompts, heldout_prompts
from udm_grpo.pipeline import Pipeline, load_pipeline

SHAPES = str(ROOT / "udm_grpo" / "assets" / "ursa-shapes")
COMMAND = next(line for line in (ROOT / "README.md").read_text().splitlines() if "-m scripts.demo" in line)
STRANGE = "a photo of a <b>cat</b> ${1+1} <img src=http://192.0.2.1/x.png>"
STEPS = 3


class Proxy:
    """Notes what asks to be sent to another machine; the requests themselves go nowhere."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(200))

    def close(self) -> None:
        self._listener.close()


@dataclass(frozen=True)
class Server:
    """A running demo."""

    process: subprocess.Popen
    address: str


def start(folder: Path, words: list[str], proxy: Proxy) -> subprocess.Popen:
    """Start a demo that writes its address and everything else to folder/log."""
    folder.mkdir(parents=True)
    names = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy"), proxy.address)
    given = environment() | names | {"TMPDIR": str(folder), "NO_PROXY": "", "no_proxy": ""}
    with (folder / "log").open("w") as log:
        return subprocess.Popen([sys.executable, *words, "--port=0"], cwd=ROOT, env=given, stdout=log, stderr=log)


def until_serving(process: subprocess.Popen, folder: Path) -> Server:
    deadline = time.monotonic() + 300
    while True:
        log = (folder / "log").read_text()
        found = re.search(r"^(http\S+)$", log, re.MULTILINE)
        if found:
            return Server(process, found[1])
        assert process.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.05)


@pytest.fixture(scope="module")
def models() -> dict[str, Pipeline]:
    """The shipped checkpoint, and one that draws otherwise."""
    base = load_pipeline(SHAPES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) * (1 + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32)),
        base.checkpoint.transformer,
    )
    return {"Base": base, "Trained": Pipeline(replace(base.checkpoint, transformer=params))}


@pytest.fixture(scope="module")
def run(models: dict[str, Pipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo reads of a training run."""
    output = tmp_path_factory.mktemp("runs") / "shapes"
    output.mkdir()
    model = {"path": SHAPES, "text_length": 0, "height": 32, "width": 32, "dtype": "float32"}
    (output / "config.json").write_text(json.dumps({"model": model, "optimizer": {"ema_decay": 0.0}}))
    state = {"state": {"params": models["Trained"].checkpoint.transformer}}
    Checkpoints(output / "checkpoints", keep=1).save(7, state, {})
    return output


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


@pytest.fixture(scope="module")
def servers(run: Path, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """The README's command, and a base alone with a password; both start at the same time."""
    folder = tmp_path_factory.mktemp("servers")
    (folder / "users").write_text("ann:sesame:1\n\nbob:open\n")
    both = COMMAND.replace("outputs/shapes", str(run)).split()[1:]
    alone = ["-m", "scripts.demo", f"--base={SHAPES}", "--scorer=jpeg", f"--auth-file={folder / 'users'}"]
    alone += ["--height=32", "--width=64"]
    places = [folder / "both", folder / "alone"]
    started = [start(place, words, proxy) for place, words in zip(places, (both, alone), strict=True)]
    try:
        yield [until_serving(process, place) for process, place in zip(started, places, strict=True)]
    finally:
        for process in started:
            process.terminate()
        ends = [process.wait(60) for process in started]
    assert ends == [0, 0], [(place / "log").read_text() for place in places]
    for place in places:
        assert not list(place.glob("rewards-bridge-*")), "the scorer's socket is left"
        assert "Traceback" not in (place / "log").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


def wait(browser: Browser, script: str, *values: object) -> None:
    deadline = time.monotonic() + 120
    while not browser.run(f"return {script}", *values):
        assert time.monotonic() < deadline, (
            f"{script}\n{browser.console()}\n{browser.run('return document.body.innerText')}"
        )
        time.sleep(0.05)


def fill(browser: Browser, selector: str, text: str) -> None:
    field = browser.driver.find_element("css selector", selector)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text, Keys.TAB)


def open_page(browser: Browser, address: str, *size: tuple[int, int]) -> None:
    browser.open(address, *size)
    wait(browser, "!!document.querySelector('#draw')")


def press_draw(browser: Browser) -> dict[str, np.ndarray]:
    """Draw, and wait for the answer; the pictures by model."""
    before = browser.run("return document.querySelector('#drawn')?.dataset.number ?? ''")
    browser.run("document.querySelector('#draw').click()")
    wait(browser, "(document.querySelector('#drawn')?.dataset.number ?? '') !== arguments[0]", before)
    found = browser.run(
        "return [...document.querySelectorAll('[data-side]')].map((side) =>"
        " [side.dataset.side, [...side.querySelectorAll('img')].map((one) => one.src)])"
    )
    return {name: np.stack([decoded(source) for source in sources]) for name, sources in found}


def decoded(source: str) -> np.ndarray:
    start, _, data = source.partition(",")
    assert start == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def text_of(browser: Browser, selector: str) -> str:
    return browser.run("return document.querySelector(arguments[0]).innerText", selector)


def test_both_models_draw_from_the_same_noise_and_are_scored(browser, servers, proxy, models):
    address = servers[0].address
    open_page(browser, address)
    metadata = next(row for row in heldout_prompts() if row["prompt"] == "a photo of a triangle left of a star")
    examples = browser.run(
        "return [...document.querySelectorAll('#examples button')].map((one) => one.innerText.trim())"
    )
    assert metadata["prompt"] in examples
    assert set(examples) <= {row["prompt"] for row in heldout_prompts()}

    browser.run(
        "arguments[0].click()",
        browser.driver.find_elements("css selector", "#examples button")[examples.index(metadata["prompt"])],
    )
    wait(
        browser, "document.querySelector('#prompt textarea, #prompt input').value === arguments[0]", metadata["prompt"]
    )
    fill(browser, "#steps input[type=number]", str(STEPS))
    fill(browser, "#seed input", "5")
    first = press_draw(browser)
    assert text_of(browser, "#drawn") == f"“{metadata['prompt']}”, {STEPS} steps, no guidance, seed 5"
    means = []
    rows = browser.run(
        "return [...document.querySelectorAll('#scores tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    for column, (name, pipeline) in enumerate(models.items(), 1):
        drawn = pipeline.generate([metadata["prompt"]] * 4, STEPS, 1.0, 5, height=32, width=32)
        np.testing.assert_array_equal(first[name], drawn)
        scores = ShapesScorer().score(drawn, [metadata["prompt"]] * 4, [metadata] * 4)
        for row, score, reason in zip(rows, scores.score, scores.reasons, strict=False):
            assert float(row[column].split()[0]) == pytest.approx(float(score), abs=6e-4)
            assert reason in row[column]
        means.append(float(rows[4][column]))
        assert means[-1] == pytest.approx(float(scores.score.mean()), abs=6e-4)
    assert (first["Base"] != first["Trained"]).any()
    assert f"{means[0]:g}" in text_of(browser, "[data-side=Base] .demo-mean")

    second = press_draw(browser)
    assert all((second[name] == first[name]).all() for name in first)
    browser.run("document.querySelector('#new-seed').click()")
    wait(browser, "document.querySelector('#seed input').value !== '5'")
    third = press_draw(browser)
    assert all((third[name] != first[name]).any() for name in first)
    assert browser.console() == []
    assert all(request.startswith(address) for request in browser.requests())
    assert proxy.asked == []


def test_prompts_that_cannot_be_drawn_or_scored(browser, servers, proxy):
    address = servers[0].address
    open_page(browser, address)
    browser.run("document.querySelector('#draw').click()")
    wait(browser, "document.body.innerText.includes('There is no prompt. Write one, or choose an example.')")
    fill(browser, "#steps input[type=number]", str(STEPS))
    fill(browser, "#prompt textarea, #prompt input", STRANGE)
    found = press_draw(browser)
    assert [images.shape for images in found.values()] == [(4, 32, 32, 3)] * 2
    row = {"tag": "untagged", "prompt": STRANGE}
    assert text_of(browser, ".demo-note") == (
        f"The scorer shapes cannot score this prompt: {ShapesScorer().problem(STRANGE, row)}"
    )
    assert browser.run("return document.querySelector('#scores')") is None
    assert browser.run("return document.querySelectorAll('#answer b, #answer img:not([src^=data])').length") == 0
    assert browser.console() == []
    assert all(request.startswith(address) for request in browser.requests())
    assert proxy.asked == []


def test_the_page_fits_a_phone(browser, servers):
    open_page(browser, servers[0].address, PHONE)
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    fill(browser, "#steps input[type=number]", str(STEPS))
    fill(browser, "#prompt textarea, #prompt input", "a photo of a yellow square and a black circle")
    assert press_draw(browser).keys() == {"Base", "Trained"}
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    lefts = browser.run(
        "return ['Base', 'Trained'].map((name) => [...document.querySelectorAll(`[data-side=${name}] img`)]"
        ".map((one) => Math.round(one.getBoundingClientRect().top)))"
    )
    assert lefts[0] == lefts[1], "the same noise stands in the same row"
    assert browser.console() == []


def test_a_base_alone_behind_a_password(browser, servers, proxy):
    address = servers[1].address
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}config", timeout=60)
    browser.open(address)
    wait(browser, "document.querySelectorAll('input').length >= 2")
    user, password = browser.driver.find_elements("css selector", "input, textarea")[:2]
    user.send_keys("ann")
    password.send_keys("sesame:1", Keys.ENTER)
    wait(browser, "!!document.querySelector('#draw') && !!document.querySelector('#untrained')")
    assert "No trained model yet" in text_of(browser, "#untrained")
    assert COMMAND in text_of(browser, "#untrained")
    fill(browser, "#prompt textarea, #prompt input", "no shapes at all")
    fill(browser, "#steps input[type=number]", "1")
    found = press_draw(browser)
    assert found["Base"].shape == (4, 32, 64, 3)
    assert text_of(browser, "#scores").count("jpeg_kilobytes") == 4
    assert all(request.startswith(address) for request in browser.requests())
    assert proxy.asked == []


def test_an_exported_folder_shares_the_programs_of_its_base(models, tmp_path):
    models["Trained"].save(tmp_path / "export")
    given = demo._parser().parse_args(["--base", SHAPES, "--trained", str(tmp_path / "export")])
    drawers, size = demo.open_models(given)
    assert size == (32, 32)
    base, trained = (drawer.pipeline for drawer in drawers)
    assert trained.compiled is base.compiled
    assert demo.open_models(demo._parser().parse_args(["--base", SHAPES, "--scorer=jpeg"]))[1] == (256, 256)
    other = replace(base, checkpoint=replace(base.checkpoint, scheduler=replace(base.checkpoint.scheduler, c=1.0)))
    assert sharing_programs(base, replace(other, compiled={})).compiled is not base.compiled


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("  ", 25, 1, 0), "There is no prompt"),
        ((None, 25, 1, 0), "There is no prompt"),
        (("x" * 2001, 25, 1, 0), "2001 characters. Write at most 2000"),
        (("x", 51, 1, 0), "Steps is 51. Choose 1 to 50"),
        (("x", 2.5, 1, 0), "Steps is 2.5. Choose a whole number"),
        (("x", 25, 0.5, 0), "Guidance is 0.5. Choose 1 to 8"),
        (("x", 25, float("nan"), 0), "Guidance is nan"),
        (("x", 25, 1, None), "Seed is empty. Choose 0 to 4294967295"),
        (("x", 25, 1, -1), "Seed is -1"),
        (("x", 25, 1, "1"), "Seed is '1'"),
    ],
)
def test_bad_input_is_refused(fields, said):
    with pytest.raises(DemoError, match=re.escape(said)):
        checked_wish(*fields)


def test_good_input_is_taken():
    assert checked_wish(" a  photo\nof a star ", 50.0, 1.5, 2**32 - 1) == Wish("a photo of a star", 50, 1.5, 2**32 - 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host=0.0.0.0",), "--host is 0.0.0.0, which other machines can reach; give --auth-file FILE"),
        (("--host=::",), "--host is ::, which other machines can reach"),
        (("--auth-file=nowhere",), "nowhere"),
        (("--auth-file={bad}",), "line 2, 3 is not USER:PASSWORD"),
        (("--auth-file={empty}",), "there is no line USER:PASSWORD"),
        (("--tls-cert=x.pem",), "--tls-cert and --tls-key belong together"),
        (("--tls-cert={bad}", "--tls-key={bad}"), "are no certificate and its key"),
        (("--port=70000",), "--port is 70000; choose 0 to 65535"),
        (("--port={taken}",), "cannot listen on 127.0.0.1, port {taken}"),
        (("--steps=0",), "--steps is 0; choose 1 to 50"),
        (("--step=3",), "--step chooses from a training run"),
        (("--option=x",), "--option 'x': wanted KEY=VALUE"),
        (("--port=0", "--base=nowhere"), "nowhere"),
        (("--port=0", "--run={empty}"), "is no training run"),
        (("--port=0", "--height=33"), "--height 33 and --width 32 must be multiples of 8"),
        (("--port=0", "--scorer=nobody"), "unknown scorer 'nobody'"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(tmp_path, capsys, words, said):
    (tmp_path / "bad").write_text("ann:sesame\nbob\n:open\n")
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names = {name: tmp_path / name for name in ("bad", "empty")} | {"taken": listener.getsockname()[1]}
        assert demo.main([f"--base={SHAPES}", *(word.format(**names) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said.format(**names) in error
    assert "sesame" not in error


def test_a_page_for_others_wants_tls_as_well(tmp_path):
    (tmp_path / "users").write_text("ann:sesame\n")
    given = demo._parser().parse_args(["--base=x", "--host=0.0.0.0", f"--auth-file={tmp_path / 'users'}"])
    with pytest.raises(demo.DemoError, match="--tls-cert and --tls-key, or leave --host out"):
        demo.check_access(given)


def test_examples_are_held_out_prompts_of_every_tag():
    held_out = {row["prompt"]: row["tag"] for row in heldout_prompts()}
    found = demo.default_examples()
    assert {held_out[text] for text in found} == {row["tag"] for row in all_prompts()}
    assert len(found) <= 12
