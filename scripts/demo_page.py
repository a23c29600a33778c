"""The demo page: the form in Gradio, the answers as HTML. Every text is escaped, never inserted as markup."""

import base64
import html
import io
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from scripts.demo_guard import Guard
from scripts.demo_models import (
    MAX_CHARACTERS,
    MAX_GUIDANCE,
    MAX_STEPS,
    Answer,
    Demo,
    DemoError,
    Side,
    checked_wish,
)
from udm_grpo.worlds.shapes import heldout_prompts

STYLE = (Path(__file__).resolve().parent / "demo.css").read_text(encoding="utf-8")
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
"""Fonts of the reader's system; the page loads none."""
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; base-uri 'self'; form-action 'self'"
"""The browser may load from this server only. Gradio's styles and templates need the two "unsafe" keywords."""
HOW_TO_TRAIN = """\
python -m udm_grpo.train --config configs/shapes.py
python -m scripts.demo --base udm_grpo/assets/ursa-shapes --run outputs/shapes"""


def theme() -> gr.themes.Base:
    """Return the page's colours and fonts."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", radius_size="lg", font=FONTS[0], font_mono=FONTS[1]
    )


class OwnLoadsOnly:
    """Wraps an ASGI app so that its pages can load nothing from other servers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def make_app(demo: Demo, examples: Iterable[str], steps: int, users: list[tuple[str, str]]) -> OwnLoadsOnly:
    """Return the page as an ASGI app that requires a login if there are users; see `make_page`."""
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        make_page(demo, examples, steps),
        "/",
        auth=users or None,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css=STYLE,
    )
    return OwnLoadsOnly(Guard(app, only_local=not users))


def make_page(demo: Demo, examples: Iterable[str], steps: int) -> gr.Blocks:
    """Return the page of these models; `steps` is the initial value of its slider."""

    def draw(
        prompt: Any,
        negative: Any,
        steps_value: Any,
        guidance: Any,
        seed: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> str:
        try:
            wish = checked_wish(prompt, steps_value, guidance, seed, negative)
        except DemoError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        return answer_html(demo, demo.answer(wish, lambda part, what: progress(part, desc=what)))

    shown = list(examples)
    with gr.Blocks(title="Base and trained, side by side", analytics_enabled=False) as page:
        gr.HTML(_head(demo), elem_id="head")
        prompt = gr.Textbox(
            label="Prompt", placeholder="a photo of ...", lines=1, max_length=MAX_CHARACTERS, elem_id="prompt"
        )
        held_out = {row["prompt"] for row in heldout_prompts()}
        label = "Prompts that no training has seen" if held_out.issuperset(shown) else "Prompts to choose from"
        gr.Examples([[text] for text in shown], prompt, label=label, elem_id="examples", examples_per_page=20)
        with gr.Row(equal_height=True):
            slider = gr.Slider(1, MAX_STEPS, steps, step=1, label="Steps", elem_id="steps", min_width=220)
            guidance = gr.Slider(
                1, MAX_GUIDANCE, 1, step=0.5, label="Guidance (1: none)", elem_id="guidance", min_width=220
            )
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=110)
                another = gr.Button("New seed", elem_id="new-seed", min_width=110)
        negative = gr.Textbox(
            label="Negative prompt (with guidance)", lines=1, max_length=MAX_CHARACTERS, elem_id="negative"
        )
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        answer = gr.HTML(_waiting(demo), elem_id="answer")
        another.click(_new_seed, None, seed, queue=False, api_visibility="private")
        gr.on(
            [button.click, prompt.submit],
            draw,
            [prompt, negative, slider, guidance, seed],
            answer,
            concurrency_limit=1,
            scroll_to_output=True,
            api_visibility="private",
        )
    page.queue(max_size=16)
    return page


def _new_seed() -> int:
    return random.randrange(1_000_000)


def _head(demo: Demo) -> str:
    shown = (
        "The same prompt from the same noise, before and after training" if len(demo.drawers) > 1 else "The base alone"
    )
    return (
        '<div class="demo-head"><h1>Base and trained, side by side</h1>'
        f"<p>{shown}; every picture is judged by the scorer <b>{html.escape(demo.scorer)}</b>.</p></div>"
    )


