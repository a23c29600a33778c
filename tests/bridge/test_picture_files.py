"""Tests of picture files: `score` and `evaluate` convert the same ones and refuse the same ones."""

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards_bridge import __main__ as bridge_command
from rewards_bridge import picture_files
from rewards_bridge.picture_files import PictureError, decode_picture, read_picture
from udm_grpo.scoring.sample_files import Picture, examine, load_picture

COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GREY = COLORS[:, :, 0]


def encoded(picture: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def bare_png(width: int, height: int) -> bytes:
    """Return a PNG that announces a size but has no pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def colored() -> Image.Image:
    return Image.fromarray(COLORS)


def grey_rgb() -> np.ndarray:
    return np.repeat(GREY[:, :, None], 3, axis=2)


def with_orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(colored(), exif=exif)


def transparent() -> bytes:
    picture = Image.fromarray(np.dstack([COLORS, np.zeros_like(GREY)]))
    return encoded(picture)


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (encoded(colored()), COLORS),
        (encoded(colored(), "WEBP", lossless=True), COLORS),
        (encoded(Image.fromarray(GREY)), grey_rgb()),
        (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), grey_rgb()),
        (encoded(Image.fromarray(grey_rgb()).quantize(256)), grey_rgb()),
        (encoded(Image.fromarray(GREY > 127)), np.where(grey_rgb() > 127, 255, 0)),
        (encoded(Image.fromarray(np.dstack([COLORS, np.full_like(GREY, 255)]))), COLORS),
        (transparent(), np.full_like(COLORS, 255)),
        (with_orientation(6), np.rot90(COLORS, -1)),
        (with_orientation(3), np.rot90(COLORS, 2)),
    ],
)
def test_what_is_converted(tmp_path: Path, content: bytes, pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_picture(content).pixels, pixels)
    (tmp_path / "x.png").write_bytes(content)
    seen = examine(tmp_path, "x.png", 0, 0, {})
    assert isinstance(seen, tuple)
    assert isinstance(seen[0], Picture)
    assert seen[0].size == pixels.shape[1::-1]
    assert seen[1] == (content == transparent())
    np.testing.assert_array_equal(load_picture(tmp_path / "x.png"), pixels)


def animated(kind: str) -> bytes:
    return encoded(colored(), kind, save_all=True, append_images=[Image.new("RGB", (20, 12), "red")])


def with_wrong_checksum() -> bytes:
    content = encoded(colored())
    at = content.index(b"IDAT") + 40
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


REFUSED = {
    "empty": (b"", "it is empty"),
    "text": (b"<!DOCTYPE html>", "it is HTML"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is PostScript"),
    "gif": (animated("GIF"), "it is GIF"),
    "tiff": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "it is TIFF"),
    "bmp": (encoded(colored(), "BMP"), "it is BMP"),
    "cut": (encoded(colored())[:-100], "is damaged: "),
    "cut at its end": (encoded(colored())[:-12], "is truncated"),
    "checksum": (with_wrong_checksum(), "a chunk IDAT has a wrong checksum"),
    "cut in its header": (encoded(colored())[:20], "damaged"),
    "cmyk": (encoded(Image.new("CMYK", (8, 8)), "JPEG"), "has the mode CMYK"),
    "moving png": (animated("PNG"), "is animated (2 frames)"),
    "moving webp": (animated("WEBP"), "is animated (2 frames)"),
    "wide": (bare_png(8193, 1), "is 8193 x 1 pixels"),
    "bomb": (bare_png(20_000, 20_000), "is too large"),
    "zeros after its header": (bare_png(9, 9)[:33] + b"\0" * 100, "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_the_same_words(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, reason = REFUSED[name]
    file = tmp_path / "x.png"
    file.write_bytes(content)
    with pytest.raises(PictureError) as caught:
        read_picture(file)
    assert reason in str(caught.value)
    assert examine(tmp_path, "x.png", 0, 0, {}) == f"{file}: {caught.value}"
    # The scorer does not exist: pictures are read before a scorer is loaded.
    assert bridge_command.main(["score", "--scorer", "no:Such", "--prompt", "x", str(file)]) == 2
    assert capsys.readouterr().err == f"rewards_bridge score: cannot score {file}: it {caught.value}\n"


def test_no_damage_ends_in_another_error() -> None:
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = np.frombuffer(encoded(colored(), kind), np.uint8)
        for _ in range(200):
            content = whole.copy()
            content[draw.integers(0, len(whole), 3)] = draw.integers(0, 256, 3)
            with contextlib.suppress(PictureError):
                decode_picture(content[: draw.integers(1, len(whole) + 1)].tobytes())


def test_files_beyond_the_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MAX_FILE_BYTES", 100)
    (tmp_path / "x.png").write_bytes(bytes(101))
    with pytest.raises(PictureError, match="has more than 100 bytes"):
        read_picture(tmp_path / "x.png")
    with pytest.raises(PictureError, match="cannot be opened: Is a directory"):
        read_picture(tmp_path)


def test_score_says_what_it_makes_of_transparency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clear.png").write_bytes(transparent())
    Image.new("RGB", (20, 12), "white").save(tmp_path / "white.png")
    names = [str(tmp_path / name) for name in ("clear.png", "white.png")]
    assert bridge_command.main(["score", "--scorer", "jpeg", "--prompt", "x", *names]) == 0
    output = capsys.readouterr()
    assert output.err == f"rewards_bridge score: warning: {names[0]} is partly transparent and is scored on white\n"
    first, second = (json.loads(line) for line in output.out.splitlines())
    assert first["score"] == second["score"]
