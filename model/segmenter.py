"""A trained network as a function of images, with its classes; read from files and written to them.

net = Segmenter.load("outdir/demo/6_retrain/checkpoint.pth")
mask, confidence = net("photo.jpg")
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dataset.catalog import dataset_info
from dataset.reading import Pixels, normalise, read_image, to_input, upright
from model.networks import network_of
from utils import checkpoint
from utils.config.reading import config_from, read_config
from utils.config.schema import Config
from utils.device import Device
from utils.errors import UserError
from utils.evaluation import Average, Predictor
from utils.hub import find_checkpoint, upload
from utils.panels import in_colour, overlay
from utils.run.comparison import portable
from utils.run.folder import run_of

Colour = tuple[int, int, int]  # red, green, blue in 0-255


class Segmenter:
    """Segments images by a network: class ids and their probabilities.

    Args:
        net: is moved to the device and put into eval mode.
        config: what the network was trained with; ``inference``, ``device`` and ``precision`` count
            here.
        origin: what else its checkpoint says, such as the stage; is kept by ``save``.
        colours: by class id; None: those of the data set.

    Attributes:
        net: the network that was given; predictions are its own, no copy is made.
        config, origin: the same.
        classes: names by class id.
        colours: by class id.
        pixels: how the values of pictures become red, green and blue.
        palette: 768 bytes, the colours for PNGs of mode P; 255 is white.
        device: where the network runs, and in which precision.
        preprocessing: how the network wants its images.
        predict: gives (B, C, H, W) class probabilities of (B, 3, h, w) normalised images and a
            size (H, W), as in validation.

    Raises:
        UserError: the device does not exist; or colours that are none, or not one a class.
    """

    def __init__(
        self,
        net: nn.Module,
        config: Config,
        origin: Mapping[str, Any] | None = None,
        colours: Sequence[Colour] | None = None,
    ) -> None:
        kind = dataset_info(config.dataset)
        if colours is not None:
            kind = kind._replace(colours=_colours(colours, len(kind.classes)))
        self.pixels = kind.pixels
        self.classes, self.colours, self.palette = kind.classes, kind.colours, kind.palette()
        self.device = Device(config.device, config.precision)
        self.net, self.preprocessing = self.device.place(net).eval(), net.preprocessing
        self.config, self.origin = config, dict(origin or {})
        self.predict = Predictor(self.net, self.device, config.inference)

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[str | Path],
        settings: Sequence[str] = (),
        *,
        config: str | None = None,
        classes: Sequence[str] | None = None,
        colours: Sequence[Colour] | None = None,
        reset_classifier: bool = False,
        **keys: Any,
    ) -> "Segmenter":
        """Load a network with what it was trained with.

        Args:
            source: a checkpoint, .pth or .safetensors; a folder of ``config.json`` and
                ``model.safetensors``; or ``hf:owner/name``, such a repository on the Hugging Face
                hub. Nothing else is looked for there. A list of them is averaged, as by
                ``ensemble``.
            settings: as on the command line, ``section.key=value``.
            config: a YAML file, instead of the config that the checkpoint holds; those of ST++,
                CISC-R and UniMatch hold none.
            classes: names by class id; None: those of the data set that the config names.
            colours: (red, green, blue) by class id; None: the data set's.
            reset_classifier: leave the classifier initialised at random, and the file's out.
            **keys: ``device`` and ``precision``, as in a config; and keys of its section
                ``inference``, such as ``scales=[0.75, 1.0]``, ``flip=True``,
                ``window={"size": 512}``, ``long_side=1024``.

        Raises:
            UserError: no such checkpoint, no config, an unknown setting, or weights of another
                network.
        """
        if isinstance(source, list | tuple) and source:
            same = {"config": config, "classes": classes, "colours": colours}
            same |= {"reset_classifier": reset_classifier, **keys}
            return cls.ensemble([cls.load(one, settings, **same) for one in source])
        if not isinstance(source, str | Path):
            raise UserError(f"source: a {type(source).__name__}; give the path of a checkpoint")
        path = find_checkpoint(source)
        content = checkpoint.load(path)
        weights = checkpoint.weights_in(content, path)
        checkpoint.refuse_smp(weights, path)
        words = [*settings, *_settings_of(classes, keys)]
        if config is not None:
            found = read_config(config, words)
        elif isinstance(content.get("config"), dict):
            found = config_from(_of_run_folder(content["config"], path), str(path), words)
        else:
            raise UserError(
                f"{path}: holds no config; name one with --config, or config= in Python"
            )
        net = network_of(found.model, len(dataset_info(found.dataset).classes), pretrained=None)
        checkpoint.put_weights(net, weights, path, reset_classifier)
        origin = {key: content[key] for key in ("stage", "epoch") if key in content}
        return cls(net, found, origin, colours)

    @classmethod
    def ensemble(cls, nets: Sequence["Segmenter"]) -> "Segmenter":
        """Average the probabilities of several networks of one task.

        Args:
            nets: of the same classes and preprocessing; config, colours and device are the first's.

        Raises:
            UserError: none are given, or no networks; classes or preprocessing differ.
        """
        if not nets or not all(isinstance(net, Segmenter) for net in nets):
            raise UserError("ensemble: give a list of networks, as Segmenter.load returns them")
        first, *others = nets
        for other in others:
            if (other.classes, other.preprocessing) != (first.classes, first.preprocessing):
                raise UserError(
                    "ensemble: the networks have other classes, or other encoders that want "
                    "other images; average networks of one task and one encoder"
                )
        joined = cls(first.net, first.config, first.origin, first.colours)
        joined.predict = Average([net.predict for net in nets])
        return joined

    def __call__(
        self, image: str | Path | Image.Image | np.ndarray | Tensor
    ) -> tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
        """Segment an image, or a batch of images of one size.

        Args:
            image: a file; a picture of any mode, turned upright by its EXIF orientation; an array
                (H, W, 3) or (H, W) of uint8; or a tensor (B, 3, H, W) or (3, H, W), on any device,
                of uint8 in 0-255 or floats in [0, 1]. RGB, not normalised.

        Returns:
            Class ids and their probabilities in [0, 1], of the image's size: (H, W) arrays of uint8
            and float32, tensors (B, H, W) on the network's device if a batch is given, (H, W) if a
            tensor without a first dimension.

        Raises:
            UserError: the file is no picture, or the array is none of these.
        """
        if isinstance(image, Tensor):
            images = normalise(_pixels(image), self.preprocessing)
            ids, confidence = self.segment(images if image.dim() == 4 else images.unsqueeze(0))
            return (ids, confidence) if image.dim() == 4 else (ids[0], confidence[0])
        picture = to_input(_picture(image, self.pixels), self.preprocessing)
        ids, confidence = self.segment(picture.unsqueeze(0))
        return ids[0].cpu().numpy(), confidence[0].cpu().numpy()

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and probabilities, (B, H, W), of normalised images, (B, 3, H, W).

        Raises:
            UserError: the network is in training mode, which would change its running statistics.
        """
        if self.net.training:
            raise UserError("net: is in training mode; call net.eval() of the network first")
        probabilities = self.predict(images, tuple(images.shape[-2:]))
        # The first of equal probabilities, as in validation.
        return probabilities.argmax(dim=1).byte(), probabilities.amax(dim=1)

    def picture(self, mask: np.ndarray | Tensor) -> Image.Image:
        """Return (H, W) class ids as a picture of mode P in the colours of the classes.

        Raises:
            UserError: the mask holds no whole numbers, or ids outside 0 to 255.
        """
        return in_colour(_ids(mask), self.palette)

    def overlay(
        self, image: str | Path | Image.Image | np.ndarray, mask: np.ndarray | Tensor
    ) -> Image.Image:
        """Return a picture, given as to the network, under its half-transparent classes.

        Raises:
            UserError: as for a call and as ``picture``; or the mask has another size.
        """
        picture = _picture(image, self.pixels)
        return overlay(picture, _ids(mask, picture.size[::-1]), self.palette)

    def save(self, path: str | Path) -> None:
        """Write weights and config where ``load`` finds them.

        Args:
            path: a .pth or .safetensors file; or a folder, a path without a suffix, which gets
                ``config.json`` and ``model.safetensors`` as on the Hugging Face hub.

        Raises:
            UserError: another suffix, a file of a run, or the place cannot be written to.
        """
        path = Path(path)
        if (run := run_of(Path(os.path.realpath(path)))) is not None:
            raise UserError(f"{path}: is of the run in {run}; name another place")
        if isinstance(self.predict, Average):
            raise UserError(f"{path}: an ensemble is several networks; save each of them")
        if path.suffix not in checkpoint.SUFFIXES:
            raise UserError(
                f"{path}: name a .pth or .safetensors file, or a folder without a suffix"
            )
        content = {"model": self.net.state_dict(), "preprocessing": self.preprocessing._asdict()}
        checkpoint.save(path, {**content, "config": portable(self.config), **self.origin})

    def push(self, repository: str, private: bool = False) -> str:
        """Upload the network to the Hugging Face hub; its token must be known (``hf auth login``).

        Args:
            repository: ``owner/name``; is made if it does not exist.
            private: whether a new one is.

        Returns:
            The address of the commit.

        Raises:
            UserError: the hub cannot be reached, or refuses.
        """
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / "net")
            return upload(Path(folder) / "net", repository, private)


