"""What a picture file looks like: every mode of Pillow's in eight bits of red, green and blue."""

import numpy as np
from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What Exif's orientations ask for."""


def as_seen(picture: Image.Image) -> Image.Image:
    """A picture of any of Pillow's modes in RGB, as a person sees it: upright, and over white where it is transparent.

    Integers of 16 bits count to 65535. Floats and integers of 32 bits do not say what is white: they count from 0 to 1
    (floats only), 255 or 65535, if all lie there, and otherwise from the smallest to the largest.

    Raises:
        ValueError: it holds values that are not finite.
    """
    picture.load()
    picture = _upright(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _in_eight_bits(picture)
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow has no error of its own for damaged Exif data, and the picture may be whole
        return picture
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture, np.float64)
    black, white = values.min(), values.max()
    if not np.isfinite([black, white]).all():
        raise ValueError("it holds values that are not finite")
    if picture.mode.startswith("I;16"):
        black, white = 0, 65535
    elif black >= 0:
        usual = (1, 255, 65535) if picture.mode == "F" else (255, 65535)
        black, white = next(((0, most) for most in usual if white <= most), (black, white))
    scaled = (values - black) * (255 / max(white - black, np.finfo(float).tiny))
    return Image.fromarray(np.round(scaled).astype(np.uint8))
