"""A run's settings: typed, explained, read from YAML, checked before anything starts."""

import re
from collections import Counter
from contextlib import suppress
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from utils.config.labelmap import read_labelmap

Share = Annotated[float, Field(ge=0, le=1)]
# Upper bounds are far beyond what is of use, and keep a slip of the hand from filling the memory.
Pixels = Annotated[int, Field(gt=0, le=65_500)]  # a side: the longest that JPEG has
Scale = Annotated[float, Field(ge=0.01, le=16)]  # of a side: 16 makes 256 times the pixels
Scales = Annotated[list[Scale], Field(min_length=1, max_length=32)]  # each is one more pass


def _refuse_disorder(numbers: tuple[float, float]) -> tuple[float, float]:
    if numbers[0] > numbers[1]:
        raise ValueError("the smaller number comes first")
    return numbers


def _distinct(names: list[str]) -> list[str]:
    if not 2 <= len(names) <= 255:
        raise ValueError(
            "two to 255 classes; pixels without an object are one too, as in [background, object]"
        )
    if len(set(names)) < len(names):
        raise ValueError("two classes have one name")
    if any("\ud800" <= letter <= "\udfff" for name in names for letter in name):
        raise ValueError("a class name holds a lone surrogate, which UTF-8 cannot encode")
    return names


def _file_id(key: Any) -> int | str:
    if key == "other" or (type(key) is int and 0 <= key <= 65535):
        return key
    if isinstance(key, str) and key.isdecimal():  # on the command line, and in a kept config
        return _file_id(int(key))
    if isinstance(key, str) and re.fullmatch("#[0-9a-fA-F]{6}", key):
        return key.lower()
    channels = re.fullmatch(r"\[?(\d{1,3}), *(\d{1,3}), *(\d{1,3})\]?", str(key))
    if channels and max(colour := [*map(int, channels.groups())]) <= 255:
        return f"#{bytes(colour).hex()}"
    raise ValueError(
        "ids in mask files go from 0 to 65535, colours from '#000000' to '#ffffff' or as "
        "[255, 0, 0]; 'other' stands for all that remain"
    )


def _class(value: Any) -> int | str | None:
    if value is None or isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError("a class is its name or its id; null is ignored")


def _value_range(value: Any) -> tuple[float, float] | str | None:
    if value is None or value == "percentile":
        return value
    numbers = isinstance(value, list | tuple) and [type(x) in (int, float) for x in value]
    if numbers == [True, True] and value[0] < value[1]:
        return tuple(value)
    raise ValueError("two numbers, the lower one first, or percentile, or null")


def _class_weights(value: Any) -> list[float] | str | None:
    if value is None or value == "balanced":
        return value
    numbers = isinstance(value, list | tuple) and all(type(x) in (int, float) for x in value)
    if numbers and all(0 <= x <= 1e6 for x in value) and any(value):
        return list(map(float, value))
    raise ValueError("a number from 0 to 1000000 for each class, not all 0; or balanced, or null")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return text


def _device(name: Any) -> str:
    if isinstance(name, str):
        return name
    raise ValueError("auto, cpu, cuda, cuda:0 (the first of several) or mps")


def _runnable(stages: list[int]) -> list[int]:
    if stages not in ([1], [1, 6], [1, 2, 6], [1, 2, 3, 4, 5, 6]):
        raise ValueError("stages are [1], [1, 6], [1, 2, 6] or [1, 2, 3, 4, 5, 6]")
    return stages


Folder = Annotated[str, AfterValidator(expanduser)]
Stages = Annotated[list[int], AfterValidator(_runnable)]
Sigma = Annotated[float, Field(gt=0, le=100)]
SigmaRange = Annotated[tuple[Sigma, Sigma], AfterValidator(_refuse_disorder)]
ScaleRange = Annotated[tuple[Scale, Scale], AfterValidator(_refuse_disorder)]

ClassNames = Annotated[list[str], AfterValidator(_distinct)]
FileId = Annotated[int, Field(ge=0, le=65535)]
FileIds = Annotated[list[FileId], BeforeValidator(lambda x: x if isinstance(x, list) else [x])]
Band = Annotated[int, Field(ge=1)]
ValueRange = Annotated[tuple[float, float] | str | None, PlainValidator(_value_range)]
Pattern = Annotated[str, AfterValidator(_pattern)]
ClassWeights = Annotated[list[float] | str | None, PlainValidator(_class_weights)]
SplitName = Annotated[str, BeforeValidator(lambda x: str(x) if type(x) is int else x)]  # 92
ClassMap = dict[
    Annotated[int | str, PlainValidator(_file_id)],
    Annotated[int | str | None, PlainValidator(_class)],
]


