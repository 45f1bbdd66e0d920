"""The objectives of train.py, and one training step, on networks small enough to check."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import as_objective
from torch import nn

from dataset.query import Partner
from dataset.training import LabeledPair, RetrainSample
from dataset.votes import CropVotes
from model.cisc.calibration import Exponents
from model.cisc.maps import class_region, cross_image_weight, masked_average_pooling
from model.cisc.students import (
    ClassPixels,
    Labeler,
    MixedView,
    cut_mix,
    cut_out,
    label_probability,
    needs_teacher,
    predict_labels,
    student_batch,
)
from model.fitting import TrainingStep
from model.losses import (
    cross_entropy,
    dice_loss,
    ohem_cross_entropy,
    rectified_cross_entropy,
    rectified_dice_loss,
)
from model.ops.layers import SegmentationNetwork
from train import _losses, retrain_loss, supervised_loss
from utils import IGNORE
from utils.config.schema import (
    DatasetSection,
    LossSection,
    OhemSection,
    OptimizerSection,
    RetrainSection,
)
from utils.device import Device
from utils.optimization import Optimization

CPU, CLASSES = Device("cpu", "fp32"), 4
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # means of parts are far off


class Net(SegmentationNetwork):
    """Features are a convolution of the image, at its size; no batch norm, no dropout."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def extract(self, images):
        return self.backbone(images).relu()

    def classify(self, features):
        return self.head(features)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, 4, 9, 9))
    labels[:, :2, :7] = IGNORE  # valid pixels and shared classes differ between parts
    images = torch.randn(2, 4, 3, 9, 9)
    shared_class = torch.tensor([IGNORE, 1, 0, 2])
    return LabeledPair(images[0], labels[0], images[1], labels[1], shared_class)


@pytest.fixture
def samples(pair):
    partner = Partner(pair.shared_class, pair.partner_image.flip(0), pair.partner_label.flip(0))
    strong = (pair.image + 0.1).unsqueeze(1)
    labeled = pair.partner_image, pair.partner_label
    return RetrainSample(pair.image, pair.label, strong, *labeled, partner)


class Weigher(Labeler):
    """Weighs pixels by the image, so that weights differ from pixel to pixel."""

    def __call__(self, samples):
        return samples.pseudo_label, samples.image.mean(dim=1).sigmoid()


def prepared(samples, kind=Labeler, **settings):
    """Views, unmixed unless the settings say so."""
    return student_batch(samples, kind(RetrainSection(**{"mix": "none", **settings})))


def retrained(net, samples, kind=Weigher, **settings):
    batch = prepared(samples, kind, **settings)
    dropout = settings.get("feature_dropout", 0.0)
    return retrain_loss(net, batch, batch, cross_entropy, dropout)


def chosen_losses(settings, ohem=None):
    names = [f"class {number}" for number in range(CLASSES)]
    dataset = DatasetSection(kind="custom", root=".", classes=names)
    config = SimpleNamespace(loss=settings, ohem=ohem, dataset=dataset)
    log = SimpleNamespace(say=lambda line: None)
    return _losses(SimpleNamespace(config=config, device=CPU, name="1", log=log), [])


def test_dice_is_added_to_each_cross_entropy(samples):
    logits, label = samples.image.repeat(1, 2, 1, 1)[:, :CLASSES], samples.pseudo_label
    weight, pixels = samples.image[:, 0].sigmoid(), torch.tensor(500)
    off, on = chosen_losses(LossSection()), chosen_losses(LossSection(dice=0.5))
    entropy = cross_entropy(logits, label, pixels)
    assert torch.equal(off.labeled(logits, label, pixels), entropy)
    close(on.labeled(logits, label, pixels), entropy + 0.5 * dice_loss(logits, label, pixels))
    maps = logits, label, weight, pixels
    assert torch.equal(off.pseudo(*maps), rectified_cross_entropy(*maps))
    close(on.pseudo(*maps), rectified_cross_entropy(*maps) + 0.5 * rectified_dice_loss(*maps))
    hard = chosen_losses(LossSection(dice=0.5), OhemSection(threshold=0.1, min_kept=20))
    entropy = ohem_cross_entropy(logits, label, pixels, threshold=0.1, min_kept=20)
    close(hard.labeled(logits, label, pixels), entropy + 0.5 * dice_loss(logits, label, pixels))


