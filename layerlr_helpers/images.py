"""Images in memory with their labels: read from a folder, split into training, validation and test images.

An :class:`ImageSet` holds all its images in memory, so that an epoch costs no file access.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize, pil_to_tensor

from layerlr_helpers.files import is_utf8, shown

# ImageNet's channel statistics: the built-in data use them too, so one network input convention serves all weights.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# Endings, and names without one, of files that often lie beside images: they are left out without a warning.
NOTES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm", ".ini", ".log",
         ".pdf", ".db", ".py", ".ipynb",
         "license", "licence", "readme", "notice", "copying", "authors", "citation", "changelog", "source"}


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset):
    """Images in memory with their labels.

    Attributes:
        images: uint8 [N, 3, H, W].
        labels: int64 [N].
        class_names: the name of each label.
        factors: what is known about each image beside its label, each a tensor whose first dimension is N.

    Indexing gives ``(float image [3, H, W], normalised with ImageNet's mean and standard deviation, int label)``.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    factors: dict[str, Tensor] = field(default_factory=dict)

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


def few_shot_split(data: ImageSet, per_class: int = 10, *, val_per_class: int = 20,
                   seed: int = 0) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Split into ``per_class`` training images of each class, ``val_per_class`` for validation, the rest for testing.

    Choose learning rates on the validation part; the test part is for the one final number. The validation images are
    the same for every ``seed``, which draws the training images: so none of them is a test image of another seed.
    A ValueError names a class that has too few images to leave at least one for testing.
    """
    if per_class < 1 or val_per_class < 0:
        raise ValueError(f"per_class is 1 or above and val_per_class 0 or above, not {per_class} and {val_per_class}")
    return _split_by_class(data, lambda images: (per_class, val_per_class), seed, ("training", "validation", "testing"))


def fraction_split(data: ImageSet, val_fraction: float, test_fraction: float, seed: int) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Split into training, validation and test images by fractions of each class, at least one image each.

    The test images are the same for every ``seed``, so that rates which were chosen on the validation images of one seed can
    be tested on another. A ValueError names a class that is too small for all three.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError("the fractions for validation and testing must be above 0 and below 1 together, not "
                         f"{val_fraction} and {test_fraction}")
    val, test, train = _split_by_class(
        data, lambda images: (max(round(val_fraction * images), 1), max(round(test_fraction * images), 1)), seed,
        ("validation", "testing", "training"))
    return train, val, test


def _split_by_class(data: ImageSet, sizes: Callable[[int], tuple[int, int]], seed: int,
                    purposes: tuple[str, str, str]) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Split every class into images drawn by ``seed``, images that are the same for every seed, and the rest.

    ``sizes(number of images)`` says how many the first two parts get; ``purposes`` says what the three parts are for.
    """
    always_same, by_seed = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    rows_by_class = []
    for label, name in enumerate(data.class_names):
        rows = torch.nonzero(data.labels == label).flatten()
        drawn_size, fixed_size = sizes(len(rows))
        if drawn_size + fixed_size >= len(rows):
            raise ValueError(f"class {name!r} has {len(rows)} image(s), too few for {drawn_size} for {purposes[0]}, "
                             f"{fixed_size} for {purposes[1]} and one for {purposes[2]}; add images, or leave the class out")
        fixed, others = rows[torch.randperm(len(rows), generator=always_same)].tensor_split((fixed_size,))
        drawn, rest = others[torch.randperm(len(others), generator=by_seed)].tensor_split((drawn_size,))
        rows_by_class.append((drawn, fixed, rest))
    return tuple(data.subset(torch.cat(rows)) for rows in zip(*rows_by_class, strict=True))


def image_folder(path: str | Path, *, image_size: int = 128, unreadable: str = "raise") -> ImageSet:
    """Read a folder of images, one subfolder a class, resized and cropped to ``image_size`` squares.

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
    if unreadable not in ("raise", "skip"):
        raise ValueError(f"unreadable must be 'raise' or 'skip', not {unreadable!r}")
    check_image_size(image_size)
    path = Path(path).expanduser()
    folders = _class_folders(path)
    images, labels, places, errors = [], [], [], {}
    for place, (label, file, problem) in enumerate(_image_files(path, folders)):
        try:
            if problem:
                raise OSError(problem)
            images.append(_read_image(file, image_size))
            labels.append(label)
            places.append(place)
        except Exception as error:  # Pillow raises a different error for each way of being damaged
            errors[file] = error
    if errors and unreadable == "raise":
        file, error = next(iter(errors.items()))
        raise ValueError(f"{len(errors)} unreadable file(s), the first is {shown(file)} ({error}); mend it, or pass "
                         "unreadable='skip' (on the command line --skip-unreadable)") from error
    if errors:
        warnings.warn(f"skipped {len(errors)} unreadable file(s): {', '.join(map(shown, errors))}", stacklevel=2)
    if empty := [folder.name for label, folder in enumerate(folders) if label not in set(labels)]:
        raise ValueError(f"class folder(s) {empty} of {shown(path)} contain no image that can be read (.jpg, .png, .webp, …)")
    return ImageSet(torch.stack(images), torch.tensor(labels), tuple(folder.name for folder in folders),
                    {"file": torch.tensor(places)})


def check_image_size(image_size: int) -> None:
    """Raise a ValueError for images smaller than 16 pixels, which leave nothing to see."""
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, not {image_size}")


def _class_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {shown(path)}")
    folders = _subfolders(path)
    if folders and all(folder.name.lower() in SPLITS for folder in folders) and any(map(_subfolders, folders)):
        example = next((folder for folder in folders if folder.name.lower().startswith("train")), folders[0])
        raise ValueError(f"the folders {', '.join(folder.name for folder in folders)} in {shown(path)} are parts of the data "
                         f"and no classes; pass one whose subfolders are the classes, e.g. {shown(example)}")
    for entry in _not_hidden(path):
        if (problem := _link_problem(entry, [path.resolve()])) and not (_is_image(entry) or _is_note(entry)):
            raise ValueError(f"the class {shown(entry)} cannot be read: {problem}; mend the link or remove it")
    if not folders:
        raise ValueError(f"{shown(path)} has no subfolders; put the images of each class into a subfolder of its own")
    if bad := [str(os.fsencode(folder.name)) for folder in folders if not is_utf8(folder.name)]:
        raise ValueError(f"the names of the class folders {', '.join(bad)} in {shown(path)} are not UTF-8, so that no report "
                         "could name these classes; rename them")
    return folders


def _image_files(path: Path, folders: Sequence[Path]) -> list[tuple[int, Path, str | None]]:
    """``(label, file, problem)`` of all images in the class folders, sorted; warns of other files.

    The problem is why a link cannot be followed. Nobody knows whether it led to images, so it is among them.
    """
    files = [(label, file, problem) for label, folder in enumerate(folders)
             for file, problem in sorted(_walk(folder, [path.resolve()])) if not _is_note(file)]
    others = Counter(file.suffix.lower() or "without an ending" for _, file, problem in files
                     if not (problem or _is_image(file)))
    if others:
        warnings.warn(f"left out {others.total()} file(s) that do not end like an image that can be read here ("
                      f"{', '.join(f'{n} {ending}' for ending, n in others.most_common())}); if they are images, save them as "
                      ".jpg or .png", stacklevel=3)
    return [(label, file, problem) for label, file, problem in files if problem or _is_image(file)]


def _walk(folder: Path, above: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """``(file, None)`` of each file below a folder, links followed, and ``(link, problem)`` of those that cannot be followed.

    ``above`` are the true places of the folders through which this one was reached.
    """
    above = [*above, folder.resolve()]
    for entry in _not_hidden(folder):
        problem = _link_problem(entry, above)
        if entry.is_dir() and not problem:
            yield from _walk(entry, above)
        elif entry.is_file() or problem:
            yield entry, problem


def _link_problem(entry: Path, above: Sequence[Path]) -> str | None:
    """Why a link cannot be followed; None if it can, or is no link."""
    if not entry.is_symlink():
        return None
    if not entry.exists():
        return f"it is a link to {shown(os.readlink(entry))}, which is not there"
    if any(place.is_relative_to(entry.resolve()) for place in above):
        return f"it is a link to {shown(os.readlink(entry))}, a folder that it is in itself"
    return None


def _not_hidden(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files such as macOS's ._a.jpg and Jupyter's copies."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _subfolders(path: Path) -> list[Path]:
    return [entry for entry in _not_hidden(path) if entry.is_dir()]


def _is_image(file: Path) -> bool:
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


def _is_note(file: Path) -> bool:
    return (file.suffix or file.name).lower() in NOTES


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
