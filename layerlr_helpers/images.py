"""Data that is here at once: printed glyphs to pretrain on, real handwriting to fine-tune on, a learner's own folder.

Every function returns an :class:`ImageSet`: all images in memory, so that an epoch costs no file access.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

# ImageNet's channel statistics: the built-in data use them too, so one network input convention serves all weights.
MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# What lies beside images and is none, so that nobody misses it.
NOTES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm", ".ini", ".log",
         ".pdf", ".db", ".py", ".ipynb"}
NOTES_WITHOUT_ENDING = {"license", "licence", "readme", "notice", "copying", "authors", "citation", "changelog", "source"}


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
    mean, std = MEAN.to(images.device), STD.to(images.device)
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


def denormalise(images: Tensor) -> Tensor:
    """The inverse of :func:`normalise`, as floats in 0..1, for showing."""
    mean, std = MEAN.to(images.device), STD.to(images.device)
    return (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


def few_shot_split(data: ImageSet, per_class: int = 10, *, val_per_class: int = 20,
                   seed: int = 0) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Split into ``per_class`` training images of each class, ``val_per_class`` for validation, the rest for testing.

    Choose learning rates on the validation part; the test part is for the one final number. The validation images are
    the same for every ``seed``, which draws the training images: so none of them is a test image of another seed.

    Raises:
        ValueError: a class has too few images to leave at least one for testing (says which), ``per_class`` below 1 or
            ``val_per_class`` below 0.
    """
    if per_class < 1 or val_per_class < 0:
        raise ValueError(f"per_class is 1 or above and val_per_class 0 or above, not {per_class} and {val_per_class}")
    always, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label, name in enumerate(data.class_names):
        rows = torch.nonzero(data.labels == label).flatten()
        if len(rows) <= per_class + val_per_class:
            raise ValueError(f"class {name!r} has {len(rows)} images, too few for {per_class} to train on, "
                             f"{val_per_class} for validation and one to test on")
        val, rest = rows[torch.randperm(len(rows), generator=always)].tensor_split((val_per_class,))
        train, test = rest[torch.randperm(len(rest), generator=drawn)].tensor_split((per_class,))
        for part, chosen in zip(parts, (train, val, test), strict=True):
            part.append(chosen)
    return tuple(data.subset(torch.cat(part)) for part in parts)


def image_folder(path: str | Path, *, image_size: int = 128, unreadable: str = "raise") -> ImageSet:
    """Read a folder of images, one subfolder a class, resized and cropped to ``image_size`` squares.

    Everything is read at once (a thousand images of 128 pixels take 50 MB), so a bad file is found now and not in
    the middle of an epoch. ``unreadable`` says what to do with one: ``"raise"``, or ``"skip"`` with a warning.
    Photographs are turned upright, transparent images laid on white, hidden files and folders left out. Files that do not
    end like an image that Pillow reads (.heic, .mp4) are left out too; a warning counts them, but for texts and tables.
    Pixels of 16 bits are scaled to 8, and so are floats of 0 to 1.
    ``factors["file"]`` is each image's place in the list of all files, sorted by class and name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, folders of splits (train, val, …) in their place, a class without images, or a file
            that ends like an image and cannot be read as one.
    """
    if unreadable not in ("raise", "skip"):
        raise ValueError(f"unreadable must be 'raise' or 'skip', not {unreadable!r}")
    _check(n=1, image_size=image_size)
    path = Path(path).expanduser()
    files = _class_files(path)
    images, labels, places, bad = [], [], [], []
    for place, (label, file) in enumerate((label, file) for label, group in enumerate(files.values()) for file in group):
        try:
            images.append(_read_image(file, image_size))
        except Exception as error:  # Pillow raises a different error for each way of being damaged
            bad.append((file, error))
            continue
        labels.append(label)
        places.append(place)
    if bad and unreadable == "raise":
        file, error = bad[0]
        raise ValueError(f"{len(bad)} unreadable file(s), the first is {file} ({error}); mend it, or pass "
                         "unreadable='skip' (on the command line --skip-unreadable)") from error
    if bad:
        warnings.warn(f"skipped {len(bad)} unreadable file(s): {', '.join(str(file) for file, _ in bad)}", stacklevel=2)
    empty = [name for label, name in enumerate(files) if label not in set(labels)]
    if empty:
        raise ValueError(f"no readable image is left in class folder(s) {empty} of {path}")
    return ImageSet(torch.stack(images), torch.tensor(labels), tuple(files), {"file": torch.tensor(places)})