class Section(BaseModel):
    """Settings that belong together; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetSection(Section):
    """The images. A list is in the root, or named by a whole path."""

    kind: str  # a name of dataset.catalog, or 'custom' with classes
    root: Folder  # folder that the lists' paths are relative to
    # A published list of dataset/published, such as 1_16, instead of labeled, unlabeled and val.
    split: SplitName | None = None
    labeled: str = "labeled.txt"  # image and mask a line
    # Image a line; a mask beside it is never opened. Or a folder or a glob below the root: its
    # pictures, without those of the other lists.
    unlabeled: str = "unlabeled.txt"
    val: str = "val.txt"  # image and mask a line
    test: str | None = None  # image and mask a line; scored once, when a run ends; null: none
    # Regular expression that finds an image's group in its name, as 'patient\d+_frame\d+' the
    # volume that a slice is of: scores are also reported by group, and votes are fitted on whole
    # groups left out; on whole patients with '(patient\d+)_frame\d+'. null: every image is a group.
    groups: Pattern | None = None
    # Names of a custom kind, by class id.
    classes: ClassNames | None = None
    # Id in mask files, or colour such as "#ff0000" (in quotes) or [255, 0, 0], to class name, class
    # id, or null for ignored; 'other' stands for all that neither class_map nor ignore names. A
    # file name is CVAT's labelmap.txt in the root. null: ids in files are class ids.
    class_map: ClassMap | None = None
    ignore: FileIds = [255]  # ids in mask files that count as ignored; not colours
    # Bands of a picture that are its red, green and blue, counted from 1, as [4, 3, 2] of a
    # satellite's TIFF. null: the picture's own colours, or grey.
    bands: tuple[Band, Band, Band] | None = None
    # Values of a picture that become black and white; or 'percentile', 0.5 and 99.5 of each
    # picture's. null: all that its bits can hold.
    range: ValueRange = None

    @field_validator("class_map", mode="before")
    @classmethod
    def _read_labelmap(cls, value: Any, info: ValidationInfo) -> Any:
        """Put the content of a file in its place, so that checkpoints need no file."""
        if isinstance(value, str):
            return read_labelmap(Path(info.data.get("root", ""), value))
        spelled = Counter[int | str]()
        for key in value if isinstance(value, dict) else ():
            with suppress(ValueError):  # which is said of that key
                spelled[_file_id(key)] += 1
        for key in (key for key, count in spelled.items() if count > 1):
            raise ValueError(f"{key} is given twice in different spellings; keep one")
        return value


class StrongSection(Section):
    """What the student sees of unlabeled images, on top of the weak augmentation."""

    # Largest change of brightness, contrast, saturation (shares) and hue (turns of the circle).
    jitter: tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] = (
        0.5,
        0.5,
        0.5,
        0.25,
    )
    jitter_chance: Share = 0.8
    grey_chance: Share = 0.2
    blur: SigmaRange = (0.1, 2.0)  # range of the Gaussian's sigma, pixels
    blur_chance: Share = 0.5


class AugmentSection(Section):
    """Weak augmentation: scale, random crop, mirror left and right with probability 0.5."""

    base_size: Pixels  # the long side at scale 1
    scale: ScaleRange = (0.5, 2.0)  # the long side is base_size times a number in here
    crop_size: int = Field(gt=0, le=8192)  # pixels, square: at 8192 an image has 0.8 GB of floats
    vertical: bool = False  # mirror up and down too, with probability 0.5
    quarter_turns: bool = False  # turn by 0, 90, 180 or 270 degrees, equally likely
    # Rotate by up to so many degrees either way; corners come from the image as far as it reaches.
    rotate: float = Field(0.0, ge=0, le=180)
    # Aim crops at classes whose chance is their share of the labeled pixels to the power 1 - aim:
    # 1 draws all classes equally often; 0 aims at nothing. Queried pairs of stage 1
    # (supervised.consistency) are not aimed.
    aim: float = Field(0.0, ge=0, le=1)
    strong: StrongSection = StrongSection()

    @model_validator(mode="after")
    def _sides_are_of_pictures(self) -> "AugmentSection":
        side = self.base_size * self.scale[1]
        if side > 65_500:
            raise ValueError(f"base_size times scale is up to {side:.0f} pixels, beyond 65500")
        return self


class ModelSection(Section):
    """The network, the same in every stage."""

    name: Literal["deeplabv3plus", "pspnet", "deeplabv2", "dpt"] = "deeplabv3plus"
    backbone: str = "resnet101"  # resnet18/34/50/101/152, xception65, or timm/<name>
    stem: Literal["plain", "deep"] = "plain"  # of ResNets: torchvision's 7 x 7, or UniMatch's
    output_stride: Literal[8, 16, 32] = 8
    # Of the decoder's maps; null: the network's own, 256 or 512.
    channels: int | None = Field(None, gt=0, le=8192)
    compile: bool = False  # torch.compile the training step: minutes at first, faster on some GPUs
    # Weights of the backbone: 'auto' (pretrained/README.md), a file, or null for random ones.
    pretrained: str | None = "auto"
    # Checkpoint of a whole network from which training stages start, instead of an encoder alone;
    # its classifier too if it has the same classes. null: none.
    init: str | None = None


class OptimizerSection(Section):
    """The optimizer, with a polynomial decay to zero over all iterations of a stage."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.001, gt=0)  # peak learning rate of the backbone
    head_multiple: float = Field(10.0, gt=0)  # learning rate of all other layers, as multiple of lr
    momentum: float = Field(0.9, ge=0, lt=1)  # of SGD; AdamW's betas are 0.9 and 0.999
    weight_decay: float = Field(1e-4, ge=0)  # of all parameters: L2 in SGD, decoupled in AdamW
    power: float = Field(0.9, gt=0)  # exponent of the decay (1 - iteration / iterations) ** power
    warmup: int = Field(0, ge=0)  # iterations in which the rate rises linearly to its peak
    layer_decay: float = Field(
        1.0, gt=0, le=1
    )  # factor on lr from a transformer block to the one below


