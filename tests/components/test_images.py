"""Bytes to pixels: every kind of file against the pixels a person would expect."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from broken import Broken, broken_files, picture, png_chunk, png_of_size, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from components.image_files import BadImage, decode
from components.images import (
    decode_png,
    encode_png,
    image_id,
    prepare,
    random_resized_crop,
    stack,
    to_float,
    to_uint8,
    to_working_size,
)

MAX_PIXELS = 1_000_000
LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(data: bytes) -> np.ndarray:
    image = decode(data, max_pixels=MAX_PIXELS).image
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=-1)


def png16(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG written by hand: Pillow writes no 16-bit colour."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_colour_is_exact(form, options):
    assert np.array_equal(pixels(saved(picture(), form, **options)), np.asarray(picture()))


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 95, "progressive": True}])
def test_jpeg_is_close(options):
    difference = pixels(saved(picture(), "JPEG", **options)).astype(int) - np.asarray(picture())
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey(form):
    assert np.array_equal(pixels(saved(Image.fromarray(LEVELS), form)), grey(LEVELS))


def test_grey_jpeg():
    assert np.abs(pixels(saved(Image.fromarray(LEVELS), "JPEG", quality=100)).astype(int) - grey(LEVELS)).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_black_and_white(form):
    bits = (LEVELS % 3 == 0) * np.uint8(255)
    assert np.array_equal(pixels(saved(Image.fromarray(bits).convert("1"), form)), grey(bits))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(form):
    image = Image.fromarray(LEVELS % 4, "P")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30)]
    image.putpalette([value for colour in colours for value in colour])
    assert np.array_equal(pixels(saved(image, form)), np.array(colours, np.uint8)[LEVELS % 4])


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form):
    ink = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    got = pixels(saved(ink, form)).astype(int)
    assert np.abs(got - [255, 0, 0]).max() <= 3


def test_adobe_cmyk_jpeg_is_not_a_negative():
    data = saved(Image.new("CMYK", (32, 32), (255, 255, 255, 255)), "JPEG")  # all inks: black
    assert b"Adobe" in data
    assert pixels(data).max() <= 3


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_composited_on_white(form, options):
    image = Image.new("RGBA", (4, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (0, 0, 255, 64)])
    got = pixels(saved(image.resize((4, 4), Image.Resampling.NEAREST), form, **options))[0].astype(int)
    expected = [(255, 0, 0), (255, 255, 255), (127, 127, 127), (191, 191, 255)]
    assert np.abs(got - expected).max() <= 1


def test_grey_alpha():
    got = pixels(saved(Image.merge("LA", [Image.new("L", (3, 3), 100), Image.new("L", (3, 3), 51)]), "PNG"))
    assert np.abs(got.astype(int) - (100 * 0.2 + 255 * 0.8)).max() <= 1


def test_transparent_palette_entry():
    image = Image.fromarray(LEVELS % 2, "P")
    image.putpalette([9, 9, 9, 200, 100, 50])
    for form in ("PNG", "GIF"):
        got = pixels(saved(image, form, transparency=0))
        assert np.array_equal(got, np.array([[255, 255, 255], [200, 100, 50]], np.uint8)[LEVELS % 2])


def test_transparent_colour():
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (50, 60, 70))
    got = pixels(saved(image, "PNG", transparency=(1, 2, 3)))
    assert got[0, 0].tolist() == [50, 60, 70]
    assert (got.reshape(-1, 3)[1:] == 255).all()


WIDE = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form):
    assert np.array_equal(pixels(saved(Image.fromarray(WIDE), form)), grey(np.rint(WIDE / 257).astype(np.uint8)))


def test_16_bit_grey_keeps_its_exposure():
    dark = (WIDE // 16).astype(np.uint16)
    assert np.array_equal(pixels(saved(Image.fromarray(dark), "PNG")), grey(np.rint(dark / 257).astype(np.uint8)))


def test_16_bit_big_endian_tiff():
    image = Image.frombytes("I;16B", (16, 16), WIDE.astype(">u2").tobytes())
    assert np.array_equal(pixels(saved(image, "TIFF")), grey(np.rint(WIDE / 257).astype(np.uint8)))


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_and_alpha(colour_type, channels):
    values = np.full((8, 8, channels), 65535, np.uint16)
    values[..., 0] = 128 * 257
    got = pixels(png16(values, colour_type))
    expected = [128, 255, 255] if channels > 2 else [128, 128, 128]
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_white_is_zero_tiff():
    data = saved(Image.fromarray(WIDE), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(pixels(data), grey(255 - np.rint(WIDE / 257).astype(np.uint8)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (LEVELS.astype(np.int32), LEVELS),
        (LEVELS.astype(np.int32) * 257, LEVELS),
        (LEVELS.astype(np.int32) * 1_000_000, LEVELS),
        (LEVELS.astype(np.int32) * 100 - 5_000, LEVELS),
        (LEVELS.astype(np.float32) / 255, LEVELS),
        (LEVELS.astype(np.float32), LEVELS),
        (LEVELS.astype(np.float32) * 257, LEVELS),
        (LEVELS.astype(np.float32) * 1e6, LEVELS),
        (LEVELS.astype(np.float32) / 10 - 3, LEVELS),
        (np.zeros((16, 16), np.float32), np.zeros((16, 16), np.uint8)),
        (np.full((16, 16), 1e9, np.float32), np.zeros((16, 16), np.uint8)),
    ],
)
def test_32_bit_integers_and_floats(values, expected):
    assert np.array_equal(pixels(saved(Image.fromarray(values), "TIFF")), grey(expected))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form, orientation):
    upright = Image.new("RGB", (48, 32), "red")
    upright.paste("blue", (0, 0, 24, 16))  # one corner tells all eight apart
    upright.paste("lime", (24, 0, 48, 16))
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    upright.getexif()[ExifTags.Base.Orientation] = undo
    stored = ImageOps.exif_transpose(upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    data = saved(stored, form, exif=exif, **options)
    assert stored.size == ((32, 48) if orientation >= 5 else (48, 32))
    assert np.abs(pixels(data).astype(int) - np.asarray(upright)).max() <= 4
    prepared = prepare(data, size=16, max_pixels=MAX_PIXELS)
    assert (prepared.width, prepared.height, prepared.image.size) == (48, 32, (16, 16))
    assert prepared.orientation == orientation


def test_damaged_exif_does_not_cost_the_picture():
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert pixels(data).shape == (90, 120, 3)


@pytest.mark.parametrize("broken", broken_files(), ids=lambda broken: broken.name)
def test_broken_files_are_bad_for_a_fair_reason(broken: Broken):
    with pytest.raises(BadImage) as caught:
        prepare(broken.data, size=32, max_pixels=MAX_PIXELS)
    assert re.search(broken.reason, caught.value.reason)
    assert "\n" not in caught.value.reason


def test_size_limit_is_ours_not_pillows():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match="too large: 120 x 90 px are more than 10799 pixels"):
        decode(saved(picture(), "PNG"), max_pixels=120 * 90 - 1)
    assert pixels(saved(picture(), "PNG")).shape == (90, 120, 3)
    with pytest.raises(BadImage, match="cannot be decoded"):  # header accepted, pixels missing
        decode(png_of_size(20_000, 10_000), max_pixels=10**9)
    assert before == Image.MAX_IMAGE_PIXELS


FILES = [saved(picture(), form) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")] + [
    saved(picture().convert("P"), "GIF"),
    saved(Image.fromarray(WIDE), "TIFF"),
]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), file=st.sampled_from(FILES))
def test_damage_gives_an_image_or_a_reason_and_nothing_else(data, file):
    end = data.draw(st.integers(0, len(file)))
    damaged = bytearray(file[:end])
    for at in data.draw(st.lists(st.integers(0, max(end - 1, 0)), max_size=8)) if end else []:
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        prepared = prepare(bytes(damaged), size=16, max_pixels=MAX_PIXELS)
    except BadImage as error:
        assert error.reason
    else:
        assert prepared.image.size == (16, 16)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 70))
def test_working_size_of_any_shape(width, height, size):
    image = to_working_size(picture(width, height), size)
    assert image.size == (size, size)
    level = Image.new("RGB", (width, height), (40, 90, 200))
    assert (np.asarray(to_working_size(level, size)) == [40, 90, 200]).all()


def test_working_size_is_short_side_resize_and_centre_crop():
    whole = picture(240, 120)
    resized = np.asarray(whole.resize((64, 32), Image.Resampling.BICUBIC))[:, 16:48].astype(int)
    difference = np.abs(resized - np.asarray(to_working_size(whole, 32)))
    assert difference[:, 2:-2].max() <= 1  # at the borders one sees beyond the square, the other does not
    assert np.array_equal(np.asarray(to_working_size(picture(32, 32), 32)), np.asarray(picture(32, 32)))


def test_working_size_is_antialiased():
    stripes = Image.fromarray(np.tile(np.uint8([[0, 255]]), (256, 128)))
    assert np.abs(np.asarray(to_working_size(stripes.convert("RGB"), 32)).astype(int)[:, 1:-1] - 127.5).max() < 4


def test_reduced_decoding_of_a_large_jpeg_changes_next_to_nothing():
    data = saved(picture(120, 90).resize((1200, 900), Image.Resampling.BICUBIC), "JPEG", quality=92)
    prepared = prepare(data, size=64, max_pixels=10**7)
    full = to_working_size(decode(data, max_pixels=10**7).image, 64)
    assert (prepared.width, prepared.height) == (1200, 900)
    assert np.abs(np.asarray(prepared.image).astype(int) - np.asarray(full)).mean() < 0.5


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 99))
def test_png_and_stack_are_lossless(width, height, seed):
    arrays = np.random.default_rng(seed).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    pngs = [encode_png(Image.fromarray(array)) for array in arrays]
    assert np.array_equal(decode_png(pngs[0]), arrays[0])
    stacked = stack(pngs)
    assert stacked.flags.c_contiguous and stacked.dtype == np.uint8
    assert np.array_equal(stacked, arrays.transpose(0, 3, 1, 2))
    assert np.array_equal(to_uint8(to_float(torch.from_numpy(stacked))), arrays)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-0.1, 0.0, 0.0019, 0.002, 0.5, 0.9981, 1.0, 1.2]).reshape(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert to_uint8(values)[0, 0, :, 2].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_stack_and_to_float_say_what_they_need():
    with pytest.raises(ValueError, match="images of one size"):
        stack([encode_png(picture(8, 8)), encode_png(picture(9, 8))])
    with pytest.raises(ValueError, match="images of one size"):
        stack([])
    with pytest.raises(ValueError, match="uint8 is needed, not torch.float32"):
        to_float(torch.zeros(1))


def test_image_id_tells_path_and_content_apart():
    ids = {image_id("a.png", b"1"), image_id("a.png", b"2"), image_id("b.png", b"1"), image_id("ü/a.png", b"1")}
    assert len(ids) == 4
    assert image_id("cat/1.jpg", b"abc") == "4ef1ee2865d5e991b1d3"  # stored in artifacts: must never change


def ramps(batch: int, height: int, width: int) -> torch.Tensor:
    """Channels x, y and their product: a crop's place can be read from its pixels."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, x * y]).expand(batch, 3, height, width).contiguous()


