"""Aimed crops: chances of classes and images, and what training sets draw."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dataset.aim import ClassAim, random_pixel
from dataset.lists import Sample
from dataset.loader import RandomStreams, SampleKey
from dataset.training import LabeledPairs, RetrainSamples
from utils import IGNORE
from utils.config.schema import AugmentSection

CHANCE = RandomStreams(0, "1_supervised")
SMALL = {"base_size": 60, "scale": (1.0, 1.0), "crop_size": 10}


@pytest.fixture
def labeled(tmp_path):
    """Three images of 20 x 60: class 0 has 90 % of the pixels that count, 2 has 9 %, 5 has 1 %.

    Class 5 is in the last one only. An image is as red as its position.
    """
    masks = np.zeros((3, 20, 60), np.uint8)
    masks[:, :10] = IGNORE
    masks[0, 10:, :16] = 2
    masks[2, 10, :2] = 2
    masks[2, 19, 42:] = 5
    samples = []
    for number, mask in enumerate(masks):
        image, file = tmp_path / f"{number}.png", tmp_path / f"{number}_ids.png"
        Image.new("RGB", (60, 20), (10 * number, 99, 99)).save(image)
        Image.fromarray(mask).save(file)
        samples.append(Sample(str(number), image, file))
    return samples


def aimed(aim=1.0, **settings):
    return AugmentSection(**SMALL, aim=aim, **settings)


def position(image) -> int:
    """Undo the normalisation of a crop's reddest pixel, which is no padding."""
    return round((image[0].max().item() * 0.229 + 0.485) * 25.5)


@pytest.mark.parametrize(
    ("aim", "expected"),
    [
        (0.001, {0: 0.9, 2: 0.09, 5: 0.01}),
        (0.5, {0: 0.9**0.5, 2: 0.3, 5: 0.1}),
        (1.0, {0: 1, 2: 1, 5: 1}),
    ],
)
def test_chances_are_shares_of_the_labeled_pixels_to_a_power(labeled, aim, expected):
    chances = ClassAim.of(labeled, aim).chances
    assert len(chances) == IGNORE
    total = sum(expected.values())
    by_hand = [expected.get(label, 0) / total for label in range(IGNORE)]
    assert chances == pytest.approx(by_hand, abs=2e-3)


def test_images_are_drawn_among_those_that_show_the_class(labeled):
    aim, rng = ClassAim.of(labeled, 1.0), np.random.default_rng(0)
    drawn = Counter(aim.draw_image(rng) for _ in range(1800))
    assert drawn.keys() == {(0, 0), (1, 0), (2, 0), (0, 2), (2, 2), (2, 5)}
    assert drawn[2, 5] == pytest.approx(600, abs=80)
    assert drawn[1, 0] == pytest.approx(200, abs=50)
    assert drawn[0, 2] == pytest.approx(300, abs=60)


def test_classes_of_a_mask_are_drawn_by_their_chances(labeled):
    aim, rng = ClassAim.of(labeled, 0.5), np.random.default_rng(0)
    mask = Image.open(labeled[2].mask)
    drawn = Counter(aim.draw_class(mask, rng) for _ in range(2000))
    assert drawn.keys() == {0, 2, 5}
    assert drawn[5] / drawn[2] == pytest.approx(1 / 3, abs=0.08)
    strange = Image.fromarray(np.array([[3, IGNORE]], np.uint8))  # 3: no labeled image shows it
    assert aim.draw_class(strange, rng) is None


def test_every_pixel_of_the_class_can_be_drawn():
    rng = np.random.default_rng(0)
    mask = Image.fromarray(np.array([[1, 0, 1], [0, 0, 1]], np.uint8))
    assert {random_pixel(mask, 1, rng) for _ in range(60)} == {(0, 0), (0, 2), (1, 2)}


