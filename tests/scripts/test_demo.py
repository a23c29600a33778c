"""The demo page in a real browser: its images, scores and messages, its network requests, and its access control."""

import asyncio
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from browser import PHONE, Browser, open_browser
from pages import manual
from PIL import Image
from running import ROOT, environment
from selenium.webdriver.common.keys import Keys

from rewards_bridge.client import BridgeConfig
from rewards_bridge.scorers.shapes import ShapesScorer
from scripts import demo
from scripts.demo_models import Demo, DemoError, Drawer, Wish, checked_wish, sharing_programs
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.pipeline import Pipeline, load_pipeline
from udm_grpo.worlds.shapes import all_prompts, heldout_prompts

SHAPES = str(ROOT / "udm_grpo" / "assets" / "ursa-shapes")
COMMAND = next(line for line in manual().splitlines() if "-m scripts.demo" in line)
STRANGE = "a photo of a <b>cat</b> ${1+1} <img src=http://192.0.2.1/x.png>"
STEPS = 3
METADATA = next(row for row in heldout_prompts() if row["prompt"] == "a photo of a triangle left of a star")


class Proxy:
    """Records the requests that would leave this machine; they are not forwarded."""

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


def start(folder: Path, words: list[str], proxy: Proxy) -> subprocess.Popen:
    """Start a demo whose output, with its address, goes to folder/log."""
    folder.mkdir(parents=True)
    names = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy"), proxy.address)
    variables = environment() | names | {"TMPDIR": str(folder), "NO_PROXY": "", "no_proxy": ""}
    with (folder / "log").open("w") as log:
        return subprocess.Popen([sys.executable, *words, "--port=0"], cwd=ROOT, env=variables, stdout=log, stderr=log)


def until_serving(process: subprocess.Popen, folder: Path) -> str:
    """Wait until a demo has printed its address; return it."""
    deadline = time.monotonic() + 300
    while True:
        log = (folder / "log").read_text()
        match = re.search(r"^(http\S+)$", log, re.MULTILINE)
        if match:
            return match[1]
        assert process.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.05)


@pytest.fixture(scope="module")
def models() -> dict[str, Pipeline]:
    """The shipped model, and one with perturbed weights."""
    base = load_pipeline(SHAPES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) * (1 + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32)),
        base.released.transformer,
    )
    return {"Base": base, "Trained": Pipeline(replace(base.released, transformer=params))}


