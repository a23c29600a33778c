"""Progress bars of the commands."""

import io

import pytest

from udm_grpo.machine import progress
from udm_grpo.machine.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_says_what_is_done_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", 0.0)
    stream = Terminal()
    with progress_bar(2048, "writing", "B", done=512, stream=stream) as bar:
        bar.update(1024)
        bar.refresh()
        bar.update(512)
    assert "writing:  75%" in stream.getvalue()
    assert "2.00k/2.00k" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_elsewhere_and_for_what_is_done_at_once_there_is_none(stream: io.StringIO) -> None:
    with progress_bar(2, "writing", "tensor", stream=stream) as bar:
        bar.update(2)
    assert stream.getvalue() == ""
