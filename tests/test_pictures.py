"""Pictures of every mode of Pillow's, from files, as a person sees them."""

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin
from sklearn.datasets import load_sample_image

from m2pt.data import create_dataset
from m2pt.data.pictures import as_seen

RAMP = np.linspace(0, 255, 64 * 64).round().astype(np.uint8).reshape(64, 64)


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(load_sample_image("flower.jpg")[100:260, 200:440])


def seen(path):
    with Image.open(path) as picture:
        mode = picture.mode
        result = as_seen(picture)
    assert result.mode == "RGB"
    return mode, np.asarray(result).astype(int)


@pytest.mark.parametrize(
    ("mode", "ending", "error"),
    [
        ("RGB", "png", 0),
        ("RGBA", "png", 0),
        ("P", "png", 16),
        ("CMYK", "tif", 1),
        ("CMYK", "jpg", 4),
        ("YCbCr", "tif", 3),
    ],
)
def test_colours(tmp_path, photograph, mode, ending, error):
    """The mean error of a pixel, in grey levels of 255."""
    photograph.convert(mode).save(tmp_path / f"a.{ending}")
    found, pixels = seen(tmp_path / f"a.{ending}")
    assert found == mode
    assert np.abs(pixels - np.asarray(photograph)).mean() <= error


def test_lab(tmp_path, photograph):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(photograph, *profiles, outputMode="LAB").save(tmp_path / "a.tif")
    mode, pixels = seen(tmp_path / "a.tif")
    assert mode == "LAB" and np.abs(pixels - np.asarray(photograph)).mean() < 3


@pytest.mark.parametrize("mode", ["RGBX", "RGBa", "HSV"])
def test_modes_that_few_formats_have(photograph, mode):
    picture = photograph.convert("RGBA").convert(mode) if mode == "RGBa" else photograph.convert(mode)
    assert np.abs(np.asarray(as_seen(picture)).astype(int) - np.asarray(photograph)).mean() < 2


@pytest.mark.parametrize(
    ("values", "ending", "mode"),
    [
        (RAMP, "png", "L"),
        (RAMP.astype(np.uint16) * 257, "png", "I;16"),
        (RAMP.astype(np.uint16) * 257, "tif", "I;16"),
        ((RAMP.astype(np.uint16) * 257).astype(">u2"), "tif", "I;16B"),
        (RAMP.astype(np.uint16) * 257, "jp2", "I;16"),
        (RAMP.astype(np.int32), "tif", "I"),
        (RAMP.astype(np.int32) * 257, "tif", "I"),
        (RAMP.astype(np.int32) * 100_000 - 1_000_000, "tif", "I"),
        (RAMP.astype(np.float32) / 255, "tif", "F"),
        (RAMP.astype(np.float32), "tif", "F"),
        (RAMP.astype(np.float32) * 257, "tif", "F"),
        (RAMP.astype(np.float32) / 100 - 1, "tif", "F"),
        (RAMP.astype(np.float32) * 1e30, "tif", "F"),
    ],
)
def test_a_ramp_from_black_to_white_stays_one(tmp_path, values, ending, mode):
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    found, pixels = seen(tmp_path / f"a.{ending}")
    assert found == mode
    assert np.abs(pixels - RAMP[:, :, None]).max() <= 1


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_a_scan_may_count_from_white(tmp_path, kind):
    values = (255 - RAMP).astype(kind) * (257 if kind == np.uint16 else 1)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 0
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=info)
    assert np.abs(seen(tmp_path / "a.tif")[1] - RAMP[:, :, None]).max() <= 1


@pytest.mark.parametrize("tags", [{TiffImagePlugin.SAMPLEFORMAT: (1,)}, {}])
def test_integers_of_32_bits_may_have_no_sign(tags):
    picture = Image.fromarray((RAMP.astype(np.uint32) * 16_843_009).view(np.int32))
    picture.tag_v2 = {TiffImagePlugin.BITSPERSAMPLE: (32,)} | tags
    assert np.abs(np.asarray(as_seen(picture))[:, :, 0].astype(int) - RAMP).max() <= 1