def test_retraining_learns_from_pseudo_labels_by_the_loss_it_is_given(net, samples):
    batch = prepared(samples, Weigher)
    loss = retrain_loss(net, batch, batch, cross_entropy, 0.0, rectified_dice_loss)
    logits = net(samples.student_image[:, 0]).logits
    weight = batch.view_weight[:, 0]
    close(loss.terms["unlabeled"], rectified_dice_loss(logits, samples.pseudo_label, weight))


def test_supervised_loss_adds_its_terms(net, pair):
    loss = partial(supervised_loss, labeled_loss=cross_entropy)
    plain = loss(net, pair, pair, consistency=0.0)
    both = cross_entropy(net(pair.image).logits, pair.label)
    both = both + cross_entropy(net(pair.partner_image).logits, pair.partner_label)
    close(plain.total, both)
    assert plain.terms.keys() == {"ce"}
    consistent = loss(net, pair, pair, consistency=2.0)
    close(consistent.total, plain.total + 2 * consistent.terms["consistency"])


def test_retrain_loss_adds_both_kinds_of_images_with_weight_one(net, samples):
    loss = retrained(net, samples, Labeler)
    unlabeled = cross_entropy(net(samples.student_image[:, 0]).logits, samples.pseudo_label)
    labeled = cross_entropy(net(samples.labeled_image).logits, samples.labeled_label)
    close(loss.total, unlabeled + labeled)
    assert loss.terms["weight"] == 1.0
    more = retrained(net, samples, Labeler, learn_partners=True)
    partners = cross_entropy(net(samples.partner.image).logits, samples.partner.label)
    close(more.total, loss.total + partners)


def test_views_are_averaged_and_count_as_much_as_the_perturbed_one(net, samples):
    torch.manual_seed(0)
    two = samples._replace(student_image=torch.randn(4, 2, 3, 9, 9))
    first, second = (
        retrained(net, samples._replace(student_image=two.student_image[:, [view]]))
        for view in (0, 1)
    )
    both = retrained(net, two)
    close(both.terms["unlabeled"], (first.terms["unlabeled"] + second.terms["unlabeled"]) / 2)
    dropped = retrained(net, two, feature_dropout=1e-12)  # nothing is dropped
    weak = retrained(net, samples._replace(student_image=samples.image.unsqueeze(1)))
    expected = (both.terms["unlabeled"] + weak.terms["unlabeled"]) / 2
    close(dropped.terms["unlabeled"], expected)


def test_pixels_that_mixing_ignores_do_not_count_in_the_mean(net, samples):
    torch.manual_seed(0)
    view = prepared(samples, mix="cutout")
    assert (view.view_label == IGNORE).sum() > (samples.pseudo_label == IGNORE).sum()
    torch.manual_seed(0)
    loss = retrained(net, samples, Labeler, mix="cutout")
    close(
        loss.terms["unlabeled"],
        cross_entropy(net(view.view_image[:, 0]).logits, view.view_label[:, 0]),
    )
    assert loss.terms["weight"] == 1.0


