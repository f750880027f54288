"""open_image: what a person sees, in RGB, or one error that names the file."""

import io

import numpy as np
import pytest
from PIL import Image

from models.errors import UserError
from models.vision.images import ImageError, open_image


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_white(tmp_path, mode):
    Image.new(mode, (4, 4), (0,) * len(mode)).save(tmp_path / "clear.png")
    assert np.array(open_image(tmp_path / "clear.png")).min() == 255


def test_half_transparent_black_over_white_is_grey():
    pixel = open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert pixel == pytest.approx((127, 127, 127), abs=1)


def test_transparent_palette_entry_shows_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    opened = open_image(tmp_path / "palette.png")
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 1)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    assert open_image(Image.new("RGB", (8, 8), "white").convert(mode)).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_a_pil_image_is_not_changed():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    open_image(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (0, 0, 0, 0)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match="nowhere.jpg: no such image file"):
        open_image(tmp_path / "nowhere.jpg")


def test_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    with pytest.raises(ImageError, match="note.jpg: not an image"):
        open_image(str(tmp_path / "note.jpg"))


@pytest.mark.parametrize("suffix", ["jpeg", "png"])
def test_truncated_file_is_an_error_here(tmp_path, suffix):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(stream, suffix)
    (tmp_path / f"cut.{suffix}").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(ImageError, match=f"cut.{suffix}: image cannot be decoded"):
        open_image(tmp_path / f"cut.{suffix}")


@pytest.mark.parametrize("share_of_limit", [1.5, 3.0])  # PIL warns from one limit on and refuses from two
def test_oversized_image_is_refused(tmp_path, monkeypatch, share_of_limit):
    Image.new("RGB", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / share_of_limit))
    with pytest.raises(UserError, match="huge.png: image is over the size limit"):
        open_image(tmp_path / "huge.png")


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(ImageError):
        open_image(tmp_path)