class OhemSection(Section):
    """Learn from the hard pixels of labeled images only."""

    threshold: float = Field(0.7, gt=0, le=1)  # pixels predicted above this are easy and left out
    min_kept: int = Field(100_000, gt=0)  # pixels of a batch that are kept however easy


class LossSection(Section):
    """The loss of labeled and of pseudo-labeled images in training stages."""

    dice: float = Field(0.0, ge=0)  # weight of a soft Dice loss, added to the cross entropy
    # Weights of the classes in the cross entropy of true labels: one number for each; or
    # 'balanced', in inverse proportion to the classes' labeled pixels. They are scaled to a mean of
    # 1 over these pixels. null: all 1. Pseudo labels reflect the weights, their pixels count alike.
    class_weights: ClassWeights = None


class TrainingSection(Section):
    """What training stages share."""

    epochs: int = Field(80, gt=0)  # passes over the stage's list: labeled, or pseudo-labeled
    iterations: int | None = Field(None, gt=0)  # updates of the weights, in place of epochs
    batch_size: int = Field(32, gt=1)  # samples an iteration, over all processes
    # Parts of a batch that pass one after another, to save memory. Their gradients add up to those
    # of the batch; batch norm sees one part at a time, and ohem ranks the pixels of one.
    accumulate: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _parts_have_two(self) -> "TrainingSection":
        if self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not cut batch_size {self.batch_size} into "
                "parts of one size, two or more"
            )
        return self


class SupervisedSection(TrainingSection):
    """Stage 1. A batch holds pairs: twice batch_size images."""

    consistency: float = Field(0.0, ge=0)  # weight of the consistency loss; 0 is SupOnly
    repeat_below: int = Field(200, ge=0)  # a shorter labeled list counts twice an epoch
    # From 'model.pretrained' or 'model.init'. 'last': a finished run goes on when its labeled or
    # unlabeled list has changed. What it has made stays in rounds/1, and stage 1 starts from the
    # last network there (docs/labels.md).
    start: Literal["encoder", "last"] = "encoder"