def crop(images: torch.Tensor, seed: int = 0, scale: tuple[float, float] = (0.8, 1.0)) -> torch.Tensor:
    return random_resized_crop(images, scale=scale, generator=torch.Generator().manual_seed(seed))


def test_random_crop_is_driven_by_its_generator_alone():
    images = torch.randint(0, 256, (6, 3, 20, 30), dtype=torch.uint8)
    torch.manual_seed(1)
    first = crop(images, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, crop(images, seed=5))
    assert not torch.equal(first, crop(images, seed=6))
    assert torch.equal(first, crop(to_float(images), seed=5))
    assert first.dtype == torch.float32 and first.shape == images.shape and 0 <= first.min() and first.max() <= 1


def test_random_crop_mirrors_half_and_keeps_the_share_of_the_area():
    cropped = crop(ramps(2000, 64, 64), scale=(0.5, 0.9))
    across = cropped[:, 0, 32, -1] - cropped[:, 0, 32, 0]
    down = cropped[:, 1, -1, 32] - cropped[:, 1, 0, 32]
    assert 0.45 < (across < 0).float().mean() < 0.55
    assert (down > 0).all()
    widths, heights = across.abs() * 63 + 1, down * 63 + 1  # in px, up to the rounding of the ends
    area, ratio = widths * heights / 64**2, widths / heights
    assert 0.48 < area.min() < 0.55 and 0.85 < area.max() < 0.93
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.38
    assert abs(area.mean() - 0.7) < 0.02


