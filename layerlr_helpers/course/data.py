"""The built-in data: printed glyphs to pretrain on, real handwriting to fine-tune on, and shifts of both."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from layerlr_helpers.course import scenes
from layerlr_helpers.images import ImageSet, check_image_size
from layerlr_helpers.naming import check_choice


def printed_glyphs(n: int, *, image_size: int = 64, seed: int = 0, shift: str | None = None) -> ImageSet:
    """Render ``n`` printed letters of 64 classes (Latin, Greek, Cyrillic) in coloured scenes.

    The same ``n``, ``image_size`` and ``seed`` give the same images. ``factors`` holds, for each image, its font
    (an index into ``scenes.FONTS``) and everything of :func:`scenes.draw_factors`. ``shift`` as in :func:`shifted`.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    check_image_size(image_size)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(scenes.GLYPHS), (n,), generator=generator)
    font = torch.randint(len(scenes.FONTS), (n,), generator=generator)
    factors = scenes.draw_factors(n, generator)
    images = scenes.render(scenes.glyph_masks(image_size), font * len(scenes.GLYPHS) + labels, factors, generator)
    return shifted(ImageSet(images, labels, scenes.GLYPHS, {"font": font, **factors}), shift, seed=seed)


def ornate_letters(n: int, *, image_size: int = 64, seed: int = 0) -> ImageSet:
    """Render ``n`` capitals A to Z as they are written and in black letter: what printed letters are called, in new forms.

    The labels are those of the same letters in :func:`printed_glyphs`, so a network keeps its head. ``factors`` holds the
    style of each image (an index into ``scenes.ORNATE``) and everything of :func:`scenes.draw_factors`.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    check_image_size(image_size)
    generator = torch.Generator().manual_seed(seed)
    letters = scenes.GLYPHS[:26]
    labels = torch.randint(len(letters), (n,), generator=generator)
    style = torch.randint(len(scenes.ORNATE), (n,), generator=generator)
    factors = scenes.draw_factors(n, generator)
    images = scenes.render(scenes.ornate_masks(image_size), style * len(letters) + labels, factors, generator)
    return ImageSet(images, labels, letters, {"style": style, **factors})


def handwritten_digits(*, image_size: int = 64, seed: int = 0, shift: str | None = None) -> ImageSet:
    """The 1,797 scanned digits of scikit-learn (real handwriting) in the same kind of scene as the glyphs.

    Data: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), CC BY 4.0. ``seed``
    chooses the scenes; ``factors["scan"]`` is each scan's number in scikit-learn's order. ``shift`` as in
    :func:`shifted`. Use :func:`few_shot_split` to split it.
    """
    from sklearn.datasets import load_digits  # here: scikit-learn takes longer to import than the rest of this package

    check_image_size(image_size)
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    masks = scenes.digit_masks(torch.as_tensor(digits.images, dtype=torch.float32), image_size)
    scan = torch.arange(len(masks))
    factors = scenes.draw_factors(len(masks), generator)
    images = scenes.render(masks, scan, factors, generator)
    labels, names = torch.as_tensor(digits.target, dtype=torch.int64), tuple(map(str, digits.target_names))
    return shifted(ImageSet(images, labels, names, {"scan": scan, **factors}), shift, seed=seed)


def shifted(data: ImageSet, shift: str | None, *, seed: int = 0) -> ImageSet:
    """The same data after a shift of its distribution; ``None`` changes nothing.

    At the input: ``"inverted"`` (negative), ``"blurred"`` (Gaussian, sigma 6 % of the image's width), ``"noisy"``
    (Gaussian noise, sigma 0.6 of full scale). At the output: ``"permuted"`` (every class gets the number of another, always by
    the same permutation).
    """
    check_choice("shift", shift, (None, "inverted", "blurred", "noisy", "permuted"))
    if shift == "inverted":
        return replace(data, images=255 - data.images)
    if shift == "blurred":
        sigma = 0.06 * data.images.shape[-1]
        return _change_images(data, lambda images: _blur(images, sigma))
    if shift == "noisy":
        generator = torch.Generator().manual_seed(seed + 1)  # not the seed that drew the scenes' own noise
        return _change_images(data, lambda images: images + 0.6 * 255 * torch.randn(images.shape, generator=generator))
    if shift == "permuted":
        cycle = torch.randperm(len(data.class_names), generator=torch.Generator().manual_seed(0))
        order = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))  # one long cycle: no class keeps its number
        names = tuple(data.class_names[old] for old in order.argsort())
        return replace(data, labels=order[data.labels], class_names=names)
    return data


def _change_images(data: ImageSet, change: Callable[[Tensor], Tensor]) -> ImageSet:
    """Apply ``change`` to the images as floats of 0 to 255, few at a time so that the floats stay small in memory."""
    parts = [change(part.float()).round().clamp(0, 255).to(torch.uint8) for part in data.images.split(512)]
    return replace(data, images=torch.cat(parts))


def _blur(images: Tensor, sigma: float) -> Tensor:
    radius = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    along_rows = F.conv2d(padded, kernel[:, None, None, :], groups=3)
    return F.conv2d(along_rows, kernel[:, None, :, None], groups=3)