class RetrainSection(TrainingSection):
    """Stages 4 and 6. A batch holds batch_size unlabeled and as many labeled images."""

    # The student begins with the weights of 'model.pretrained', or with those of its teacher.
    start: Literal["encoder", "teacher"] = "teacher"
    # Pseudo labels: stored by stages 2 and 5; or predicted in each iteration by the running average
    # of the student, which is then the network that is validated and kept. Pixels that a stored
    # label ignores stay ignored. Where votes help, stage 2 stores them, too, and they correct the
    # running average: 'threshold' is then of both together, and the stored labels are not read.
    labels: Literal["stored", "average"] = "stored"
    average_decay: float = Field(0.99, ge=0, lt=1)  # of the running average, an iteration
    # Pixels of pseudo labels whose probability is lower count with weight 0.
    threshold: float = Field(0.0, ge=0, lt=1)
    # Weight of the other pixels: 1, or (the paper) agreement with the CISC map of a partner.
    weight: Literal["ones", "cisc_map"] = "ones"
    # A random box of the student's unlabeled images: blanked (cutout), or from another unlabeled
    # image (CutMix).
    mix: Literal["none", "cutout", "unlabeled"] = "unlabeled"
    views: int = Field(1, gt=0, le=64)  # of each unlabeled image in strong colours
    # Share of channels left out of the features of the weak view, in one more pass; 0: no pass.
    feature_dropout: float = Field(0.0, ge=0, lt=1)
    learn_partners: bool = False  # add the cross entropy of the partners, queried labeled images
    teacher_view: Literal["weak", "strong"] = "weak"  # strong reproduces the published code


class PseudoLabelSection(Section):
    """Stages 2 and 5: test-time augmentation, and votes of the nearest labeled patches."""

    scales: Scales = [0.5, 0.75, 1.0, 1.5, 2.0]
    flip: bool = True
    # Combine the teacher's probabilities with the votes of the nearest labeled patches in the
    # features of the encoder as it was before training, as far as they help on labeled images that
    # neither has seen: two teachers more are trained for that, each a quarter of stage 1's length.
    neighbours: bool = True
    # Factors by which images are enlarged before their patches are compared: the smallest one that
    # helps as much as any is taken, the first one where there are too few images to leave some out.
    neighbour_scales: Scales = [1.0, 2.0, 3.0]
    # Encoders, as model.backbone names them, in whose features patches are compared: the mean of
    # what they tell counts. null: the student's own.
    voters: list[str] | None = Field(None, min_length=1)
    # Probabilities are divided by the class's prior to this power: more labels of rare classes, and
    # more wrong ones. 0: as they are. Nothing changes with balanced class weights, whose prior is
    # the same for all classes.
    adjustment: float = Field(0.0, ge=0, le=1)
    threshold: float = Field(0.6, ge=0, lt=1)  # less probable pixels are stored as ignored


class QuerySection(Section):
    """Which classes can be queried: one criterion for the index and for crops."""

    min_area: float = Field(0.03, gt=0, lt=1)  # share of the valid pixels
    exclude: list[str] = []  # class names that never count


class SelectSection(Section):
    """Stage 3."""

    keep: float = Field(0.5, gt=0, le=1)  # share called reliable, rounded up
    # Agreement with the class anchors, summed or averaged over an image's classes (sum favours few
    # classes); or agreement of predictions after 1/3 and 2/3 of stage 1 with the pseudo label.
    score: Literal["sum", "mean", "stability"] = "sum"


class WindowSection(Section):
    """Sliding windows over images that are larger than one."""

    size: int = Field(ge=32, le=65_500)  # pixels, square; smaller windows are too many
    step: float = Field(2 / 3, ge=0.05, le=1)  # from one window to the next, share of the size
    weighting: Literal["uniform", "gaussian"] = "uniform"  # of a window's pixels in the average
    batch_size: int = Field(4, gt=0)  # windows that pass the network at once


class InferenceSection(Section):
    """How whole images pass a network: validation, labeling, selection, eval.py."""

    long_side: Pixels | None = None  # larger images are shrunk; null: own size
    window: WindowSection | None = None  # null: whole images; selection always sees them whole
    batch_size: int = Field(4, gt=0)  # images of one size that pass the network at once
    scales: Scales = [1.0]  # of validation and eval.py
    flip: bool = False  # of validation and eval.py
    # Several views are averaged at this share of the answer's height and width. 1 is exact; at half
    # of it 99.9 % of pixels keep their class (tests/benchmarks/views.py).
    average_at: float = Field(0.5, ge=0.01, le=1)


class EvaluateSection(Section):
    """Validation during training. The last epoch of a stage is always validated."""

    every: int = Field(1, gt=0)  # epochs
    checkpoint: Literal["last", "best"] = "last"  # 'best' picks by val: its mIoU is optimistic
    # A training stage ends after so many validations without a better mIoU than before. Val then
    # picks its length: mIoU is optimistic. The learning rate falls as in the whole stage. null:
    # never.
    patience: int | None = Field(None, gt=0)

    def ends(self, epochs: int) -> bool:
        """Tell whether patience ends a stage so many epochs after its best mIoU."""
        return self.patience is not None and epochs >= self.patience * self.every