def test_random_crop_equals_cropping_and_interpolating():
    images = torch.rand(1, 3, 24, 24)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        got = random_resized_crop(images, scale=(0.3, 0.9), generator=generator)
        places = crop(ramps(1, 24, 24), seed=seed, scale=(0.3, 0.9))[0] * 23
        left, right = sorted((round(places[0, 0, 0].item()), round(places[0, 0, -1].item())))
        top, bottom = round(places[1, 0, 0].item()), round(places[1, -1, 0].item())
        part = images[:, :, top : bottom + 1, left : right + 1]
        part = part.flip(-1) if places[0, 0, 0] > places[0, 0, -1] else part
        expected = torch.nn.functional.interpolate(part, size=(24, 24), mode="bilinear", align_corners=False)
        assert torch.allclose(got, expected, atol=1e-4)


def test_random_crop_keeps_the_whole_where_nothing_fits():
    images = ramps(4, 10, 80)  # no crop of this area has a ratio up to 4/3
    cropped = crop(images, scale=(0.9, 1.0))
    difference = torch.minimum(
        (cropped - images).abs().amax((1, 2, 3)), (cropped.flip(-1) - images).abs().amax((1, 2, 3))
    )
    assert difference.max() < 1e-5


def test_pngs_of_this_module_are_rgb():
    with Image.open(io.BytesIO(encode_png(picture()))) as image:
        assert (image.mode, image.format) == ("RGB", "PNG")
