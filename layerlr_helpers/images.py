"""Images in memory with their labels, and reading them from a folder.

An :class:`ImageSet` holds all its images in memory, so that an epoch costs no file access.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize, pil_to_tensor

from layerlr_helpers.folders import FileKind, check_labels, read_class_folders

# ImageNet's channel statistics: the built-in data use them too, so one network input convention serves all weights.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset):
    """Images in memory with their labels.

    Attributes:
        images: uint8 [N, 3, H, W].
        labels: int64 [N].
        class_names: the name of each label.
        factors: what is known about each image beside its label, each a tensor whose first dimension is N.

    Indexing gives ``(float image [3, H, W], normalised with ImageNet's mean and standard deviation, int label)``. Images of
    another form, and labels that do not fit the images or the classes, are a ValueError.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    factors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images are uint8 [N, 3, H, W], from 0 to 255, not {self.images.dtype} {list(self.images.shape)}")
        check_labels(self.labels, len(self.images), self.class_names, "image")

    def __repr__(self) -> str:
        height, width = self.images.shape[-2:]
        return f"ImageSet({len(self)} images of {height}x{width} pixels, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalise(self.images[index]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """A whole batch at once, which is how ``DataLoader`` asks when it can."""
        rows = torch.as_tensor(indices)
        return list(zip(normalise(self.images[rows]), self.labels[rows].tolist(), strict=True))

    def subset(self, indices: Sequence[int] | Tensor) -> "ImageSet":
        """The images at ``indices`` (numbers, or a boolean mask), as another ImageSet."""
        rows = torch.as_tensor(indices)
        rows = rows if rows.dtype == torch.bool else rows.long()  # an empty list makes a tensor of floats
        factors = {name: values[rows] for name, values in self.factors.items()}
        return replace(self, images=self.images[rows], labels=self.labels[rows], factors=factors)


def normalise(images: Tensor) -> Tensor:
    """uint8 images [..., 3, H, W] to floats with ImageNet's channel mean 0 and standard deviation 1."""
    return normalize(images.float() / 255, MEAN, STD, inplace=True)


def _is_image(file: Path) -> bool:
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


IMAGES = FileKind("image", _is_image, ".jpg, .png, .webp, …", "save them as .jpg or .png")


def image_folder(path: str | Path, *, image_size: int = 128, unreadable: str = "raise") -> ImageSet:
    """Read a folder of images, one subfolder per class, resized and cropped to ``image_size`` squares.

    Everything is read at once (a thousand images of 128 pixels take 50 MB), so a bad file is found now and not in
    the middle of an epoch. ``unreadable`` says what to do with one: ``"raise"``, or ``"skip"`` with a warning.
    Photographs are turned upright, transparent images laid on white, hidden files and folders left out. Files that do not
    end like an image that Pillow reads (.heic, .mp4) are left out too; a warning counts them, but for texts and tables.
    Pixels of 16 bits are scaled to 8, and so are floats of 0 to 1. Links to files and folders are followed; one that leads
    nowhere, or back to a folder that it is in, counts as unreadable.
    ``factors["file"]`` is each image's place in the list of all files, sorted by class and name.
    A ValueError says what is wrong with a folder: no classes, splits (train, val, …) in their place, a class without images,
    a class that is a link to nothing, a class's name that is not UTF-8 and so could not be written down.
    """
    check_image_size(image_size)
    images, labels, places, names = read_class_folders(path, lambda file: _read_image(file, image_size), IMAGES, unreadable)
    return ImageSet(torch.stack(images), torch.tensor(labels), names, {"file": torch.tensor(places)})


def check_image_size(image_size: int) -> None:
    """Raise a ValueError for images smaller than 16 pixels, which leave nothing to see."""
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, not {image_size}")


def _read_image(file: Path, size: int) -> Tensor:
    with Image.open(file) as image:
        image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG be decoded at a fraction of its size
        upright = _rgb(ImageOps.exif_transpose(image))
    return pil_to_tensor(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats, which Pillow would clip to black and white
        return Image.fromarray(_eight_bits(np.asarray(image), always_sixteen="16" in image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray, *, always_sixteen: bool) -> np.ndarray:
    """Convert grey values to uint8: floats of 0 to 1, or integers of 8 or 16 bits; of others nobody knows what is white."""
    low, high, floats = pixels.min(), pixels.max(), pixels.dtype.kind == "f"
    white = 1 if floats else 65535
    if not 0 <= low <= high <= white:  # also true of NaN
        raise ValueError(f"its pixels go from {low} to {high}; {'floats' if floats else 'integers'} are read from 0 for black "
                         f"to {white} for white, so scale them to that, or save it with 8 bits a pixel")
    if floats:
        return (255 * pixels).round().astype(np.uint8)
    # Some versions of Pillow open a PNG of 16 bits as integers of 32, in which values of 8 bits may lie as well.
    return (pixels // 256 if always_sixteen or high > 255 else pixels).astype(np.uint8)