def _of_run_folder(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add what a checkpoint does not hold, from its run folder: name, workers, data root."""
    added, root = {"name": "checkpoint"}, "unknown"  # no folder: an error tells to set dataset.root
    with suppress(UserError):  # no such file, or another program's
        run = read_config(str(path.absolute().parent.parent / "config.yaml"))
        added, root = {"name": run.name, "workers": run.workers}, run.dataset.root
    dataset = settings.get("dataset")
    dataset = {"root": root, **dataset} if isinstance(dataset, dict) else dataset
    return {**added, **settings, "dataset": dataset}


def _picture(image: str | Path | Image.Image | np.ndarray, pixels: Pixels) -> Image.Image:
    if isinstance(image, str | Path):
        return read_image(Path(image), pixels)
    if isinstance(image, np.ndarray):
        shape = image.shape
        if image.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
            raise UserError(
                f"image: an array of {image.dtype}, {shape}; give uint8, (height, width, 3)"
            )
        image = Image.fromarray(image) if image.size else Image.new("RGB", (0, 0))
    if not isinstance(image, Image.Image):
        raise UserError(
            f"image: a {type(image).__name__}; give a file's path, a PIL picture, an array or a "
            "tensor"
        )
    if 0 in image.size:
        raise UserError("image: has no pixels; give at least one")
    try:
        return upright(image, "image", pixels)
    except UserError:
        raise
    except Exception as error:  # of Pillow's modes and decoders
        raise UserError(
            f"image: cannot read this picture of mode {image.mode} ({error}); convert it to RGB"
        ) from error


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _pixels(images: Tensor) -> Tensor:
    if images.layout != torch.strided or images.is_meta or images.is_nested:
        raise UserError("image: a sparse, nested or meta tensor; give a dense one")
    shape, kind = tuple(images.shape), images.dtype
    if images.dim() not in (3, 4) or shape[-3] != 3 or not images.numel():
        raise UserError(f"image: a tensor of {shape}; give (images, 3, height, width)")
    if kind == torch.uint8:
        return images
    if kind not in _FLOATS or not 0 <= images.min() <= images.max() <= 1:
        raise UserError(f"image: a tensor of {kind}; give uint8, or floats from 0 to 1")
    return images


def _ids(mask: np.ndarray | Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return class ids as (H, W) uint8, of a (height, width) if one is given."""
    if isinstance(mask, Tensor) and mask.layout == torch.strided and not mask.is_meta:
        mask = mask.detach().cpu().numpy()
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "iu":
        what = f"{mask.dtype}, {tuple(mask.shape)}" if hasattr(mask, "shape") else type(mask)
        raise UserError(f"mask: {what}; give an array or tensor of whole numbers, (height, width)")
    if not mask.size or mask.min() < 0 or mask.max() > 255:
        raise UserError("mask: class ids go from 0 to 254, and 255 is ignored; correct the mask")
    if size is not None and mask.shape != size:
        raise UserError(f"mask: is {mask.shape} and its image {size} (height, width); resize one")
    return mask.astype(np.uint8)


def _colours(colours: Sequence[Colour], count: int) -> tuple[Colour, ...]:
    """Check colours, one a class."""
    if len(colours) != count:
        raise UserError(f"colours: {len(colours)} for {count} classes; give each one")
    try:
        made = tuple(tuple(operator.index(part) for part in colour) for colour in colours)
    except TypeError:
        made = ((),)
    if any(len(each) != 3 or not 0 <= min(each) <= max(each) <= 255 for each in made):
        raise UserError("colours: give (red, green, blue) from 0 to 255 for each class")
    return made


def _settings_of(classes: Sequence[str] | None, keys: Mapping[str, Any]) -> list[str]:
    """Write what ``Segmenter.load`` is told as settings of the command line.

    Raises:
        UserError: classes are no list of names; a value is no setting.
    """
    words = []
    if classes is not None:
        names = [classes] if isinstance(classes, str) else list(classes)
        if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
            raise UserError(f"classes: {classes!r} is not a list of names, one a class")
        words += ["dataset.kind=custom", f"dataset.classes={json.dumps(names)}"]
    for key, value in keys.items():
        whole = key if key in ("device", "precision") else f"inference.{key}"
        words.append(f"{whole}={_as_json(key, value)}")
    return words


def _as_json(key: str, value: Any) -> str:
    """Write a setting as JSON; numbers and lists of numpy's and torch's, too."""
    try:
        return json.dumps(value, default=lambda x: x.tolist())
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{key}: {value!r} is not a setting; give numbers, text, lists") from error
