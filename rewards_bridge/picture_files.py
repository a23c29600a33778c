"""Read image files for scoring: PNG, JPEG and WebP, checked before they are decoded.

`rewards_bridge score` and `udm_grpo.evaluate` both use this module, so that a file yields the same pixels in either.
No other decoder of Pillow ever runs (the one for EPS would start Ghostscript).
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
"""Largest file size; the largest accepted picture takes 192 MiB uncompressed."""
LARGE_PIXELS = 1 << 24
"""Pictures with more pixels than this are decoded one at a time, regardless of the number of threads."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")  # 8 bits per channel
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
"""First bytes of files that are often mistaken for supported pictures -> what they are."""
_one_large_picture = threading.Lock()


class PictureError(ValueError):
    """A file that cannot be scored as a picture; the message gives the reason without the file name."""


@dataclass(frozen=True)
class DecodedPicture:
    """A decoded picture, ready for scoring."""

    pixels: np.ndarray
    """u8[H,W,3], upright."""
    is_transparent: bool
    """Whether part of the picture was transparent; that part is white in `pixels`."""


def read_picture(path: str | Path, sides: int = 1) -> DecodedPicture:
    """Return the picture in a file; sides is that of decode_picture. Raises PictureError."""
    return decode_picture(read_content(path), sides)


def read_content(path: str | Path) -> bytes:
    """Return the bytes of a picture file; raises PictureError if it cannot be read or is too large."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise PictureError(f"has more than {MAX_FILE_BYTES} bytes, the maximum file size")
    return content


def decode_picture(content: bytes, sides: int = 1) -> DecodedPicture:
    """Return the picture in the bytes of a file; raises PictureError.

    The EXIF orientation is applied, as in GenEval's evaluation. 16-bit channels keep their upper 8 bits; grey and
    palette images become RGB; transparent parts are blended onto white. CMYK, floating-point and animated pictures are
    rejected. sides: how many pictures are side by side in the file; each of them may have MAX_SIDE pixels per side.
    """
    # Decoders raise almost any error for damaged files: OSError, SyntaxError, struct.error, IndexError, MemoryError ...
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
        raise PictureError(f"is not a {NAMED} file: {_what(content)}") from None


def _what(content: bytes) -> str:
    """Return a description of bytes that are not a supported picture."""
    if not content:
        return "it is empty (0 bytes)"
    if content.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")):
        return "it starts like one, but is damaged or truncated"
    kinds = [kind for start, kind in _OTHER_FILES.items() if content.lstrip()[:64].startswith(start)]
    return f"it is {kinds[0]}; convert it" if kinds else f"it starts with {content[:8]!r}"


def _check_header(picture: Image.Image, limit: int) -> None:
    """Raise PictureError for a picture that its header alone rules out."""
    width, height = picture.size
    if not (0 < width <= limit and 0 < height <= limit):
        raise PictureError(f"is {width} x {height} pixels; expected sides of 1 to {limit} pixels: resize it")
    if picture.mode == "CMYK":
        raise PictureError("has the mode CMYK (printing inks), whose colors depend on a profile; convert it to RGB")
    if picture.mode not in (*_MODES, *_GREY16):
        raise PictureError(f"has the mode {picture.mode}; expected grey, palette or RGB with 8 or 16 bits per channel")
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # MPO: a camera's JPEG followed by a preview or a gain map
        raise PictureError(f"is animated ({frames} frames); save the frame to be scored as a separate file")


def _check_chunks(content: bytes) -> None:
    """Raise PictureError for a PNG whose pixels or palette have a wrong checksum, which Pillow ignores."""
    at = 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if kind[:1].isupper() and content[end : end + 4] != zlib.crc32(content[at + 4 : end]).to_bytes(4, "big"):
            raise PictureError(f"is damaged: a chunk {kind.decode('latin-1')} has a wrong checksum or is truncated")
        if kind == b"IEND":
            return
        at = end + 4
    raise PictureError("is truncated: a PNG must end with a chunk IEND")


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
