"""Pictures and masks: read from files, then augmented."""

import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dataset.catalog import KINDS, id_table
from dataset.lists import Sample, Splits, find_faults
from dataset.reading import (
    Pixels,
    examine,
    orientation_of,
    picture_size,
    read_ids,
    read_image,
    read_mask,
    to_input,
    to_label,
    upright,
)
from dataset.transforms import CropParams, random_view, recolour
from tests.benchmarks.loader import whole_then_crop
from utils import IMAGENET, Preprocessing
from utils.config.schema import AugmentSection, StrongSection
from utils.errors import UserError

COLOUR = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
IDS = np.arange(63, dtype=np.uint8).reshape(9, 7)


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


WHOLE = {
    "JPEG": encoded(Image.fromarray(COLOUR), "JPEG"),
    "PNG": encoded(Image.fromarray(IDS).convert("P"), "PNG"),
}


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "P", "1", "YCbCr"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    picture = Image.fromarray(COLOUR).convert(mode)
    picture.save(tmp_path / "x.tif")
    image = read_image(tmp_path / "x.tif")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(picture.convert("RGB")))
    traits = examine(tmp_path / "x.tif")
    assert (traits.bands - traits.bands_read, traits.highest) == (0, None)
    assert traits.bands == (1 if mode in ("1", "L", "LA") else 3)
    bits = read_image(tmp_path / "x.tif", Pixels(range=(0, 255)))
    assert np.array_equal(bits, image)


def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path):
    shades = np.array([[0, 257 * 50, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(shades).save(tmp_path / "x.png")
    red = np.asarray(read_image(tmp_path / "x.png"))[..., 0]
    assert np.abs(red.astype(int) - [[0, 50, 128, 255]]).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 have a meaning
def test_images_are_upright_as_viewers_show_them(tmp_path, orientation, suffix):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR).save(path, exif=exif)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    assert picture_size(path) == expected.shape[:2]
    assert np.array_equal(np.asarray(read_image(path)), expected)


def test_a_mask_has_the_size_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOUR).save(tmp_path / "x.png", exif=exif)
    turned = Sample("x.png", tmp_path / "x.png", tmp_path / "upright.png")
    Image.fromarray(IDS % 7).save(tmp_path / "stored.png")
    Image.fromarray(np.rot90(IDS % 7, 3)).save(tmp_path / "upright.png")
    stored = turned._replace(mask=tmp_path / "stored.png")
    (fault,) = find_faults(Splits([turned, stored], [], []), KINDS["demo"])
    assert f"{stored.mask}: this mask is" in fault.line


def test_damaged_exif_counts_as_none(tmp_path):
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nzzzz")
    Image.fromarray(COLOUR).save(tmp_path / "x.png", pnginfo=text)
    assert picture_size(tmp_path / "x.png") == COLOUR.shape[:2]
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), COLOUR)


def test_integers_below_256_are_shades_and_real_numbers_are_refused(tmp_path):
    shades = np.array([[0, 50, 255]])
    Image.fromarray(shades.astype(np.int32)).save(tmp_path / "i.tif")
    assert np.asarray(read_image(tmp_path / "i.tif"))[..., 0].tolist() == shades.tolist()
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif: holds floating-point numbers of unknown range"):
        read_image(tmp_path / "f.tif")