class PanelsSection(Section):
    """Pictures of stages 4 and 6 in ``panels/``: what a method makes of unlabeled images."""

    images: int = Field(4, ge=0)  # unlabeled images, the same every time; 0: no pictures
    every: int = Field(10, gt=0)  # epochs; the last epoch of a stage is always drawn
    # List of unlabeled images with true masks, which show where pseudo labels are wrong; they are
    # drawn and not used otherwise. null: there is none.
    truth: str | None = None


class Config(Section):
    """One run of the six stages."""

    # An overlay of configs/methods: cisc (the paper), cisc_patch (ours), and what they are compared
    # with. It sets the keys that the config and the command line leave out.
    method: str = "cisc"
    name: str = Field(pattern=r"^\w[\w.+-]*$")  # run folder: <outdir>/<name>
    outdir: Folder = "outdir"
    seed: int = Field(0, ge=0)  # of all random numbers: weights, order, augmentation, dropout
    device: Annotated[str, PlainValidator(_device)] = (
        "auto"  # auto (the first accelerator, else the CPU), cpu, cuda, cuda:1, mps
    )
    # Arithmetic of convolutions and matrix products; auto: see docs/devices.md.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # On CUDA the same command gives the same bits. false: cuDNN may take faster convolutions whose
    # sums come in any order.
    deterministic: bool = True
    workers: int = Field(4, ge=0, le=128)  # processes that read images; each holds 0.3 GB
    # 'ram': a training stage decodes its images once and keeps them in memory, 4 bytes a pixel.
    cache: Literal["ram"] | None = None
    # Which stages run: [1]; [1, 2, 6] is self-training on all images; [1, 6] needs labels: average.
    stages: Stages = [1, 2, 3, 4, 5, 6]
    tensorboard: bool = True  # curves and pictures in <outdir>/<name>/tensorboard
    wandb: str | None = None  # the same in a project of Weights & Biases (pip install wandb)
    checkpoint_every: int | None = Field(None, gt=0)  # iterations; null: only whole epochs are kept
    dataset: DatasetSection
    augment: AugmentSection
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossSection = LossSection()
    ohem: OhemSection | None = None  # null: plain cross entropy
    supervised: SupervisedSection = SupervisedSection()
    pseudo_label: PseudoLabelSection = PseudoLabelSection()
    query: QuerySection = QuerySection()
    select: SelectSection = SelectSection()
    retrain: RetrainSection = RetrainSection()
    inference: InferenceSection = InferenceSection()
    evaluate: EvaluateSection = EvaluateSection()
    panels: PanelsSection = PanelsSection()

    @model_validator(mode="after")
    def _labels_have_a_source(self) -> "Config":
        if 2 not in self.stages and 6 in self.stages and self.retrain.labels == "stored":
            raise ValueError("stages without 2 store no pseudo labels; set retrain.labels=average")
        if self.ohem is not None and self.loss.class_weights is not None:
            raise ValueError(
                "ohem and loss.class_weights do not go together; set one of them to null"
            )
        if self.augment.aim and self.pairs_share_classes and self.stages == [1]:
            raise ValueError(
                "augment.aim leaves queried pairs as they are; set supervised.consistency=0"
            )
        if self.evaluate.patience and 3 in self.stages and self.select.score == "stability":
            raise ValueError(
                "select.score=stability compares networks after 1/3 and 2/3 of stage 1, which "
                "evaluate.patience may end earlier; set evaluate.patience=null, or select.score=sum"
            )
        if 2 not in self.stages and self.retrain.learn_partners:
            raise ValueError(
                "retrain.learn_partners queries by stored pseudo labels, which stages without 2 "
                "do not have"
            )
        if self.retrain.labels == "average" and self.retrain.weight == "cisc_map":
            raise ValueError(
                "retrain.weight=cisc_map queries by stored pseudo labels; with "
                "retrain.labels=average set retrain.weight=ones"
            )
        return self

    @property
    def pairs_share_classes(self) -> bool:
        """Whether the second image of a pair of stage 1 is queried to share a class."""
        return self.supervised.consistency > 0

    @property
    def retraining_queries(self) -> bool:
        """Whether retraining draws a labeled partner for each unlabeled image."""
        return self.retrain.weight == "cisc_map" or self.retrain.learn_partners
