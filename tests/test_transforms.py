"""Turned views: mirrors, quarter turns and rotations of an image and its mask."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from dataset.transforms import CropParams, random_view
from utils.config.schema import AugmentSection

TURNS = {"vertical": True, "quarter_turns": True, "rotate": 180.0}


def augment(base_size=100, crop_size=20, scale=(1.0, 1.0), **turns):
    return AugmentSection(base_size=base_size, scale=scale, crop_size=crop_size, **turns)


def coded(height, width):
    """An image and a mask of small blocks; both tell a block's row, column."""
    block = np.indices((height, width)) // 4
    ids = (block[0] * 5 + block[1]) % 250
    image = np.stack([ids, ids, ids], axis=-1).astype(np.uint8)
    return Image.fromarray(image), Image.fromarray(ids.astype(np.uint8))


def test_views_without_turns_are_those_of_before():
    """Numbers of the code that had no turns."""
    cases = (
        ((48, 64), None, (69, 92), 15, 40, False),
        ((30, 90), (29, 3), (18, 54), 0, 0, False),
        ((200, 100), (150, 99), (33, 16), 0, 0, False),
        ((48, 64), None, (81, 109), 10, 7, True),
    )
    rng = np.random.default_rng(7)
    for size, target, scaled, top, left, flip in cases:
        view = random_view(size, AugmentSection(base_size=64, crop_size=48), rng, target)
        assert view == CropParams(scaled, top, left, 48, flip)
    assert rng.random() == 0.2784256121007733  # as many numbers were drawn


@pytest.mark.parametrize("size", [(60, 90), (24, 70), (16, 12)])
def test_image_and_mask_turn_together(size):
    image, mask = coded(*size)
    rng = np.random.default_rng(0)
    for _ in range(100):
        view = random_view(size, augment(max(size), 32, **TURNS), rng)
        seen, ids = np.asarray(view.image(image))[..., 0], np.asarray(view.mask(mask))
        assert seen.shape == ids.shape == (32, 32)
        assert set(np.unique(ids)) <= {*np.unique(mask), 255}
        inside = ids != 255
        assert (seen[~inside] == 0).all()
        agree = np.abs(seen[inside].astype(int) - ids[inside]) <= 2  # all but blocks' borders
        assert agree.mean() > 0.4
        assert agree.sum() > 30


@pytest.mark.parametrize("crop", [1, 2, 7, 20])
@pytest.mark.parametrize("turns", [{}, TURNS, {"rotate": 45.0}, {"quarter_turns": True}])
def test_turned_window_shows_its_target(turns, crop):
    """The target becomes 4 x 4 pixels or more: a single one can fall between turned rows."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        size = tuple(int(side) for side in rng.integers(1, 40, 2))
        target = tuple(int(rng.integers(side)) for side in size)
        mask = np.zeros(size, np.uint8)
        mask[target] = 1
        settings = augment(max(size) * 4, crop * 4, scale=(1.0, 1.5), **turns)
        view = random_view(size, settings, rng, target)
        assert (np.asarray(view.mask(Image.fromarray(mask))) == 1).any()


@pytest.mark.parametrize(("flip", "vertical"), [*product([False, True], repeat=2)])
@pytest.mark.parametrize("quarters", range(4))
def test_mirrors_and_quarter_turns_are_exact(flip, vertical, quarters):
    image, mask = coded(40, 60)
    view = CropParams((40, 60), 3, 17, 32, flip, vertical, quarters)
    for whole, seen in ((image, view.image(image)), (mask, view.mask(mask))):
        expected = np.asarray(whole)[3:35, 17:49]
        expected = expected[:, ::-1] if flip else expected
        expected = expected[::-1] if vertical else expected
        assert np.array_equal(seen, np.rot90(expected, quarters))


def test_a_small_picture_turns_before_it_is_padded():
    _, mask = coded(8, 20)
    ids = np.asarray(CropParams((8, 20), 0, 0, 32, False, quarters=1).mask(mask))
    assert np.array_equal(ids[:20, :8], np.rot90(mask))
    assert (ids[20:] == 255).all()
    assert (ids[:, 8:] == 255).all()


@pytest.mark.parametrize("crop", [31, 32])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_rotation_by_right_angles_is_a_quarter_turn(quarters, crop):
    image, mask = coded(40, 60)
    turned = CropParams((40, 60), 3, 17, crop, True, quarters=quarters)
    rotated = CropParams((40, 60), 3, 17, crop, False, angle=90.0 * quarters)
    turned = turned._replace(flip=False)
    assert np.array_equal(turned.mask(mask), rotated.mask(mask))
    difference = np.subtract(turned.image(image), rotated.image(image), dtype=int)
    assert np.abs(difference).max() <= 1


def test_a_rotation_takes_its_corners_from_the_picture():
    """A window that is far from the border needs no padding, and keeps its centre."""
    image, mask = coded(100, 100)
    straight = CropParams((100, 100), 40, 30, 20, False)
    for angle in (-45.0, 10.0, 45.0, 170.0):
        view = straight._replace(angle=angle)
        assert (np.asarray(view.mask(mask)) != 255).all()
        centre = np.asarray(view.image(image))[9:11, 9:11].mean()
        assert centre == pytest.approx(np.asarray(straight.image(image))[9:11, 9:11].mean(), abs=1)


def test_a_small_picture_rotates_about_its_centre():
    _, mask = coded(8, 20)
    view = random_view((8, 20), augment(20, 32, rotate=180.0), np.random.default_rng(0))
    ids = np.asarray(view.mask(mask))
    assert (ids != 255).sum() == pytest.approx(8 * 20, abs=20)  # all of it is there
    rows, columns = np.nonzero(ids != 255)
    assert (rows.mean(), columns.mean()) == pytest.approx((15.5, 15.5), abs=0.6)


def test_turns_are_drawn_evenly():
    rng = np.random.default_rng(0)
    turns = {"vertical": True, "quarter_turns": True, "rotate": 30.0}
    views = [random_view((60, 60), augment(60, 20, **turns), rng) for _ in range(2000)]
    assert sum(view.vertical for view in views) == pytest.approx(1000, abs=100)
    quarters = np.bincount([view.quarters for view in views])
    assert quarters.tolist() == pytest.approx([500] * 4, abs=80)
    angles = np.array([view.angle for view in views])
    assert angles.min() == pytest.approx(-30, abs=1)
    assert angles.max() == pytest.approx(30, abs=1)
    assert angles.mean() == pytest.approx(0, abs=2)


@pytest.mark.parametrize("key", TURNS)
def test_each_turn_is_a_key_of_its_own(key):
    rng = np.random.default_rng(0)
    settings = augment(60, 20, **{key: TURNS[key]})
    views = [random_view((60, 60), settings, rng) for _ in range(20)]
    drawn = {
        "vertical": any(view.vertical for view in views),
        "quarter_turns": any(view.quarters for view in views),
        "rotate": any(view.angle for view in views),
    }
    assert drawn == {name: name == key for name in TURNS}
