from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.catalog import KINDS
from dataset.lists import Sample, read_splits
from dataset.query import Querier, QueryRule, build_query_index
from utils import IMAGENET
from utils.config.schema import AugmentSection, DatasetSection, QuerySection
from utils.errors import UserError

WIDE = AugmentSection(base_size=60, scale=(1.0, 1.0), crop_size=60)  # keeps all of the image
RULE = QueryRule(num_classes=5, min_area=0.03, excluded=frozenset({0}))


def ids(*rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def stripes(*classes):
    """A 20 x 60 mask whose columns belong to these classes, in equal parts."""
    return ids(*[np.repeat(classes, 60 // len(classes))] * 20)


@pytest.fixture
def folder(tmp_path):
    """Write labeled samples from masks; the image is as red as its number says."""

    def write(**masks: Image.Image) -> list[Sample]:
        samples = []
        for number, (name, mask) in enumerate(masks.items()):
            image, path = tmp_path / f"{name}.png", tmp_path / f"{name}_ids.png"
            Image.new("RGB", mask.size, (10 * number, 99, 99)).save(image)
            mask.save(path)
            samples.append(Sample(name, image, path))
        return samples

    return write


def red(query) -> int:
    """Undo the normalisation of a query's first pixel."""
    return round(255 * (query.image[0, 0, 0].item() * IMAGENET.std[0] + IMAGENET.mean[0]))


def querier_of(samples, rule=RULE, augment=WIDE):
    return Querier(samples, build_query_index(samples, rule), rule, augment)


def draws(count, samples, name, mask, augment=WIDE):
    """Draw so many partners of an image."""
    querier, rng = querier_of(samples, augment=augment), np.random.default_rng(0)
    return [querier.draw(name, mask, rng) for _ in range(count)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([1] * 97 + [2] * 3, [1, 2]),  # exactly min_area
        ([1] * 98 + [2] * 2, [1]),
        ([1] * 32 + [2] * 1 + [255] * 67, [1, 2]),  # 1 of 33 valid pixels, of 100 in all
        ([0] * 50 + [4] * 50, [4]),
        ([0] * 100, []),
        ([255] * 100, []),
    ],
)
def test_rule_counts_the_share_of_valid_pixels(columns, expected):
    assert RULE.classes_in(ids(columns)) == expected


def test_rule_is_read_off_the_config():
    kind = KINDS["demo"]
    rule = QueryRule.of(QuerySection(min_area=0.1, exclude=["background", "fish"]), kind)
    assert rule == (7, 0.1, frozenset({0, kind.classes.index("fish")}))
    with pytest.raises(UserError, match=r"query\.exclude: 'cat' is no class; there are background"):
        QueryRule.of(QuerySection(exclude=["cat"]), kind)


def test_index_lists_labeled_images_by_class(folder):
    samples = folder(a=stripes(0, 3), b=stripes(1, 3), c=stripes(0, 255))
    assert build_query_index(samples, RULE) == {1: ["b"], 3: ["a", "b"]}


@given(seed=st.integers(0, 2**32))
def test_partner_shows_the_class_in_its_crop(seed, demo_root):
    splits = read_splits(DatasetSection(kind="demo", root=str(demo_root)))
    rule = QueryRule.of(QuerySection(exclude=["background"]), KINDS["demo"])
    augment = AugmentSection(base_size=64, crop_size=20)  # a tenth of the image
    querier, rng = querier_of(splits.labeled, rule, augment), np.random.default_rng(seed)
    mask = ids(*rng.integers(0, 7, (10, 10)))
    query = querier.draw(splits.unlabeled[0].name, mask, rng)
    assert query.image.shape[1:] == query.label.shape == (20, 20)
    assert query.shared_class != 0
    if query.shared_class != 255:
        assert query.shared_class in rule.classes_in(mask)
        assert (query.label == query.shared_class).any()


def test_crops_aimed_at_a_small_object_find_it(folder):
    mask = np.zeros((60, 60), np.uint8)
    mask[50:, :12] = 3  # 3.3 % of the image
    samples, augment = (
        folder(small=Image.fromarray(mask)),
        AugmentSection(base_size=60, crop_size=20),
    )
    queries = draws(50, samples, "other", stripes(3), augment)
    assert {query.shared_class for query in queries} == {3}


def test_image_is_never_its_own_partner(folder):
    samples = folder(a=stripes(1), b=stripes(1, 2), c=stripes(2))
    assert set(map(red, draws(60, samples, "b", stripes(1, 2)))) == {0, 20}


def test_class_that_no_other_image_shows_is_not_queried(folder):
    samples = folder(a=stripes(1), b=stripes(2), c=stripes(3))
    queries, alone = (draws(40, samples, "a", mask) for mask in (stripes(1, 2), stripes(1)))
    assert {query.shared_class for query in queries} == {2}
    assert {query.shared_class for query in alone} == {255}
    assert {red(query) for query in alone} == {10, 20}  # never a itself


def test_class_that_scaling_drops_from_the_crop_is_not_called_shared(folder):
    # At a third of the size nearest neighbour reads columns 1, 4, 7, ...: never the class's.
    samples = folder(a=stripes(*[3, 0, 0] * 20))
    small = AugmentSection(base_size=20, scale=(1.0, 1.0), crop_size=20)
    for augment, shared in ((WIDE, 3), (small, 255)):
        (query,) = draws(1, samples, "x", stripes(3), augment)
        assert query.shared_class == shared


@pytest.mark.parametrize("mask", [stripes(0), stripes(255), stripes(0, 255)])
def test_nothing_to_share_gives_255(folder, mask):
    queries = draws(20, folder(a=stripes(0, 1), b=stripes(0)), "x", mask)
    assert {query.shared_class for query in queries} == {255}


def test_classes_and_partners_are_drawn_evenly(folder):
    samples = folder(a=stripes(1), b=stripes(1), c=stripes(1), d=stripes(2))
    queries = draws(1200, samples, "x", stripes(1, 1, 1, 1, 1, 2))
    classes = Counter(query.shared_class for query in queries)
    assert classes[2] == pytest.approx(600, abs=80)  # by class, not by area
    partners = Counter(red(query) for query in queries)
    assert [partners[red] for red in (0, 10, 20)] == pytest.approx([200] * 3, abs=60)
