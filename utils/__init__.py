"""What a training run needs around the method: config, run folder, devices, evaluation."""

from typing import NamedTuple

IGNORE = 255  # the label of pixels that are excluded everywhere: void and padding


class Preprocessing(NamedTuple):
    """How an encoder wants its images: part of the network, applied by the data sets.

    Attributes:
        mean: of each channel (red, green, blue), for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
        interpolation: 'bilinear' or 'bicubic', how images are resized.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __str__(self) -> str:
        """Describe it in a line of the log."""
        mean, std = (" ".join(f"{x:.3g}" for x in numbers) for numbers in self[:2])
        return f"mean {mean}, std {std}, {self.interpolation}"


IMAGENET = Preprocessing()  # torchvision's ResNets, and what the literature trains with
