"""Assemble the report page: markup, style, script and data in one HTML file that loads nothing.

The template has five placeholders, each with its own escaping and two of them hashed for the page's policy, so that
jinja2 would replace one line of this file. The charts are a small script, since a chart library would add a megabyte to
every report.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "report"


def page(data: dict[str, Any], title: str) -> str:
    """Return the HTML of a report. Texts of the data reach the page as text only: they are never markup or script.

    A content security policy allows only this script and style, and pictures embedded in the file.
    """
    style = _read("page.css")
    script = f"(() => {{\n{_read('charts.js')}\n\n{_read('page.js')}\n}})();"  # no global names
    # In JSON these three occur only inside strings, where an escape stands for the same character.
    values = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        values = values.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": values,
        "policy": f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], _read("page.html"))


def _read(name: str) -> str:
    return (TEMPLATE / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
