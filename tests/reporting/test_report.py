"""The report's page as a browser shows it: two runs compared, one alone, on a desktop and on a phone."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import DESKTOP, PHONE, Browser, open_browser
from PIL import Image
from report_runs import MARKUP, PROMPTS, TAGS, evaluation, write_run

from udm_grpo.report import main

REWARD = '[data-chart="Reward"]'
POINTS = "return (document.querySelector(arguments[0]).getAttribute('d').match(/[ML]/g) || []).length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a whole run and one that was killed at iteration 9."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "whole"), write_run(folder / "killed", iterations=9, seed=1, side=120)]


@pytest.fixture(scope="module")
def alone(runs: list[Path]) -> str:
    """Return the address of the report of the whole run, at its default path."""
    assert main([str(runs[0])]) == 0
    return (runs[0] / "report.html").as_uri()


@pytest.fixture(scope="module")
def both(runs: list[Path]) -> str:
    """Return the address of the report of both runs."""
    output = runs[0].parent / "both.html"
    assert main([*map(str, runs), "--output", str(output)]) == 0
    return output.as_uri()


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)", selector)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def four_digits(value: float) -> str:
    return f"{value:.4g}"


def test_this_browser_tells_of_errors_and_of_loads(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>nothing()</script>")
    browser.open(page.as_uri())
    assert browser.requests() == [page.as_uri(), "http://127.0.0.1:9/x.png"]
    assert any("nothing is not defined" in line for line in browser.console())


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("which", ["alone", "both"])
def test_the_page_logs_nothing_loads_nothing_and_fits_its_window(browser, request, which, size):
    address = request.getfixturevalue(which)
    browser.open(address, size)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= size[0]
    browser.tap(".picture") if size == PHONE else browser.driver.find_element("css selector", ".picture").click()
    assert browser.run("return document.querySelector('dialog').open")
    wide = browser.run(
        """const inBox = (one) => one.closest(".scroll, .strip");
        return [...document.querySelectorAll("body *")].filter((one) => !inBox(one)
            && one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML.slice(0, 200));"""
    )
    assert wide == []
    assert browser.requests() == [address]
    assert browser.console() == []
    assert browser.run("return window.broken") is None


def test_a_prompt_with_markup_is_shown_as_text(browser, alone):
    browser.open(alone)
    assert MARKUP in browser.run("return [...document.querySelectorAll('figcaption')].map((one) => one.textContent)")
    judged = texts(browser, ".judged .card")
    assert any(MARKUP in text and "two <i>squares</i>" in text for text in judged)
    assert any(PROMPTS[3] in text for text in judged)
    assert browser.run("return document.querySelectorAll('main script, main b b, main i').length") == 0


def test_curves_have_a_point_for_every_line_of_the_metrics(browser, alone):
    browser.open(alone)
    browser.run("document.querySelector('details').open = true")
    for title in ("Reward", "KL", "Entropy", "Gradient norm", "raw/strict", "rollout, seconds", "update, seconds"):
        assert browser.run(POINTS, f'[data-chart="{title}"] path.line') == 12, title
    for title in ("all prompts", *TAGS):
        assert browser.run(POINTS, f'[data-chart="{title}"] path.line') == 4, title
    assert browser.run("return document.querySelectorAll('[data-chart] path.line[d*=NaN]').length") == 0


def test_two_runs_lie_over_one_another_and_each_can_be_hidden(browser, both):
    browser.open(both)
    counts = {run: browser.run(POINTS, f'{REWARD} path.line[data-run="{run}"]') for run in (0, 1)}
    assert counts == {0: 12, 1: 9}
    browser.driver.find_element("css selector", ".chip").click()
    hidden = "return [...document.querySelectorAll(arguments[0])].map((one) => one.dataset.run)"
    assert browser.run(hidden, f"{REWARD} path.line") == ["1"]
    assert browser.run(hidden, f'[data-chart="{TAGS[0]}"] path.line') == ["1"]


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_point_under_the_mouse_or_finger_is_told(browser, runs, both, size):
    browser.open(both, size)
    act = browser.tap if size == PHONE else browser.hover
    for step in (1, 7, 12):
        act(f"{REWARD} circle.mark:nth-of-type({step})")
        lines = browser.run("return document.querySelector(arguments[0]).innerText", f"{REWARD} .tip").splitlines()
        expected = [f"iteration {step}", f"whole {four_digits(rows(runs[0])[step - 1]['reward'])}"]
        if step < 12:
            expected.append(f"killed {four_digits(rows(runs[1])[step - 1]['reward'])}")
        assert lines == expected
    act('[data-chart="counting"] circle.mark:nth-of-type(2)')
    tip = browser.run("return document.querySelector('[data-chart=counting] .tip').innerText")
    assert f"whole {four_digits(evaluation(4, 12, 6)['tags']['counting']['strict'])} \N{MIDDLE DOT} 6 prompts" in tip


def test_arrow_keys_move_along_a_curve(browser, runs, alone):
    browser.open(alone)
    browser.run("document.querySelector(arguments[0]).focus()", f"{REWARD} svg")
    for _ in range(3):
        browser.driver.switch_to.active_element.send_keys("\ue014")
    tip = browser.run("return document.querySelector(arguments[0]).innerText", f"{REWARD} .tip")
    assert tip.splitlines() == ["iteration 3", four_digits(rows(runs[0])[2]["reward"])]


def test_smoothing_draws_a_calmer_curve_over_the_true_one(browser, alone):
    browser.open(alone)
    before = browser.run("return document.querySelector(arguments[0]).getAttribute('d')", f"{REWARD} path.line")
    browser.driver.find_element("id", "smoothing").send_keys("\ue010")
    paths = browser.run(
        "return arguments[0].map((name) => document.querySelector(name).getAttribute('d'))",
        [f"{REWARD} path.raw", f"{REWARD} path.line"],
    )
    assert paths[0] == before
    assert paths[1] != before
    assert browser.run(POINTS, f"{REWARD} path.line") == 12


def shown(browser: Browser, selector: str) -> np.ndarray:
    """Return the pixels of a picture that the page shows."""
    source = browser.run("return document.querySelector(arguments[0]).src", selector)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))


def test_the_slider_goes_through_the_same_prompts_moments(browser, runs, both):
    """The pictures of step s have the brightness 40 + 10 s; the killed run stays at its last moment, 8."""
    browser.open(both)
    slider = browser.driver.find_element("css selector", "#moments input")
    blocks = [".pictures[data-run='0']", ".pictures[data-run='1']"]
    for step, other in ((12, 8), (8, 8), (4, 4), (0, 0)):
        assert browser.run("return document.querySelector('#moments output').textContent").startswith(
            f"iteration {step}"
        )
        for block, moment, side in zip(blocks, (step, other), (32, 120), strict=True):
            picture = shown(browser, f"{block} img")
            assert picture.shape == (side, side, 3)
            assert abs(int(picture[side // 2, int(0.3 * side), 0]) - (40 + 10 * moment)) < 4
        slider.send_keys("\ue012")
    assert browser.run("return document.querySelectorAll('.pictures img').length") == 2 * len(PROMPTS)


def test_a_picture_opens_large_with_all_of_its_moments(browser, alone):
    browser.open(alone)
    browser.driver.find_element("css selector", ".picture").click()
    assert texts(browser, "dialog .strip button") == ["base", "4", "8", "final"]
    browser.driver.find_element("css selector", "dialog .strip button:nth-child(2)").click()
    assert shown(browser, "dialog .large")[16, 10, 0] == 80
    assert PROMPTS[0] in texts(browser, "dialog")[0]
    browser.driver.switch_to.active_element.send_keys("\ue00c")
    assert browser.run("return document.querySelector('dialog')") is None


def test_scores_before_and_after_stand_in_a_table(browser, alone):
    browser.open(alone)
    base, final = evaluation(0, 12, 12), evaluation(12, 12, 12)
    cells = [text.split() for text in texts(browser, "[data-results] tbody tr")]
    assert cells[0][-3:] == [
        f"{base['strict']:.3f}",
        f"{final['strict']:.3f}",
        f"+{final['strict'] - base['strict']:.3f}",
    ]
    assert [row[0] for row in cells[1:]] == list(TAGS)
    browser.run(
        """const select = document.querySelector("section select");
        select.value = "score";
        select.dispatchEvent(new Event("change"));"""
    )
    assert f"{final['tags']['counting']['score']:.3f}" in texts(browser, "[data-results=score] tbody tr")[2]


def test_best_and_worst_come_with_scores_and_reasons(browser, alone):
    browser.open(alone)
    worst, best = (texts(browser, f".judged:nth-of-type({place}) .card") for place in (1, 2))
    assert [text.splitlines()[0] for text in worst + best] == ["0.25", "0.5", "1", "0.75"]
    assert 'expected 1 circle, found <0> & "none"' in worst[0]
    assert "strict 0" in worst[0]


def test_of_an_unfinished_run_the_page_shows_what_there_is(browser, runs):
    assert main([str(runs[1])]) == 0
    browser.open((runs[1] / "report.html").as_uri())
    head = texts(browser, "header")[0]
    assert "not finished" in head
    assert "9 of 12 iterations" in head
    assert browser.run("return document.querySelector('[data-results]')") is None
    assert browser.run(POINTS, '[data-chart="all prompts"] path.line') == 3
    assert browser.console() == []


def test_a_run_that_has_only_begun_has_a_page_too(browser, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert main([str(tmp_path)]) == 0
    browser.open((tmp_path / "report.html").as_uri())
    assert "0 of ? iterations" in texts(browser, "header")[0]
    assert browser.console() == []


def test_settings_show_what_differs_and_no_secret(browser, runs, both):
    browser.open(both)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    visible = (
        "return [...document.querySelectorAll('.facts tr:not([hidden])')].map((one) => one.innerText.split('\\t'))"
    )
    differing = {name: values for name, *values in browser.run(visible)[1:]}
    assert differing["seed"] == ["0", "1"]
    assert "iterations" not in differing
    everything = browser.run("return document.querySelector('main').textContent")
    assert "jaxlib" in everything
    assert "rewards.scorers.shapes.options.api_key***" in everything
    assert "sesame" not in Path(runs[0].parent / "both.html").read_text()


def test_the_page_follows_light_and_dark(browser, alone):
    grounds = []
    for dark in (False, True):
        browser.open(alone, dark=dark)
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    light, night = (sum(int(part) for part in ground.strip("rgb()").split(",")) for ground in grounds)
    assert light > 600
    assert night < 150