def chunks(*parts):
    """The chunks of a PNG file."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts:
        crc = zlib.crc32(kind + body)
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    return content


def png_of_16_bits(values):
    """A PNG file of (H, W, 3 or 4) values of 16 bits, which Pillow does not write."""
    height, width, bands = values.shape
    header = struct.pack(">II", width, height) + bytes([16, {3: 2, 4: 6}[bands], 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return chunks((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


DEEP = np.random.default_rng(1).integers(0, 1001, (9, 7, 4), dtype=np.uint16)
DEEP[0, 0], DEEP[0, 1] = 0, 1000


@pytest.mark.parametrize("file", ["rgb.png", "rgba.png", "rgb.tif", "rgba.tif", "grey.png"])
def test_a_range_maps_values_of_sixteen_bits(tmp_path, file):
    path, bands = tmp_path / file, {"rgb": 3, "rgba": 4}.get(file.partition(".")[0], 1)
    values = DEEP[..., :bands]
    if bands == 1:
        Image.fromarray(values[..., 0]).save(path)
    elif path.suffix == ".png":
        path.write_bytes(png_of_16_bits(values))
    else:
        pytest.importorskip("tifffile").imwrite(path, values, photometric="rgb")
    colours = np.broadcast_to(values[..., :3], (9, 7, 3))
    if bands > 1 and path.suffix == ".png":
        with pytest.raises(UserError, match=r"rgba?\.png: Pillow reads the upper 8 .* to TIFF"):
            read_image(path, Pixels(range=(0, 1000)))
    else:
        expected = (colours * (255 / 1000)).round()
        assert np.array_equal(read_image(path, Pixels(range=(0, 1000))), expected)
    assert np.abs(np.asarray(read_image(path)) - colours // 256).max() <= 1
    traits = examine(path)
    assert (traits.bands, traits.bands_read) == (bands, min(bands, 3))
    assert 1000 <= traits.highest <= 1023


def test_percentiles_and_real_numbers(tmp_path):
    values = np.linspace(-1, 1, 63, dtype=np.float32).reshape(9, 7)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "f.tif")
    grey = np.asarray(read_image(tmp_path / "f.tif", Pixels(range="percentile")))[..., 0]
    assert (grey[0, 0], grey[0, 1], grey[-1, -1]) == (0, 0, 255)
    assert np.unique(grey).size == 62  # the lowest known value is black, as is what is unknown
    halved = np.asarray(read_image(tmp_path / "f.tif", Pixels(range=(-1, 3))))
    assert halved.max() == 128
    flat = Image.fromarray(np.full((2, 2), 7, np.uint8))
    assert upright(flat, "x", Pixels(range="percentile")).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("layout", ["pixels", "pages", "colours"])
def test_three_bands_of_a_tiff_are_picked(tmp_path, layout):
    tifffile, path = pytest.importorskip("tifffile"), tmp_path / "x.tif"
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 5), dtype=np.uint8)
    if layout == "pages":
        tifffile.imwrite(path, np.moveaxis(values, 2, 0), photometric="minisblack")
    elif layout == "pixels":
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    else:
        tifffile.imwrite(path, values, photometric="rgb")
    picked = read_image(path, Pixels(bands=(4, 2, 5)))
    assert np.array_equal(picked, values[..., [3, 1, 4]])
    assert picture_size(path) == (9, 7)
    assert examine(path, Pixels(bands=(4, 2, 5)))[1:3] == (5, 5)
    if layout == "pixels":
        with pytest.raises(UserError, match=r"x\.tif: has 5 bands; say which three"):
            read_image(path)
    else:  # Pillow knows what to show
        assert examine(path)[1:3] == (5, 3 if layout == "colours" else 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_of_a_turned_tiff_are_upright(tmp_path, orientation):
    tifffile, path = pytest.importorskip("tifffile"), tmp_path / "x.tif"
    values, tag = np.repeat(COLOUR, 2, axis=2), (274, 3, 1, orientation, True)
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig", extratags=[tag])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values[..., :3]).save(tmp_path / "x.png", exif=exif)
    expected = read_image(tmp_path / "x.png")
    assert read_image(path, Pixels(bands=(1, 2, 3))).tobytes() == expected.tobytes()
    assert picture_size(path) == expected.size[::-1]
    assert examine(path, Pixels(bands=(1, 2, 3))).orientation == orientation == orientation_of(path)


def test_bands_without_tifffile_say_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("tifffile").imwrite(
        tmp_path / "x.tif",
        np.zeros((4, 5, 6), np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for reader in (read_image, picture_size, examine):
        with pytest.raises(UserError, match=r"x\.tif: .* 'pip install tifffile' reads it"):
            reader(tmp_path / "x.tif")


def test_an_alpha_that_shows_everything_is_not_told(tmp_path):
    colours = Image.fromarray(COLOUR).convert("RGBA")
    colours.save(tmp_path / "opaque.png")
    colours.putalpha(Image.fromarray(IDS))
    colours.save(tmp_path / "alpha.png")
    assert [examine(tmp_path / f"{name}.png")[1:3] for name in ("opaque", "alpha")] == [
        (3, 3),
        (4, 3),
    ]


def test_a_large_picture_is_read_and_pillows_limit_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    Image.fromarray(COLOUR).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").size == (7, 9)
    assert picture_size(tmp_path / "x.png") == (9, 7)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "x.png")


@pytest.mark.parametrize(("mode", "bits"), [("P", 8), ("P", 2), ("L", 8)])
def test_mask_holds_entries_not_colours(tmp_path, mode, bits):
    expected = IDS & (2**bits - 1)
    mask = Image.fromarray(expected)
    if mode == "P":
        mask.putpalette(bytes(reversed(range(2**bits))) * 3)
    mask.save(tmp_path / "m.png", bits=bits)
    ids = read_mask(tmp_path / "m.png")
    assert ids.mode == "L"
    assert np.array_equal(np.asarray(ids), expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "F"])
def test_mask_of_another_mode_is_refused(tmp_path, mode):
    Image.new(mode, (7, 9)).save(tmp_path / "m.tif")
    with pytest.raises(UserError, match=rf"m\.tif: a mask has one channel .* this one is {mode}"):
        read_mask(tmp_path / "m.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_equal_channels_and_opaque_alpha_are_grey(tmp_path, mode):
    Image.fromarray(IDS).convert(mode).save(tmp_path / "m.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "m.png")), IDS)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_mask_with_transparent_pixels_is_refused(tmp_path, mode):
    mask = Image.fromarray(IDS).convert(mode)
    mask.putpixel((3, 2), (0,) * len(mask.getbands()))
    mask.save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: this mask has transparent pixels; save it w"):
        read_mask(tmp_path / "m.png")


def test_mask_of_colours_says_how_to_name_them(tmp_path):
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[1, 2] = 128, 0, 16
    Image.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: .*such as #800010; say in dataset\.class_map"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_read_by_their_table(tmp_path, mode):
    table = id_table(["sky", "car"], class_map={"#000000": "sky", "#ff0010": "car"})
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1], pixels[1, 2] = (255, 0, 16), (1, 1, 1)  # the last one has no meaning
    Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "m.png")
    ids = read_mask(tmp_path / "m.png", table.tobytes())
    assert np.asarray(ids).tolist() == [[0, 1, 0], [0, 0, 255]]


def test_black_alone_is_a_colour_where_colours_are_named(tmp_path):
    """A mask of background alone has equal channels, and is no mask of ids for that."""
    table = id_table(["car", "sky"], class_map={"#000000": "sky", "#ff0010": "car"})
    for mode in ("RGB", "L"):
        Image.new(mode, (2, 1)).save(tmp_path / "m.png")
        assert np.asarray(read_mask(tmp_path / "m.png", table.tobytes())).tolist() == [[1, 1]]


@pytest.mark.parametrize("reader", [read_image, read_mask])
@pytest.mark.parametrize("content", [b"", b"not a picture", WHOLE["JPEG"][:200]])
def test_unreadable_picture_says_which_and_what_to_do(tmp_path, reader, content):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read this picture \(.*\); replace it") as caught:
        reader(path)
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize("reader", [read_image, read_mask, picture_size])
def test_absent_picture_says_what_to_do(tmp_path, reader):
    with pytest.raises(UserError, match=r"x\.jpg: no such file; correct the list or dataset\.root"):
        reader(tmp_path / "x.jpg")


@pytest.mark.parametrize(("kind", "reader"), [("JPEG", read_image), ("PNG", read_mask)])
def test_damaged_picture_is_read_or_refused_in_one_line(tmp_path, kind, reader):
    content, complaints = WHOLE[kind], []
    for place, byte in enumerate(content):
        ends = [bytes([value]) + content[place + 1 :] for value in (0, byte ^ 32)]
        for end in (b"", *ends):
            (tmp_path / "x").write_bytes(content[:place] + end)
            try:
                reader(tmp_path / "x")
            except UserError as error:
                complaints.append(str(error))
    assert len(complaints) > len(content)  # at least the truncated ones
    assert not any("\n" in complaint for complaint in complaints)


def test_size_is_read_off_the_header(tmp_path):
    (tmp_path / "x.png").write_bytes(WHOLE["PNG"][:-20])
    assert picture_size(tmp_path / "x.png") == (9, 7)


def test_input_is_normalised_by_the_encoders_record():
    half = Preprocessing(mean=(0.5, 0.0, 0.2), std=(0.5, 0.25, 1.0))
    pixel = to_input(Image.new("RGB", (1, 1), (255, 0, 51)), half)
    assert pixel.flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    pixel = to_input(Image.new("RGB", (1, 1), (255, 0, 51)), IMAGENET)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert pixel.shape == (3, 1, 1)
    assert pixel.dtype == torch.float32
    assert to_input(Image.fromarray(COLOUR), IMAGENET).is_contiguous()
    assert pixel.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_label_is_rows_by_columns_of_ids():
    label = to_label(Image.fromarray(IDS))
    assert label.dtype == torch.int64
    assert label.tolist() == IDS.tolist()


@pytest.mark.parametrize(("bits", "header"), [(4, b"\x04\x00"), (2, b"\x02\x00")])
def test_grey_mask_of_few_bits_whose_ids_pillow_would_spread_is_refused(tmp_path, bits, header):
    path = tmp_path / "m.png"
    rows = b"".join(b"\0" + bytes([0b00011011] * bits) for _ in range(4))  # 8 pixels a row
    header = struct.pack(">II", 8, 4) + header + b"\0\0\0"
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(chunks(*parts))
    with pytest.raises(UserError, match=r"m\.png: a mask of 2 or 4 grey bits; save it with 8"):
        read_mask(path)
    assert read_image(path).size == (8, 4)


SIDES, SCALES = st.integers(1, 60), st.floats(0.2, 3.0)


def noise(size, channels=3):
    picture = np.random.default_rng(size[0]).integers(0, 255, (*size, channels), dtype=np.uint8)
    return Image.fromarray(picture.squeeze(2) if channels == 1 else picture)


@st.composite
def views(draw):
    """An image size and a view that fits it."""
    size, scale, crop = (draw(SIDES), draw(SIDES)), draw(SCALES), draw(st.integers(1, 80))
    scaled = tuple(max(1, round(side * scale)) for side in size)
    top, left = (draw(st.integers(0, max(0, side - crop))) for side in scaled)
    return size, CropParams(scaled, top, left, crop, draw(st.booleans()))


@given(views())
def test_image_and_mask_are_resized_then_cropped(case):
    size, view = case
    image, mask = noise(size), noise(size, channels=1)
    ours = np.asarray(view.image(image), np.float64)
    theirs = np.asarray(whole_then_crop(view, image, Image.Resampling.BILINEAR, 0))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2  # Pillow rounds twice: after rows, after columns
    assert np.abs(ours - theirs).mean() <= 1
    theirs = whole_then_crop(view, mask, Image.Resampling.NEAREST, 255)
    assert np.array_equal(view.mask(mask), theirs)


@given(SIDES, SIDES, st.integers(1, 80), st.integers(1, 80), st.data())
def test_view_shows_its_target(height, width, base_size, crop, data):
    augment = AugmentSection(base_size=base_size, crop_size=crop)
    target = (data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1)))
    view = random_view((height, width), augment, np.random.default_rng(crop), target)
    for axis, start in ((0, view.top), (1, view.left)):
        centre = (target[axis] + 0.5) * view.scaled[axis] / (height, width)[axis]
        assert start <= centre <= start + crop
        assert 0 <= start <= max(0, view.scaled[axis] - crop)
    if min(view.scaled[0] / height, view.scaled[1] / width) >= 1:  # no pixel is dropped
        mask = np.zeros((height, width), np.uint8)
        mask[target] = 1
        assert (np.asarray(view.mask(Image.fromarray(mask))) == 1).any()


def test_target_leaves_the_rest_to_chance():
    augment = AugmentSection(base_size=100, scale=(1.0, 1.0), crop_size=20)
    rng = np.random.default_rng(0)
    seen = [random_view((100, 100), augment, rng, target=(50, 5)) for _ in range(300)]
    assert {view.top for view in seen} == set(range(31, 51))
    assert {view.left for view in seen} == set(range(6))
    assert 100 < sum(view.flip for view in seen) < 200


def test_scale_is_of_the_long_side_and_keeps_the_shape():
    augment = AugmentSection(base_size=100, crop_size=10)
    rng = np.random.default_rng(0)
    sizes = np.array([random_view((30, 60), augment, rng).scaled for _ in range(500)])
    assert sizes[:, 1].min() >= 50
    assert sizes[:, 1].max() <= 200
    assert sizes[:, 1].mean() == pytest.approx(125, abs=5)  # uniform between 50 and 200
    assert np.abs(sizes[:, 0] - sizes[:, 1] / 2).max() <= 1


def test_colours_depend_on_the_sample_alone_and_leave_torch_alone(monkeypatch):
    image, strong, seeded = noise((20, 30)), StrongSection(), []
    # With workers=0 they are drawn in the training process: its dropout must not notice.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, count = torch.get_rng_state(), len(seeded)
        results.append(np.asarray(recolour(image, strong, np.random.default_rng(5))))
        assert torch.equal(torch.get_rng_state(), before)
        assert len(seeded) == count  # the accelerator's generator
    assert np.array_equal(*results)
    others = [np.asarray(recolour(image, strong, np.random.default_rng(seed))) for seed in range(6)]
    assert sum(np.array_equal(other, results[0]) for other in others) == 1


def test_strong_settings_of_zero_change_nothing():
    never = StrongSection(jitter_chance=0, grey_chance=0, blur_chance=0)
    image = noise((20, 30))
    for seed in range(10):
        assert np.array_equal(recolour(image, never, np.random.default_rng(seed)), image)


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert "it is a folder, a device or a pipe" in refusal(read_image, tmp_path / "a.jpg")
    assert "it is a folder, a device or a pipe" in refusal(read_ids, tmp_path / "a.jpg")
