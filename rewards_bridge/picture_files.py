"""Read picture files that are to be scored: PNG, JPEG and WebP, checked before they are decoded.

`rewards_bridge score` and `udm_grpo.evaluate` both read pictures here, so that a file gets the same pixels from either.
No other decoder of Pillow is ever started (that of EPS would run Ghostscript).
"""

from __future__ import annotations

import struct
import threading
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rewards_bridge.protocol.messages import MAX_SIDE

FORMATS = ("PNG", "JPEG", "WEBP")
NAMED = "PNG, JPEG or WebP"
MAX_FILE_BYTES = 512 << 20
"""Bytes of a file; the largest picture that is scored takes 192 MiB without any compression."""
LARGE_PIXELS = 1 << 24
"""Pictures with more pixels than this are decoded one at a time, whatever the number of threads."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")  # 8 bits a channel
_GREY16 = ("I;16", "I;16L", "I;16B", "I;16N")
_OTHER_FILES = {
    b"%!PS": "PostScript",
    b"%PDF": "PDF",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"\0\0\1\0": "an icon",
    b"8BPS": "Photoshop",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "gzip",
    b"<": "HTML or XML text",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the picture)",
}
"""First bytes of files that are often taken for pictures -> what they are."""
_one_large_picture = threading.Lock()


class PictureError(ValueError):
    """A file that cannot be scored as a picture; the message says why, without the file's name."""


@dataclass(frozen=True)
class DecodedPicture:
    """A picture as it is scored."""

    pixels: np.ndarray
    """u8[H,W,3], upright."""
    is_transparent: bool
    """Whether a part of the file was transparent; it is white in `pixels`."""


def read_picture(path: str | Path, sides: int = 1) -> DecodedPicture:
    """Return the picture in a file; raises PictureError. sides: see decode_picture."""
    return decode_picture(read_content(path), sides)


def read_content(path: str | Path) -> bytes:
    """Return the bytes of a picture's file; raises PictureError if they cannot be read or are too many."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise PictureError(f"has more than {MAX_FILE_BYTES} bytes, the largest file that is read")
    return content


def decode_picture(content: bytes, sides: int = 1) -> DecodedPicture:
    """Return the picture in the bytes of a file; raises PictureError.

    An EXIF orientation is applied, as GenEval's evaluation does. 16-bit channels keep their upper 8 bits; grey and
    palettes become RGB; transparent parts are laid on white. CMYK, floating-point and animated pictures are refused.
    sides: how many pictures stand beside each other in the file; each of them may have MAX_SIDE pixels a side.
    """
    # Decoders raise almost anything for damaged files: OSError, SyntaxError, struct.error, IndexError, MemoryError, ...
    try:
        with _opened(content) as picture:
            _check_header(picture, sides * MAX_SIDE)
            if picture.format == "PNG":
                _check_chunks(content)
            with _one_large_picture if picture.width * picture.height > LARGE_PIXELS else nullcontext():
                return _pixels(picture)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"is too large ({error}); sides of up to {MAX_SIDE} pixels are scored") from error
    except Exception as error:
        raise PictureError(f"is damaged: {error or type(error).__name__}") from error


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise PictureError(f"is no {NAMED} file: {_what(content)}") from None


def _what(content: bytes) -> str:
    """Return what the bytes of something else than a picture are."""
    if not content:
        return "it is empty (0 bytes)"
    if content.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")):
        return "it begins like one, but is damaged or cut off"
    kinds = [kind for start, kind in _OTHER_FILES.items() if content.lstrip()[:64].startswith(start)]
    return f"it is {kinds[0]}; convert it" if kinds else f"it begins with {content[:8]!r}"


def _check_header(picture: Image.Image, limit: int) -> None:
    """Raise PictureError for what the header alone rules out."""
    width, height = picture.size
    if not (0 < width <= limit and 0 < height <= limit):
        raise PictureError(f"is {width} x {height} pixels; sides of 1 to {limit} can be scored: make it smaller")
    if picture.mode == "CMYK":
        raise PictureError("has the mode CMYK (printing inks), whose colors depend on a profile; convert it to RGB")
    if picture.mode not in (*_MODES, *_GREY16):
        raise PictureError(f"has the mode {picture.mode}; expected grey, palette or RGB with 8 or 16 bits a channel")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a camera's JPEG with a preview or a gain map after the picture
        raise PictureError(f"is animated ({frames} frames); save the one that is to be scored as a picture of its own")


def _check_chunks(content: bytes) -> None:
    """Raise PictureError for a PNG whose pixels or palette have a wrong checksum, which Pillow passes over."""
    at = 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if kind[:1].isupper() and content[end : end + 4] != zlib.crc32(content[at + 4 : end]).to_bytes(4, "big"):
            raise PictureError(f"is damaged: a chunk {kind.decode('latin-1')} has a wrong checksum or is cut off")
        if kind == b"IEND":
            return
        at = end + 4
    raise PictureError("is cut off: a PNG ends with a chunk IEND")


def _pixels(picture: Image.Image) -> DecodedPicture:
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in _GREY16:
        if "transparency" in picture.info:
            raise PictureError("has 16-bit grey with a transparent level; flatten it to plain grey or RGB")
        grey = (np.asarray(upright, np.uint16) >> 8).astype(np.uint8)
        return DecodedPicture(np.repeat(grey[:, :, None], 3, axis=2), is_transparent=False)
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        if layered.getextrema()[3][0] < 255:
            flat = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
            return DecodedPicture(np.asarray(flat.convert("RGB")), is_transparent=True)
    return DecodedPicture(np.asarray(upright.convert("RGB")), is_transparent=False)
