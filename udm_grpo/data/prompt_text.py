"""Decode prompt files into lines, and clean the texts of prompts, so that both are as a person would read them.

    text = decode(path.read_bytes())           # UTF-8, UTF-16 or UTF-32, with or without a byte order mark
    for number, line in enumerate(lines_of(text), start=1): ...
    clean("a\\u00a0red\\u200b circle ")         # "a red circle"

Bytes that are not UTF-8 stay in the text as lone surrogates, so that `undecodable` can report their line.
"""

import codecs
import re
import unicodedata

from rewards_bridge.errors import UserError


class PromptsError(UserError, ValueError):
    """Prompts, or files or sets of them, that cannot be read or used; the message says which and why."""


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_SAMPLE = 1 << 16
"""Bytes that are examined to detect an encoding without a byte order mark."""

_SPACES = "\t\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f"
_UNSEEN = "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
"""Invisible characters that do not change how other characters look (as joiners in emoji do)."""
_ALSO_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u200c\u200d\u2800\ufe00-\ufe0f\U000e0000-\U000e0fff"
"""Characters without a shape of their own: a text of these alone is blank."""

_ODD = re.compile(f"[{_SPACES}{_UNSEEN}]")
_REMOVED = re.compile(f"[{_UNSEEN}]+")
_SPACED = re.compile(f" *[{_SPACES}][ {_SPACES}]*")
_BLANK = re.compile(f"[\\s{_SPACES}{_UNSEEN}{_ALSO_BLANK}]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")


def decode(raw: bytes) -> str:
    """Return the text of a file; a byte 0xNN that is not UTF-8 becomes the character U+DCNN.

    Raises PromptsError for truncated or damaged UTF-16 and UTF-32.
    """
    encoding, start = next(((name, len(mark)) for mark, name in _MARKS if raw.startswith(mark)), ("", 0))
    encoding = encoding or _encoding_by_zeros(raw[:_SAMPLE])
    if encoding == "utf-8":
        return raw[start:].decode("utf-8", "surrogateescape")
    try:
        return raw[start:].decode(encoding)
    except UnicodeDecodeError as error:
        raise PromptsError(
            f"invalid {encoding[:-3].upper()} text: {error.reason} at byte {start + error.start}; "
            "save the file as UTF-8"
        ) from None


def _encoding_by_zeros(raw: bytes) -> str:
    """Detect UTF-16 and UTF-32 by the zero bytes of ASCII letters; UTF-8 if there are few."""
    if not raw:
        return "utf-8"
    zeros = [raw[place::4].count(0) * 4 / len(raw) for place in range(4)]
    if min(zeros[1:]) > 0.9 or min(zeros[:3]) > 0.9:
        return "utf-32-le" if zeros[0] < zeros[3] else "utf-32-be"
    even, odd = (zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2
    if max(even, odd) > 0.4 and min(even, odd) < 0.05:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def lines_of(text: str) -> list[str]:
    """Return the lines without their ends: LF, CR LF or, in a text without any LF, CR.

    White space after the last line end does not count as a line.
    """
    lines = text.split("\n") if "\n" in text else text.split("\r")
    lines = [line.removesuffix("\r") for line in lines]
    return lines if lines[-1].strip() else lines[:-1]


def undecodable(text: str) -> str:
    """Return a message about the first byte that could not be decoded; "" if there is none."""
    match = _SURROGATE.search(text)
    if match is None:
        return ""
    byte = ord(match[0]) - 0xDC00
    meant = bytes([byte & 0xFF]).decode("cp1252", "ignore")
    hint = f" ({meant} in Windows-1252)" if meant.isprintable() and meant else ""
    return f"not UTF-8 text: byte 0x{byte:02x}{hint} at character {match.start() + 1}; save the file as UTF-8"


def is_blank(text: str) -> bool:
    """Return whether a text consists of white space and invisible characters only."""
    return _BLANK.fullmatch(text) is not None


def is_comment(line: str) -> bool:
    """Return whether a line is a comment: "#" alone or before white space ("#1 dad" and "#art" are not comments)."""
    return line == "#" or line.startswith(("# ", "#\t"))


def control_character(text: str) -> str:
    """Return which control character a text holds and where, or ""; line breaks and tabs are allowed."""
    match = _CONTROL.search(text)
    if match is None:
        return ""
    code = ord(match[0])
    name = {0: "NUL", 7: "BEL", 8: "BACKSPACE", 11: "VERTICAL TAB", 12: "FORM FEED", 27: "ESC", 127: "DEL"}.get(
        code, ""
    )
    return f"the control character U+{code:04X}{f' ({name})' if name else ''} at character {match.start() + 1}"


def clean(text: str) -> str:
    """Return a prompt as it is seen: tabs and special spaces become one plain space, invisible characters are removed.

    Line breaks (as LF) and plain spaces within a text are kept; letters, accents and emoji stay as encoded.
    """
    text = text.replace("\r\n", "\n").strip()
    if _ODD.search(text) is None:
        return text
    return _SPACED.sub(" ", _REMOVED.sub("", text)).strip()


def same_text(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, white space or the encoding of their letters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
