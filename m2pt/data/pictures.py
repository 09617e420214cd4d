"""Converts pictures of every Pillow mode to RGB of eight bits, as a person sees them."""

from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpositions that Exif's orientations ask for."""


def as_seen(picture: Image.Image) -> Image.Image:
    """A picture of any of Pillow's modes in RGB, as a person sees it: upright, and over white where it is transparent.

    Integers of 16 bits range to 65535, or as far as a TIFF file says. Floats and integers of 32 bits do not say what is
    white: they range from 0 to 1 (floats only), 255 or 65535 if all lie there, otherwise from the smallest to the
    largest.

    Raises:
        ValueError: it holds values that are not finite.
    """
    picture.load()
    turn = TURNS.get(_orientation(picture))
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _in_eight_bits(picture)
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow has no error of its own for damaged Exif data, and the picture may be whole
        return None


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in grey levels, following what a TIFF file says about its bits, their sign and its white."""
    tags = getattr(picture, "tag_v2", {})
    bits, kind = (tags.get(tag, (None,))[0] for tag in (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT))
    values = np.asarray(picture)
    if picture.mode == "I" and (bits, kind or 1) == (32, 1):
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    black, white = values.min(), values.max()
    if not np.isfinite([black, white]).all():
        raise ValueError("it holds values that are not finite")
    if picture.mode.startswith("I;16"):
        black, white = 0, 2 ** (bits or 16) - 1
    elif black >= 0:
        usual = (1, 255, 65535) if picture.mode == "F" else (255, 65535)
        black, white = next(((0, most) for most in usual if white <= most), (black, white))
    scaled = (values - black) * (255 / max(white - black, np.finfo(float).tiny))
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        scaled = 255 - scaled
    if "transparency" in picture.info:
        scaled[values == picture.info["transparency"]] = 255
    return Image.fromarray(np.round(scaled).astype(np.uint8))
