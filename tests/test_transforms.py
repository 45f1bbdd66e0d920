import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.transforms import View, random_view, recolour
from tests.benchmarks.loader import whole_then_crop
from utils.config.schema import AugmentSection, StrongSection

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
    return size, View(scaled, top, left, crop, draw(st.booleans()))


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


def test_colours_depend_on_the_sample_alone_and_leave_torch_alone():
    image, strong = noise((20, 30)), StrongSection()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(np.asarray(recolour(image, strong, np.random.default_rng(5))))
        assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(*results)
    others = [np.asarray(recolour(image, strong, np.random.default_rng(seed))) for seed in range(6)]
    assert sum(np.array_equal(other, results[0]) for other in others) == 1


def test_colours_leave_the_accelerators_generator_alone(monkeypatch):
    # With workers=0 they are drawn in the training process: its dropout must not notice.
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    recolour(noise((8, 8)), StrongSection(), np.random.default_rng(0))
    assert seeded == []


def test_strong_settings_of_zero_change_nothing():
    never = StrongSection(jitter_chance=0, grey_chance=0, blur_chance=0)
    image = noise((20, 30))
    for seed in range(10):
        assert np.array_equal(recolour(image, never, np.random.default_rng(seed)), image)
