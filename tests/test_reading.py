import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.reading import picture_size, read_image, read_mask, read_photograph, to_input, to_label
from utils import IMAGENET, Preprocessing
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


def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path):
    shades = np.array([[0, 257 * 50, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(shades).save(tmp_path / "x.png")
    for reader in (read_image, read_photograph):
        red = np.asarray(reader(tmp_path / "x.png"))[..., 0]
        assert np.abs(red.astype(int) - [[0, 50, 128, 255]]).max() <= 1


def test_integers_below_256_are_shades_and_real_numbers_are_refused(tmp_path):
    shades = np.array([[0, 50, 255]])
    Image.fromarray(shades.astype(np.int32)).save(tmp_path / "i.tif")
    assert np.asarray(read_image(tmp_path / "i.tif"))[..., 0].tolist() == shades.tolist()
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif: holds floating-point numbers of unknown range"):
        read_image(tmp_path / "f.tif")


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


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_mask_of_another_mode_is_refused(tmp_path, mode):
    Image.new(mode, (7, 9)).save(tmp_path / "m.tif")
    with pytest.raises(UserError, match=rf"m\.tif: a mask has one channel .* this one is {mode}"):
        read_mask(tmp_path / "m.tif")


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
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">II", 8, 4) + header + b"\0\0\0"),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        crc = zlib.crc32(kind + body)
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.png: a mask of 2 or 4 grey bits; save it with 8"):
        read_mask(path)
    assert read_image(path).size == (8, 4)