def _class_files(path: Path) -> dict[str, list[Path]]:
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def is_image(file: Path) -> bool:
        return file.suffix.lower() in endings

    def is_shown_file(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)  # macOS's ._a.jpg, Jupyter's copies
        return not hidden and file.is_file()

    folders = _subfolders(path)
    if not folders:
        loose = sum(is_image(file) and is_shown_file(file) for file in path.iterdir())
        raise ValueError(f"{path} has no subfolders; put the images of each class into a subfolder of its own"
                         + (f" ({loose} images lie directly in it)" if loose else ""))
    if all(folder.name.lower() in SPLITS for folder in folders) and any(map(_subfolders, folders)):
        to_train_on = next((folder for folder in folders if folder.name.lower().startswith("train")), folders[0])
        raise ValueError(f"the folders {', '.join(folder.name for folder in folders)} in {path} are parts of the data and no "
                         f"classes; pass one whose subfolders are the classes, e.g. {to_train_on}")
    files = {folder.name: sorted(filter(is_shown_file, folder.rglob("*"))) for folder in folders}
    others = Counter(file.suffix.lower() or "without an ending" for group in files.values() for file in group
                     if not is_image(file) and not _is_note(file))
    if others:
        warnings.warn(f"left out {others.total()} file(s) that do not end like an image that can be read here ("
                      f"{', '.join(f'{n} {ending}' for ending, n in others.most_common())}); if they are images, save them as "
                      ".jpg or .png", stacklevel=3)
    files = {name: list(filter(is_image, group)) for name, group in files.items()}
    if empty := [name for name, group in files.items() if not group]:
        raise ValueError(f"class folder(s) {empty} of {path} contain no image (known endings: .jpg, .png, .webp, …)")
    return files


def _subfolders(path: Path) -> list[Path]:
    return [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _is_note(file: Path) -> bool:
    return file.suffix.lower() in NOTES if file.suffix else file.name.lower() in NOTES_WITHOUT_ENDING


def _read_image(file: Path, size: int) -> Tensor:
    with Image.open(file) as image:
        image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG be decoded at a fraction of its size
        upright = _rgb(ImageOps.exif_transpose(image))
    square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # which Pillow would clip to black and white
        return Image.fromarray(_eight_bits(np.asarray(image), always_sixteen="16" in image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray, *, always_sixteen: bool) -> np.ndarray:
    """Grey values of another kind as uint8: floats of 0 to 1, or integers, which may have 8 or 16 bits.

    Raises:
        ValueError: values outside, of which nobody knows what is black and what is white.
    """
    low, high, floats = pixels.min(), pixels.max(), pixels.dtype.kind == "f"
    white = 1 if floats else 65535
    if not 0 <= low <= high <= white:  # nor if one is not a number
        raise ValueError(f"its pixels go from {low} to {high}; {'floats' if floats else 'integers'} are read from 0 for black "
                         f"to {white} for white, so scale them to that, or save it with 8 bits a pixel")
    if floats:
        return (255 * pixels).round().astype(np.uint8)
    # Some versions of Pillow open a PNG of 16 bits as integers of 32, in which values of 8 bits may lie as well.
    return (pixels // 256 if always_sixteen or high > 255 else pixels).astype(np.uint8)


def _check(n: int, image_size: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels, not {image_size}")