def test_partners_weigh_pixels_by_their_cisc_maps(net, samples):
    labeler = Labeler(RetrainSection(weight="cisc_map"), net)
    label, weight = labeler(samples)
    assert torch.equal(label, samples.pseudo_label)
    partner, features = samples.partner, net.extract(samples.image)
    region = class_region(partner.label, partner.shared_class)
    prototype = masked_average_pooling(net.extract(partner.image), region)
    shared = partner.shared_class
    close(weight, cross_image_weight(features, prototype, samples.pseudo_label, shared))
    assert (weight[0] == 1).all()  # shares no class
    assert weight[1].min() < 0.9
    place, shown = (1, 8, 3), labeler.cisc_map(samples)  # a cosine by hand
    cosine = torch.cosine_similarity(features[1, :, 8, 3], prototype[1], dim=0).clamp(0, 1)
    close(shown[place], cosine)
    region = float(samples.pseudo_label[place] == shared[1])
    close(weight[place], 1 - (region - cosine).abs())


def test_a_teacher_passes_only_where_it_is_asked():
    def asked(**settings):
        section = RetrainSection(**settings)
        teacher = "net" if needs_teacher(section) else None
        average = "net" if section.labels == "average" else None
        return Labeler(section, teacher, average).images_passed

    assert asked() == 0
    assert asked(threshold=0.5) == 1
    assert asked(weight="cisc_map") == 2
    assert asked(labels="average", threshold=0.95) == 1


def test_confidence_is_the_probability_of_the_label(net, samples):
    probability = net(samples.image).logits.softmax(dim=1)
    confidence = label_probability(net, net.extract(samples.image), samples.pseudo_label)
    label = samples.pseudo_label[3, 8, 8]
    assert confidence[3, 8, 8] == probability[3, label, 8, 8]
    padding = samples.pseudo_label == IGNORE
    assert (confidence[padding] == 0).all()
    predicted, most = predict_labels(net, samples, None)
    assert (predicted[padding] == IGNORE).all()
    assert torch.equal(predicted[~padding], probability.argmax(dim=1)[~padding])
    assert (most >= confidence).all()
    _, weight = Labeler(RetrainSection(threshold=0.3), net)(samples)
    assert torch.equal(weight, (confidence >= 0.3).float())
    average = RetrainSection(labels="average", threshold=0.3)
    label, weight = Labeler(average, None, net)(samples)
    assert torch.equal(label, predicted)
    assert torch.equal(weight, (most >= 0.3).float())


def test_votes_correct_the_running_average(net, samples):
    """By hand at a pixel; padding alone is ignored, not what the stored label ignores."""
    shown = torch.ones(4, 9, 9, dtype=torch.bool)
    shown[:, :, 7:] = False
    ratio = 2 * torch.randn(4, CLASSES, 3, 3).half()
    voted = samples._replace(votes=CropVotes(ratio, shown))
    settings = RetrainSection(labels="average", threshold=0.6)
    label, weight = Labeler(settings, None, net, Exponents(0.8, 1.5))(voted)
    assert (label[~shown] == IGNORE).all()
    assert (samples.pseudo_label[shown] == IGNORE).any()
    assert (label[shown] != IGNORE).all()
    own = net(samples.image).logits.softmax(dim=1)
    for y, x in ((0, 4), (4, 0), (4, 4)):  # where the ratios' places are
        power = own[2, :, y, x] ** 0.8 * ratio[2, :, y // 4, x // 4].float().exp() ** 1.5
        both = power / power.sum()
        assert label[2, y, x] == both.argmax()
        assert weight[2, y, x] == (both.max() >= 0.6)
    assert 0 < weight.mean() < 1
    labeler = Labeler(settings.model_copy(update={"mix": "none"}), None, net, Exponents(0.8, 1.5))
    whole = student_batch(voted, labeler)
    parts = replace(labeler, settings=labeler.settings.model_copy(update={"accumulate": 2}))
    for one, other in zip(student_batch(voted, parts), whole, strict=True):
        close(one, other)


def test_pixels_of_each_class_are_counted():
    seen = ClassPixels(3)
    seen.count(torch.tensor([[0, 0, IGNORE]]), torch.tensor([[[2, IGNORE]]]))
    seen.count(torch.tensor([2]))
    assert seen.pixels.tolist() == [2, 0, 2]
    assert seen.pixels.dtype == torch.int64  # exact, and every device has it
    assert seen.learnt() == [2, 0, 2]
    weighted = ClassPixels(3, torch.tensor([0.5, 1.0, 4.0]))
    weighted.count(torch.tensor([2, 0, 2]))
    weighted.count_pseudo(torch.tensor([1, 1, IGNORE, 2]))
    assert weighted.learnt() == [0.5, 2, 9]  # the prior that these losses teach


@pytest.fixture
def coded():
    """Views whose image, label and weight tell the image that they are of: 0 to 3."""
    torch.manual_seed(0)
    number = torch.arange(4.0)[:, None, None].expand(4, 9, 9)
    return MixedView(number.unsqueeze(1).expand(4, 3, 9, 9), number.long(), number / 4)


def test_mixed_pixels_keep_image_label_and_weight_together(coded):
    mixed = cut_mix(coded)
    assert torch.equal(mixed.image[:, 0], mixed.label.float())
    assert torch.equal(mixed.image[:, 0], mixed.weight * 4)
    pasted = mixed.label != coded.label
    assert 0 < pasted.sum() < pasted.numel()
    assert torch.equal(mixed.label[pasted], coded.label.roll(-1, 0)[pasted])


def test_cut_out_boxes_are_blank(coded):
    blank = cut_out(coded)
    boxes = blank.label == IGNORE
    assert 0 < boxes.sum() < boxes.numel()
    assert (blank.image[:, 0][boxes] == 0).all()
    assert (blank.weight[boxes] == 0).all()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["pairs", "samples"])