def test_twelve_bits_count_to_4095():
    picture = Image.fromarray(RAMP.astype(np.uint16) * 16)
    picture.tag_v2 = {258: (12,)}
    assert np.abs(np.asarray(as_seen(picture))[:, :, 0].astype(int) - RAMP).max() <= 1


def test_a_grey_of_sixteen_bits_may_be_transparent(tmp_path):
    grey = np.full((8, 8), 25700, np.uint16)
    grey[:, :4] = 1000
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=1000)
    _, pixels = seen(tmp_path / "a.png")
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 100).all()


def test_sixteen_bits_are_not_stretched(tmp_path):
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    assert (seen(tmp_path / "a.png")[1] == 100).all()
    for dark in (np.zeros((8, 8), np.int32), np.zeros((8, 8), np.float32)):
        Image.fromarray(dark).save(tmp_path / "a.tif")
        assert (seen(tmp_path / "a.tif")[1] == 0).all()


def test_black_and_white(tmp_path):
    Image.fromarray(RAMP > 127).save(tmp_path / "a.png")
    assert np.array_equal(seen(tmp_path / "a.png")[1][:, :, 0], 255 * (RAMP > 127))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P alpha", "L", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Its left half, where the file holds black; the right half is grey."""
    grey = np.zeros((8, 8), np.uint8)
    grey[:, 4:] = 100
    if mode in ("RGBA", "LA"):
        picture = Image.fromarray(grey).convert(mode)
        picture.putalpha(Image.fromarray(np.where(grey, 255, 0).astype(np.uint8)))
        settings = {}
    else:
        picture = Image.fromarray(grey).convert(mode[:1] if mode != "RGB" else mode)
        if mode.startswith("P"):
            picture.putpalette([level for level in range(256) for _ in range(3)])
        settings = {"transparency": {"P alpha": bytes([0, *[255] * 255]), "RGB": (0, 0, 0)}.get(mode, 0)}
    picture.save(tmp_path / "a.png", **settings)
    found, pixels = seen(tmp_path / "a.png")
    assert found == mode.split()[0]
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 100).all()


def test_half_transparent(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(seen(tmp_path / "a.png")[1] - 127).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_a_damaged_picture(tmp_path, value):
    (tmp_path / "train" / "scan").mkdir(parents=True)
    pixels = np.zeros((8, 8), np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "train" / "scan" / "0.tif")
    dataset = create_dataset("image", "folder", tmp_path, "train", False, size=32)
    with pytest.raises(
        ValueError, match=r"scan/0\.tif: cannot be read as an image: it holds values that are not finite"
    ):
        dataset[0]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_turned_picture_is_turned_back(tmp_path, orientation, ending):
    """Exif's eight orientations, as its standard describes them: where the first row and the first column are seen."""
    upright = np.full((48, 64, 3), 128, np.uint8)
    upright[:24, :32], upright[:24, 32:], upright[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        2: upright[:, ::-1],  # first row at the top, first column on the right
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),  # first row on the left, first column at the top
        6: upright.transpose(1, 0, 2)[::-1],  # first row on the right, first column at the top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],  # first row on the left, first column at the bottom
    }.get(orientation, upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{ending}", exif=exif, **settings)
    _, pixels = seen(tmp_path / f"a.{ending}")
    assert pixels.shape == upright.shape
    assert np.abs(pixels - upright).mean() < 3


@pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:Tag data")
def test_damaged_exif_data_are_no_damaged_picture(tmp_path, photograph):
    photograph.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\xff" * 20)
    assert seen(tmp_path / "a.jpg")[1].shape == (160, 240, 3)


def test_ordinary_pictures_are_as_before(tmp_path, photograph):
    for ending in ("jpg", "png"):
        photograph.save(tmp_path / f"a.{ending}")
        with Image.open(tmp_path / f"a.{ending}") as opened:
            assert np.array_equal(seen(tmp_path / f"a.{ending}")[1], np.asarray(opened.convert("RGB")))