def _waiting(demo: Demo) -> str:
    """Return the placeholder of the answer."""
    empty = '<div class="demo-empty">Choose an example or write a prompt, then Draw.</div>'
    return _both([empty] * len(demo.drawers), len(demo.drawers))


def _both(parts: list[str], models: int) -> str:
    if models == 1:
        parts = [*parts, _untrained()]
    return f'<div class="demo-sides{" one" if models == 1 else ""}">{"".join(parts)}</div>'


def _untrained() -> str:
    return (
        '<section class="demo-side" id="untrained"><header><h2>No trained model yet</h2></header>'
        '<p class="demo-quiet">Train one, in a quarter of an hour on two CPU cores, and start this page with it:</p>'
        f"<pre>{html.escape(HOW_TO_TRAIN)}</pre>"
        '<p class="demo-quiet">or give a folder as <code>--trained outputs/shapes/export</code>.</p></section>'
    )


def answer_html(demo: Demo, answer: Answer) -> str:
    """Return the images and the scores with their reasons, or the reason why there are no scores."""
    wish = answer.wish
    sources = [drawer.source for drawer in demo.drawers]
    sides = [_side(side, source, wish.prompt) for side, source in zip(answer.sides, sources, strict=True)]
    notes = "".join(f'<p class="demo-note">{html.escape(text)}</p>' for text in (answer.problem, *answer.notes) if text)
    guided = f"guidance {wish.guidance:g}" if wish.guidance > 1 else "no guidance"
    guided += f" against “{wish.negative}”" if wish.negative else ""
    settings = f"“{wish.prompt}”, {wish.steps} steps, {guided}, seed {wish.seed}"
    # The number makes every answer different: Gradio does not update the page when an answer equals the last one.
    line = f'<p class="demo-quiet" id="drawn" data-number="{answer.number}">{html.escape(settings)}</p>'
    return line + _both(sides, len(sides)) + notes + _table(answer)


def _side(side: Side, source: str, prompt: str) -> str:
    shown = html.escape(source, quote=True)
    figures = []
    for number, image in enumerate(side.images):
        score = "" if side.scores is None else f"<b>{_short(side.scores.score[number])}</b>"
        label = html.escape(f"{prompt}: picture {number + 1} of {side.name}", quote=True)
        small = ' class="small"' if max(image.shape) < 200 else ""
        caption = f"<figcaption><span>{number + 1}</span>{score}</figcaption>"
        figures.append(f'<figure><img{small} alt="{label}" src="{_address(image)}">{caption}</figure>')
    mean = "" if side.scores is None else f"{_short(np.mean(side.scores.score))} <small>mean score</small>"
    return (
        f'<section class="demo-side" data-side="{html.escape(side.name, quote=True)}"><header>'
        f'<h2>{html.escape(side.name)}</h2><span class="demo-mean">{mean}</span>'
        f'<span class="demo-quiet demo-source" title="{shown}">{shown}</span></header>'
        f'<div class="demo-pictures">{"".join(figures)}</div></section>'
    )


def _address(image: np.ndarray) -> str:
    """Return the image as a data URL, losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(answer: Answer) -> str:
    judged = [(side.name, side.scores) for side in answer.sides if side.scores is not None]
    if not judged:
        return ""
    titles = "".join(f"<th>{html.escape(name)}</th>" for name, _ in judged)
    rows = []
    for number in range(len(answer.sides[0].images)):
        cells = []
        for _, scores in judged:
            raw = ", ".join(f"{name} {_short(values[number])}" for name, values in scores.raw.items())
            texts = [text for text in (scores.reasons[number], raw) if text]
            small = "".join(f"<small>{html.escape(text)}</small>" for text in texts)
            cells.append(f"<td><b>{_short(scores.score[number])}</b>{small}</td>")
        rows.append(f"<tr><th>{number + 1}</th>{''.join(cells)}</tr>")
    means = "".join(f"<td>{_short(np.mean(scores.score))}</td>" for _, scores in judged)
    rows.append(f"<tr><th>Mean</th>{means}</tr>")
    head = f"<thead><tr><th>No.</th>{titles}</tr></thead>"
    return f'<table class="demo-table" id="scores">{head}<tbody>{"".join(rows)}</tbody></table>'


def _short(value: Any) -> str:
    """Return a number with at most three decimals."""
    return f"{float(value):.3f}".rstrip("0").rstrip(".")