@pytest.mark.parametrize(
    "loss", [LossSection(), LossSection(dice=0.5, class_weights=[0.2, 1, 3, 5])]
)
def test_parts_of_a_batch_give_the_update_of_the_batch(pair, samples, kind, count, loss):
    losses = chosen_losses(loss)
    supervised = partial(supervised_loss, labeled_loss=losses.labeled, consistency=0.7)
    student = partial(retrain_loss, labeled_loss=losses.labeled, pseudo_loss=losses.pseudo)
    mixed = partial(prepared, kind=Weigher, mix="unlabeled")  # as one batch, whatever the parts

    def updated(count):
        torch.manual_seed(1)
        net = Net()
        optimization = Optimization(net, OptimizerSection(lr=0.1), 9, CPU.scaler())
        batch = pair if kind == "pairs" else samples
        objective = as_objective(supervised) if kind == "pairs" else as_objective(student, mixed)
        step = TrainingStep(net, objective, optimization, CPU, count)
        for seed in range(3):
            terms, not_finite = step(batch, seed)
            assert not_finite is None
        return dict(net.state_dict()), terms

    close(updated(count), updated(1))


def test_a_step_that_is_not_finite_updates_nothing(net, pair):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimization = Optimization(net, OptimizerSection(), 9, CPU.scaler())
    loss = partial(supervised_loss, labeled_loss=cross_entropy, consistency=1.0)
    pair = pair._replace(image=pair.image * torch.nan)
    _, not_finite = TrainingStep(net, as_objective(loss), optimization, CPU)(pair, 0)
    assert not_finite != not_finite
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_part_keeps_its_share_of_the_hardest_pixels():
    torch.manual_seed(0)
    logits, label = torch.randn(4, CLASSES, 5, 5), torch.randint(0, CLASSES, (4, 5, 5))
    hard = partial(ohem_cross_entropy, threshold=1e-9, min_kept=20)
    pixels = torch.tensor(100)
    parts = [hard(*part, pixels) for part in zip(logits.chunk(2), label.chunk(2), strict=True)]
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none").chunk(2)
    hardest = [loss.flatten().topk(10).values.mean() for loss in losses]
    torch.testing.assert_close(sum(parts), sum(hardest) / 2)