@pytest.fixture(scope="module")
def run(models: dict[str, Pipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run, as far as the demo reads it."""
    output = tmp_path_factory.mktemp("runs") / "shapes"
    output.mkdir()
    model = {"path": SHAPES, "text_length": 0, "height": 32, "width": 32, "dtype": "float32"}
    (output / "config.json").write_text(json.dumps({"model": model, "optimizer": {"ema_decay": 0.0}}))
    state = {"state": {"params": models["Trained"].released.transformer}}
    Checkpoints(output / "checkpoints", keep=1).save(7, state, {})
    return output


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    listening = Proxy()
    yield listening
    listening.close()


@pytest.fixture(scope="module")
def started(run: Path, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """The README's command with passwords, still starting: (process, folder of its log)."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "users").write_text("ann:sesame:1\n\nbob:open\n")
    words = COMMAND.replace("outputs/shapes", str(run)).split()[1:]
    process = start(folder / "both", [*words, f"--auth-file={folder / 'users'}"], proxy)
    try:
        yield process, folder / "both"
    finally:
        process.terminate()
        status = process.wait(60)
    log = (folder / "both" / "log").read_text()
    assert status == 0, log
    assert "Traceback" not in log
    assert not list((folder / "both").glob("rewards-bridge-*")), "the scorer's socket was not removed"


@pytest.fixture(scope="module")
def drawn(started: tuple, models: dict[str, Pipeline]) -> dict[str, np.ndarray]:
    """The images that the page should show, sampled here while the server starts."""
    texts = [METADATA["prompt"]] * 4
    return {name: one.generate(texts, STEPS, 1.0, 5, height=32, width=32) for name, one in models.items()}


@pytest.fixture(scope="module")
def server(started: tuple, browser: Browser, drawn: dict[str, np.ndarray]) -> str:
    """The address of the page, in which the browser has logged in."""
    address = until_serving(*started)
    browser.open(address)
    wait(browser, "document.querySelectorAll('input').length >= 2")
    user, password = browser.driver.find_elements("css selector", "input, textarea")[:2]
    user.send_keys("ann")
    password.send_keys("sesame:1", Keys.ENTER)
    wait(browser, "!!document.querySelector('#draw')")
    return address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def wait(browser: Browser, script: str, *values: object) -> None:
    deadline = time.monotonic() + 240
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
    """Open the page and wait until it is complete: Gradio loads its parts one by one."""
    browser.open(address, *size)
    parts = ("#prompt textarea, #prompt input", "#examples button", "#steps input[type=number]", "#seed input")
    for part in (*parts, "#new-seed", "#draw", "#answer .demo-sides"):
        wait(browser, "!!document.querySelector(arguments[0])", part)


def press_draw(browser: Browser) -> dict[str, np.ndarray]:
    """Press Draw and wait for the answer; return the images by model."""
    before = browser.run("return document.querySelector('#drawn')?.dataset.number ?? ''")
    browser.run("document.querySelector('#draw').click()")
    wait(browser, "(document.querySelector('#drawn')?.dataset.number ?? '') !== arguments[0]", before)
    sides = browser.run(
        "return [...document.querySelectorAll('[data-side]')].map((side) =>"
        " [side.dataset.side, [...side.querySelectorAll('img')].map((one) => one.src)])"
    )
    return {name: np.stack([decoded(source) for source in sources]) for name, sources in sides}


def decoded(source: str) -> np.ndarray:
    start, _, data = source.partition(",")
    assert start == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def text_of(browser: Browser, selector: str) -> str:
    return browser.run("return document.querySelector(arguments[0]).innerText", selector)


def test_both_models_draw_from_the_same_noise_and_are_scored(browser, server, proxy, drawn):
    open_page(browser, server)
    examples = browser.run(
        "return [...document.querySelectorAll('#examples button')].map((one) => one.innerText.trim())"
    )
    assert METADATA["prompt"] in examples
    assert set(examples) <= {row["prompt"] for row in heldout_prompts()}

    browser.run(
        "arguments[0].click()",
        browser.driver.find_elements("css selector", "#examples button")[examples.index(METADATA["prompt"])],
    )
    wait(
        browser, "document.querySelector('#prompt textarea, #prompt input').value === arguments[0]", METADATA["prompt"]
    )
    fill(browser, "#steps input[type=number]", str(STEPS))
    fill(browser, "#seed input", "5")
    first = press_draw(browser)
    assert text_of(browser, "#drawn") == f"“{METADATA['prompt']}”, {STEPS} steps, no guidance, seed 5"
    means = []
    rows = browser.run(
        "return [...document.querySelectorAll('#scores tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    for column, (name, images) in enumerate(drawn.items(), 1):
        np.testing.assert_array_equal(first[name], images)
        scores = ShapesScorer().score(images, [METADATA["prompt"]] * 4, [METADATA] * 4)
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
    assert all(request.startswith(server) for request in browser.requests())
    assert proxy.asked == []


def test_prompts_that_cannot_be_drawn_or_scored(browser, server, proxy):
    open_page(browser, server)
    browser.run("document.querySelector('#draw').click()")
    wait(browser, "document.body.innerText.includes('There is no prompt. Write one, or choose an example.')")
    fill(browser, "#steps input[type=number]", str(STEPS))
    fill(browser, "#prompt textarea, #prompt input", STRANGE)
    sides = press_draw(browser)
    assert [images.shape for images in sides.values()] == [(4, 32, 32, 3)] * 2
    row = {"tag": "untagged", "prompt": STRANGE}
    assert text_of(browser, ".demo-note") == (
        f"The scorer shapes cannot score this prompt: {ShapesScorer().problem(STRANGE, row)}"
    )
    assert browser.run("return document.querySelector('#scores')") is None
    assert browser.run("return document.querySelectorAll('#answer b, #answer img:not([src^=data])').length") == 0
    assert browser.console() == []
    assert all(request.startswith(server) for request in browser.requests())
    assert proxy.asked == []


def test_the_page_fits_a_phone(browser, server):
    open_page(browser, server, PHONE)
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    fill(browser, "#steps input[type=number]", str(STEPS))
    fill(browser, "#prompt textarea, #prompt input", "a photo of a yellow square and a black circle")
    assert press_draw(browser).keys() == {"Base", "Trained"}
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    lefts = browser.run(
        "return ['Base', 'Trained'].map((name) => [...document.querySelectorAll(`[data-side=${name}] img`)]"
        ".map((one) => Math.round(one.getBoundingClientRect().top)))"
    )
    assert lefts[0] == lefts[1], "images of the same noise should be in the same row"
    assert browser.console() == []


def test_nobody_comes_in_without_a_password(server):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{server}config", timeout=60)


def test_a_base_alone_says_how_to_get_the_other_and_any_scorer_judges(models, drawn):
    from scripts.demo_page import answer_html, make_page

    async def page_config(shown: Demo) -> dict:
        return make_page(shown, ["a photo of a star"], 25).get_config_file()

    drawers = [Drawer("Base", "<b>somewhere</b>", models["Base"])]
    progress = []
    with closing(Demo(drawers, (32, 32), BridgeConfig(scorer="jpeg"))) as shown:
        page = asyncio.run(page_config(shown))  # Gradio needs an event loop; otherwise it would leave one open
        answer = shown.answer(Wish(METADATA["prompt"], STEPS, 1.0, 5), lambda part, what: progress.append((part, what)))
        long = shown.answer(Wish("star " * 400, STEPS, 1.0, 5), lambda part, what: None)
    assert any(COMMAND in str(part["props"].get("value")) for part in page["components"])
    text = answer_html(shown, answer)
    assert "No trained model yet" in text
    assert "&lt;b&gt;somewhere" in text
    assert "<b>somewhere" not in text
    assert progress == [(0.0, "Base draws"), (0.5, "jpeg scores")]
    assert text.count("jpeg_kilobytes") == 4
    np.testing.assert_array_equal(answer.sides[0].images, drawn["Base"])
    assert "the rest has no effect; shorten them" in answer_html(shown, long)
    assert answer.notes == ()


def test_a_scorer_that_raises_is_told_and_the_pictures_are_shown(models, drawn):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    raising = BridgeConfig(scorer="bridge_scorers:Raise", environment={"PYTHONPATH": paths})
    with closing(Demo([Drawer("Base", "x", models["Base"])], (32, 32), raising)) as shown:
        answer = shown.answer(Wish(METADATA["prompt"], STEPS, 1.0, 5), lambda part, what: None)
    assert answer.sides[0].scores is None
    assert answer.problem.startswith("The scorer bridge_scorers:Raise failed: ")
    assert "the judge is confused by" in answer.problem
    np.testing.assert_array_equal(answer.sides[0].images, drawn["Base"])


def test_an_exported_folder_shares_the_programs_of_its_base(models, tmp_path):
    models["Trained"].save(tmp_path / "export")
    args = demo._parser().parse_args(["--base", SHAPES, "--trained", str(tmp_path / "export")])
    drawers, size = demo.open_models(args)
    assert size == (32, 32)
    base, trained = (drawer.pipeline for drawer in drawers)
    assert trained.compiled is base.compiled
    assert demo.open_models(demo._parser().parse_args(["--base", SHAPES, "--scorer=jpeg"]))[1] == (256, 256)
    other = replace(base, released=replace(base.released, scheduler=replace(base.released.scheduler, c=1.0)))
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
        (("x", 25, 1, 0, "y"), "A negative prompt has no effect without guidance"),
        (("x", 25, 2, 0, "y" * 2001), "The negative prompt has 2001 characters"),
    ],
)
def test_bad_input_is_refused(fields, said):
    with pytest.raises(DemoError, match=re.escape(said)):
        checked_wish(*fields)


def test_good_input_is_taken():
    assert checked_wish(" a  photo\nof a star ", 50.0, 1.5, 2**32 - 1) == Wish("a photo of a star", 50, 1.5, 2**32 - 1)
    assert checked_wish("x", 50, 1.5, 0, " no\nhands ") == Wish("x", 50, 1.5, 0, "no hands")
    assert checked_wish("x", 50, 1, 0, None) == Wish("x", 50, 1, 0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host=0.0.0.0",), "--host is 0.0.0.0, which other machines can reach; set --auth-file FILE"),
        (("--host=::",), "--host is ::, which other machines can reach"),
        (("--auth-file=nowhere",), "nowhere"),
        (("--auth-file={bad}",), "line 2, 3 is not USER:PASSWORD"),
        (("--auth-file={empty}",), "there is no line USER:PASSWORD"),
        (("--tls-cert=x.pem",), "--tls-cert and --tls-key belong together"),
        (("--tls-cert={bad}", "--tls-key={bad}"), "are not a certificate and its key"),
        (("--port=70000",), "--port is 70000; choose 0 to 65535"),
        (("--port={taken}",), "cannot listen on 127.0.0.1, port {taken}"),
        (("--steps=0",), "--steps is 0; choose 1 to 50"),
        (("--step=3",), "name the run with --run OUTPUT_DIR"),
        (("--option=x",), "--option 'x': expected KEY=VALUE"),
        (("--port=0", "--base=nowhere"), "nowhere"),
        (("--port=0", "--run={empty}"), "is not a training run"),
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
    args = demo._parser().parse_args(["--base=x", "--host=0.0.0.0", f"--auth-file={tmp_path / 'users'}"])
    with pytest.raises(DemoError, match="--tls-cert and --tls-key, or leave --host out"):
        demo.check_access(args)


def test_this_machine_comes_in_freely_unless_there_are_users(tmp_path):
    (tmp_path / "users").write_text("ann:sesame:1\n\nbob:open\n")
    assert demo.check_access(demo._parser().parse_args(["--base=x"])) == []
    args = demo._parser().parse_args(["--base=x", f"--auth-file={tmp_path / 'users'}"])
    assert demo.check_access(args) == [("ann", "sesame:1"), ("bob", "open")]


def test_examples_are_held_out_prompts_of_every_tag():
    held_out = {row["prompt"]: row["tag"] for row in heldout_prompts()}
    examples = demo.default_examples()
    assert {held_out[text] for text in examples} == {row["tag"] for row in all_prompts()}
    assert len(examples) <= 12