def test_half_of_the_labeled_crops_are_drawn_for_a_class(labeled):
    """The first of a pair comes in turn; the rare class is in a third of the second ones."""
    pairs = LabeledPairs(labeled, aimed(rotate=20.0), CHANCE, 100)
    items = [pairs[SampleKey(epoch, index)] for epoch in range(2) for index in range(len(pairs))]
    assert Counter(position(item.image) for item in items) == {0: 200, 1: 200, 2: 200}
    others = Counter(position(item.partner_image) for item in items)
    assert others[2] / 600 == pytest.approx(1 / 3 + 1 / 9 + 1 / 6, abs=0.08)
    shown = [(item.partner_label == 5).any().item() for item in items]
    assert np.mean(shown) > 0.3
    assert {item.shared_class for item in items} == {IGNORE}
    plain = LabeledPairs(labeled, AugmentSection(**SMALL), CHANCE, 100)
    rare = [(plain[SampleKey(0, index)].partner_label == 5).any() for index in range(300)]
    assert np.mean(rare) < 0.2


def test_crops_of_images_in_turn_are_aimed_too(labeled):
    pairs = LabeledPairs(labeled[2:], aimed(), CHANCE, 300)
    labels = [pairs[SampleKey(0, index)].label for index in range(300)]
    assert all((label != IGNORE).any() for label in labels)
    assert np.mean([(label == 2).any().item() for label in labels]) > 0.3  # 2 of 1200 pixels


def test_queried_pairs_are_left_as_they_are(pairs_of):
    plain, aims = pairs_of(0.0), pairs_of(1.0)
    assert aims.aim is None
    for index in range(3):
        one, other = plain[SampleKey(0, index)], aims[SampleKey(0, index)]
        assert (one.image == other.image).all()
        assert (one.partner_image == other.partner_image).all()


@pytest.fixture
def pairs_of(splits, querier, augment):
    """Queried pairs of the demo, by their aim."""

    def make(aim):
        settings = augment.model_copy(update={"aim": aim})
        return LabeledPairs(splits.labeled, settings, CHANCE, querier=querier)

    return make


def test_retraining_aims_at_labels_and_pseudo_labels(labeled):
    unlabeled = [labeled[2]] * 400  # its mask stands for a pseudo label
    samples = RetrainSamples(unlabeled, labeled, aimed(), CHANCE)
    keys = [SampleKey(0, index) for index in range(400)]
    items = [samples[key] for key in keys]
    shares = {
        name: np.mean([(getattr(item, name) == 5).any().item() for item in items])
        for name in ("pseudo_label", "labeled_label")
    }
    assert shares["pseudo_label"] > 1 / 3 - 0.05
    assert shares["labeled_label"] > 1 / 2 * (1 / 3 + 1 / 3 * 1 / 3) - 0.05
    seen = [position(item.labeled_image) for item in items]
    assert samples.names(keys)[1::2] == [str(number) for number in seen]  # as errors name them
    assert Counter(seen)[1] / 400 == pytest.approx((1 / 3 + 1 / 9) / 2, abs=0.07)


def test_images_without_a_pseudo_label_are_not_aimed(labeled):
    """Where the running average labels, none is stored."""
    unlabeled = [labeled[0]._replace(mask=None)] * 4
    aims = RetrainSamples(unlabeled, labeled, aimed(), CHANCE)
    plain = replace(aims, augment=AugmentSection(**SMALL))
    for index in range(4):
        one, other = aims[SampleKey(0, index)], plain[SampleKey(0, index)]
        assert (one.student_image == other.student_image).all()


@pytest.mark.parametrize("kind", ["pairs", "samples"])
def test_an_aimed_sample_is_its_key(labeled, kind):
    def make():
        if kind == "pairs":
            return LabeledPairs(labeled, aimed(), CHANCE, 4)
        return RetrainSamples(labeled, labeled, aimed(), CHANCE)

    key = SampleKey(3, 1)
    first, again = make(), make()
    first[SampleKey(0, 0)]  # what ran before does not count
    for one, other in zip(first[key][:4], again[key][:4], strict=True):
        assert (one == other).all()
