import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import reading, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from simulated import simulated_cuda
from torch.utils.data import DataLoader

from dataset.cache import Memory, sample_reader
from dataset.lists import read_sample, read_splits, with_pseudo_masks
from dataset.loader import (
    RandomStreams,
    SampleKey,
    epoch_batches,
    training_batches,
    whole_images,
)
from dataset.query import NoPartner
from dataset.reading import read_image, read_mask, to_input, to_label
from dataset.training import LabeledPairs, parts
from utils import IMAGENET, Preprocessing
from utils.config.reading import read_config
from utils.config.schema import DatasetSection
from utils.device import Device
from utils.errors import UserError
from utils.evaluation import iterate_batches
from utils.run.stages import Run

CHANCE = RandomStreams(0, "4_retrain")


@pytest.fixture
def pairs(splits, querier, augment):
    return LabeledPairs(splits.labeled, augment, CHANCE, 2, querier)


@pytest.fixture
def uniform(pairs):
    """Pairs of no queries."""
    return replace(pairs, querier=None)


def flat(record) -> list[torch.Tensor]:
    if isinstance(record, tuple):
        return [tensor for part in record for tensor in flat(part)]
    return [torch.as_tensor(record)]


def same(one, other) -> bool:
    pairs = zip(flat(one), flat(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@given(st.integers(0, 2**40), st.lists(st.integers(0, 9), max_size=2), st.data())
def test_chance_is_the_same_at_a_place_and_different_elsewhere(seed, place, data):
    chance = RandomStreams(seed, "1_supervised")
    assert chance.torch_seed(*place) == RandomStreams(seed, "1_supervised").torch_seed(*place)
    elsewhere = data.draw(st.lists(st.integers(0, 9), max_size=2).filter(lambda p: p != place))
    others = (
        chance.torch_seed(*elsewhere),
        RandomStreams(seed + 1, "1_supervised").torch_seed(*place),
    )
    others = *others, RandomStreams(seed, "4_retrain").torch_seed(*place)
    assert chance.torch_seed(*place) not in others


@pytest.mark.parametrize(("length", "batch_size"), [(7, 3), (6, 3), (5, 5)])
def test_epoch_passes_every_sample_at_most_once(length, batch_size):
    batches = list(epoch_batches(length, batch_size, range(3), CHANCE))
    steps = length // batch_size
    assert [len(batch) for batch in batches] == [batch_size] * (3 * steps)
    epochs = [
        [key for batch in batches[e * steps : (e + 1) * steps] for key in batch] for e in range(3)
    ]
    for epoch, keys in enumerate(epochs):
        assert {key.epoch for key in keys} == {epoch}
        assert len({key.index for key in keys}) == len(keys)
    orders = {tuple(key.index for key in keys) for keys in epochs}
    assert len(orders) == 3


def test_run_that_goes_on_sees_what_the_whole_run_saw(pairs):
    whole = list(training_batches(pairs, 5, range(3), CHANCE, workers=0))
    rest = list(training_batches(pairs, 5, range(1, 3), CHANCE, workers=0))
    assert len(whole) == 6
    assert len(rest) == 4
    assert all(same(a, b) for a, b in zip(whole[2:], rest, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["pairs", "uniform", "retrain"])
def test_batches_do_not_depend_on_the_workers(name, workers, request):
    dataset = request.getfixturevalue(name)
    torch.manual_seed(1)
    alone = list(training_batches(dataset, 4, range(2), CHANCE, workers=0))
    torch.manual_seed(2)
    shared = list(training_batches(dataset, 4, range(2), CHANCE, workers=workers))
    assert len(alone) == 2 * (len(dataset) // 4)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("name", ["pairs", "uniform", "retrain"])
def test_sample_is_its_keys_and_leaves_all_generators_alone(name, request):
    dataset = request.getfixturevalue(name)
    torch.manual_seed(3)
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    first = dataset[SampleKey(0, 1)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert same(dataset[SampleKey(0, 1)], first)
    assert not same(dataset[SampleKey(1, 1)], first)
    assert not same(dataset[SampleKey(0, 2)], first)


def test_repeated_image_is_augmented_anew(pairs):
    assert len(pairs) == 12
    assert not torch.equal(pairs[SampleKey(0, 1)].image, pairs[SampleKey(0, 7)].image)


def test_student_sees_the_teachers_crop_in_other_colours(retrain):
    strong = replace(retrain, strong_teacher=True)
    recoloured = 0
    for index in range(4):
        one, other = retrain[SampleKey(0, index)], strong[SampleKey(0, index)]
        assert same(one[1:], other[1:])
        assert torch.equal(other.image, other.student_image[0])
        recoloured += not torch.equal(one.image, one.student_image[0])
    assert recoloured >= 3


def test_without_a_querier_nothing_else_changes_and_no_partner_is_read(retrain):
    plain = replace(retrain, querier=None)
    for index in range(4):
        one, other = retrain[SampleKey(0, index)], plain[SampleKey(0, index)]
        assert same(one._replace(partner=NoPartner()), other)
    batch = next(iter(DataLoader(plain, batch_sampler=KEYS)))
    assert batch.partner == NoPartner()
    assert [part.partner for part in parts(batch, 2)] == [NoPartner()] * 2


def test_supervised_training_sees_every_labeled_image_equally_often(splits, augment):
    """Without queries: a sample is told by its image, which is as red as its number says."""
    count = len(splits.labeled)

    def read(sample):
        number = splits.labeled.index(sample)
        return Image.new("RGB", (64, 64), (20 * number, 0, 0)), Image.new("L", (64, 64))

    pairs = LabeledPairs(splits.labeled, augment, CHANCE, 2, None, read)
    for epoch in range(count):
        items = [pairs[SampleKey(epoch, index)] for index in range(len(pairs))]
        reds = [
            round(255 * (image[0].max().item() * IMAGENET.std[0] + IMAGENET.mean[0]) / 20)
            for item in items
            for image in (item.image, item.partner_image)
        ]
        assert [reds.count(number) for number in range(count)] == [4] * count
        assert all(one != other for one, other in zip(reds[::2], reds[1::2], strict=True))
        assert {item.shared_class for item in items} == {255}


def test_every_image_is_normalised_by_the_encoders_record(splits, pairs, retrain):
    other = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))

    def images(record):
        pair = replace(pairs, preprocessing=record)[SampleKey(0, 0)]
        sample = replace(retrain, preprocessing=record)[SampleKey(0, 0)]
        loader = whole_images(reading(), splits.val, record)
        (whole, *_) = iterate_batches(loader, Device("cpu", "fp32"), "reading")
        trained = [pair.image, pair.partner_image, sample.image, sample.student_image[0]]
        return [*trained, sample.labeled_image, sample.partner.image, whole.image[0]]

    for ours, theirs in zip(images(other), images(IMAGENET), strict=True):
        assert torch.allclose(ours * 0.25 + 0.5, theirs * std + mean, atol=1e-5)


def test_bicubic_encoders_are_given_bicubic_crops(pairs):
    one, other = (
        replace(pairs, preprocessing=Preprocessing(interpolation=name))[SampleKey(0, 0)]
        for name in ("bilinear", "bicubic")
    )
    assert not torch.equal(one.image, other.image)
    assert torch.allclose(one.image, other.image, atol=1.0)
    assert torch.equal(one.label, other.label)


def test_every_unlabeled_image_meets_every_labeled_one(splits, retrain):
    samples = replace(retrain, unlabeled=splits.val * 2)
    met = {samples.names([SampleKey(epoch, 0)])[1] for epoch in range(6)}
    assert met == {sample.name for sample in splits.labeled}


def test_more_labeled_than_unlabeled_images_all_have_their_turn(splits, retrain):
    samples = replace(retrain, unlabeled=splits.val[:2], labeled=splits.labeled[:5])
    met = [samples.names([SampleKey(e, i)])[1] for e in range(5) for i in range(2)]
    names = [sample.name for sample in splits.labeled[:5]]
    assert met[:5] == names
    assert met[5:] == [*names[1:], names[0]]  # the next lap begins one further


def test_whole_images_keep_the_lists_order_and_their_own_size(splits):
    for workers in (0, 2):
        config = reading(workers, long_side=32, batch_size=1)  # the predictor resizes
        items = list(whole_images(config, splits.val))
        assert [item.index.item() for item in items] == [0, 1, 2, 3]
        assert {item.image.shape for item in items} == {(1, 3, 48, 64)}
        assert {item.label.shape for item in items} == {(1, 48, 64)}
    (item,) = whole_images(reading(), splits.unlabeled[:1])
    assert (item.label == 255).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_become_numbers_on_the_device(splits, workers):
    """Pinned on the way there; the index, which the CPU asks for, stays."""
    here = whole_images(reading(batch_size=2), splits.val)
    assert not here.pin_memory
    assert {(batch.image.dtype, batch.label.dtype) for batch in here} == {(torch.uint8,) * 2}
    expected = list(iterate_batches(here, Device("cpu", "fp32"), "reading"))
    with simulated_cuda():
        loader = whole_images(reading(workers, batch_size=2), splits.val)
        assert loader.pin_memory
        found = list(iterate_batches(loader, Device("cuda", "fp32"), "reading"))
        assert {(str(b.image.device), str(b.label.device), str(b.index.device)) for b in found} == {
            ("cuda:0", "cuda:0", "cpu")
        }
    assert {(batch.image.dtype, batch.label.dtype) for batch in found} == {
        (torch.float32, torch.int64)
    }
    for ours, theirs, sample in zip(found, expected, splits.val[::2], strict=True):
        assert same(tuple(x.cpu() for x in ours), theirs)
        picture = to_input(read_image(sample.image), IMAGENET)
        assert torch.equal(theirs.image[0], picture)
        assert torch.equal(theirs.label[0], to_label(read_mask(sample.mask)))


def test_images_of_one_size_share_batches_wherever_they_stand(demo_copy):
    samples = read_splits(DatasetSection(kind="demo", root=str(demo_copy))).unlabeled[:7]
    for index in (1, 4, 5):
        Image.new("RGB", (32, 20)).save(samples[index].image)
    batches = list(whole_images(reading(batch_size=2), samples))
    assert [batch.index.tolist() for batch in batches] == [[0, 2], [1, 4], [3, 6], [5]]
    assert [tuple(batch.image.shape[-2:]) for batch in batches[:2]] == [(48, 64), (20, 32)]


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_error_is_the_same_one_line(demo_copy, pairs, workers):
    labeled = read_splits(DatasetSection(kind="demo", root=str(demo_copy))).labeled
    for sample in labeled:
        sample.image.write_bytes(sample.image.read_bytes()[:600])
    spoilt = replace(pairs, labeled=labeled)
    line = refusal(next, iter(training_batches(spoilt, 4, range(1), CHANCE, workers)))
    assert line.startswith(str(demo_copy))
    assert "\n" not in line


KEYS = [[SampleKey(0, 0), SampleKey(0, 1)], [SampleKey(1, 3), SampleKey(0, 2)]]


def test_memory_holds_what_the_files_hold(splits):
    read = sample_reader("ram", splits.labeled, threads=3)
    for sample in splits.labeled:
        for ours, theirs in zip(read(sample), read_sample(sample), strict=True):
            assert ours.mode == theirs.mode
            assert np.array_equal(ours, theirs)
    assert sample_reader(None, splits.labeled, threads=3) is read_sample


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_the_memory_and_give_the_same_batches(retrain, querier, start, splits):
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {start}")
    expected = list(DataLoader(retrain, batch_sampler=KEYS))
    memory = Memory(splits.val + splits.labeled, 2)
    spoilt = with_pseudo_masks(splits.val, splits.val[0].image / "nowhere")  # by name alone
    cached = replace(retrain, unlabeled=spoilt, querier=replace(querier, read=memory), read=memory)
    loader = DataLoader(cached, batch_sampler=KEYS, num_workers=1, multiprocessing_context=start)
    assert all(same(a, b) for a, b in zip(loader, expected, strict=True))


def test_block_that_the_system_refuses_is_told_in_one_line(splits, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("unable to allocate\nshared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    line = refusal(Memory, splits.labeled, 1)
    assert re.search(r"^cache: .*0\.00 GB .*unable to allocate shared memory\); set cache", line)


def test_unreadable_picture_ends_the_filling_in_one_line(demo_copy):
    splits = read_splits(DatasetSection(kind="demo", root=str(demo_copy)))
    image = splits.labeled[2].image
    image.write_bytes(image.read_bytes()[:600])
    with pytest.raises(UserError, match=rf"^{image}: cannot read this picture"):
        Memory(splits.labeled, 2)


def test_cache_may_change_between_the_stages_of_a_run(demo_overrides):
    plain, cached = (
        read_config("demo.yaml", [*demo_overrides, f"cache={value}"]) for value in ("null", "ram")
    )
    with Run(plain) as run:
        run.stage("1_supervised", lambda _: {})
    assert Run(cached).stages == {}  # not refused
