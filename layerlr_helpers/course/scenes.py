"""Coloured scenes around a shape: the pixels behind both built-in data sets.

A *shape* is a grey mask (a printed letter, a scanned digit). A *scene* gives it a colour, a pose, a textured
background and sensor noise. Every random choice is drawn first, as a dictionary of *factors*, and rendered
afterwards, so that a data set can tell which stripe direction or colour is behind each of its images.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

BACKGROUNDS = ("flat", "gradient", "stripes", "blobs")

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrty"  # no small letter that is a capital made smaller
GREEK = "ΓΔΘΛΞΠΣΦΨΩ"
CYRILLIC = "БДЖЗИЛУЦЧШЭЮЯ"
GLYPHS = tuple(LATIN + GREEK + CYRILLIC)

# The text fonts that matplotlib ships and that have all three alphabets.
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
)

# The same capitals A to Z, written and in black letter, which matplotlib's STIX fonts have for formulas.
ORNATE = (
    ("STIXGeneral", "𝒜ℬ𝒞𝒟ℰℱ𝒢ℋℐ𝒥𝒦ℒℳ𝒩𝒪𝒫𝒬ℛ𝒮𝒯𝒰𝒱𝒲𝒳𝒴𝒵"),
    ("STIXGeneral", "𝓐𝓑𝓒𝓓𝓔𝓕𝓖𝓗𝓘𝓙𝓚𝓛𝓜𝓝𝓞𝓟𝓠𝓡𝓢𝓣𝓤𝓥𝓦𝓧𝓨𝓩"),
    ("STIXGeneral", "𝔄𝔅ℭ𝔇𝔈𝔉𝔊ℌℑ𝔍𝔎𝔏𝔐𝔑𝔒𝔓𝔔ℜ𝔖𝔗𝔘𝔙𝔚𝔛𝔜ℨ"),
    ("STIXGeneralBol", "𝕬𝕭𝕮𝕯𝕰𝕱𝕲𝕳𝕴𝕵𝕶𝕷𝕸𝕹𝕺𝕻𝕼𝕽𝕾𝕿𝖀𝖁𝖂𝖃𝖄𝖅"),
)

_CHUNK = 512  # images rendered at once: large enough to vectorise, small enough to stay in the cache


def draw_factors(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw everything that is random about ``n`` scenes, but for the noise of single pixels.

    Colours are RGB in 0..1. Angles are in degrees. ``stripe_direction``, in [0, 180), is the direction in which the
    stripes (or the gradient) vary, clockwise from the image's x axis; ``stripe_frequency`` is their number in an image's
    width. The shape is first shifted by ``shift_x`` (right) and ``shift_y`` (down), fractions of the image's size, then
    rotated anticlockwise, sheared and scaled, all about the image's middle. ``noise`` is its standard deviation in 0..1.
    """
    def uniform(low, high, *size):
        return torch.rand(n, *size, generator=generator) * (high - low) + low

    background, second, foreground = uniform(0, 0.55, 3), uniform(0, 0.55, 3), uniform(0.45, 1, 3)
    dark_on_light = torch.rand(n, generator=generator) < 0.5
    flip = dark_on_light[:, None]
    return {
        "background": torch.randint(len(BACKGROUNDS), (n,), generator=generator),
        "background_colour": torch.where(flip, 1 - background, background),
        "second_colour": torch.where(flip, 1 - second, second),
        "foreground_colour": torch.where(flip, 1 - foreground, foreground),
        "dark_on_light": dark_on_light,
        "stripe_direction": uniform(0, 180),
        "stripe_frequency": uniform(3, 8),
        "stripe_phase": uniform(0, 2 * math.pi),
        "rotation": uniform(-25, 25),
        "shear": uniform(-0.3, 0.3),
        "scale": uniform(0.75, 1.1),
        "shift_x": uniform(-0.12, 0.12),
        "shift_y": uniform(-0.12, 0.12),
        "noise": uniform(0, 0.1),
    }


def render(masks: Tensor, mask_index: Tensor, factors: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Render uint8 images [N, 3, S, S]; each shows the one of the ``masks`` [M, S, S] in 0..1 that ``mask_index`` [N] says."""
    size = masks.shape[-1]
    images = torch.empty(len(mask_index), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(mask_index), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = {name: values[rows] for name, values in factors.items()}
        first, second, foreground = (part[f"{name}_colour"][..., None, None] for name in ("background", "second", "foreground"))
        background = torch.lerp(first, second, _texture(part, size, generator))
        scene = torch.lerp(background, foreground, _pose(masks[mask_index[rows]][:, None], part))
        grain = torch.randn(scene.shape, generator=generator).mul_(part["noise"][:, None, None, None])
        images[rows] = scene.add_(grain).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return images


def _pose(masks: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """Rotate, shear, scale and shift masks [N, 1, S, S]."""
    angle = torch.deg2rad(factors["rotation"])
    cos, sin, shear = angle.cos(), angle.sin(), factors["shear"]
    linear = torch.stack([cos, -sin + shear * cos, sin, cos + shear * sin], 1).view(-1, 2, 2)
    linear = linear / factors["scale"][:, None, None]  # the map goes from the output back to the input
    offset = -2 * torch.stack([factors["shift_x"], factors["shift_y"]], 1)[:, :, None]
    grid = F.affine_grid(torch.cat([linear, offset], 2), masks.shape, align_corners=False)
    return F.grid_sample(masks, grid, align_corners=False)


def _texture(factors: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    """How much of the second background colour is at each pixel: [N, 1, S, S] in 0..1."""
    kind = factors["background"]
    amount = torch.zeros(len(kind), 1, size, size)
    axis = torch.linspace(-0.5, 0.5, size)

    def along(rows):  # position along the stripe direction, in image widths
        angle = torch.deg2rad(factors["stripe_direction"][rows])[:, None, None]
        return (axis[None, None, :] * angle.cos() + axis[None, :, None] * angle.sin())[:, None]

    rows = kind == BACKGROUNDS.index("gradient")
    amount[rows] = (0.5 + along(rows)).clamp_(0, 1)
    rows = kind == BACKGROUNDS.index("stripes")
    turns = 2 * math.pi * factors["stripe_frequency"][rows][:, None, None, None] * along(rows)
    wave = torch.sin(turns + factors["stripe_phase"][rows][:, None, None, None])
    amount[rows] = (0.5 + wave).clamp_(0, 1)
    rows = kind == BACKGROUNDS.index("blobs")
    coarse = torch.randn(int(rows.sum()), 1, 6, 6, generator=generator)
    if len(coarse):
        amount[rows] = F.interpolate(coarse, (size, size), mode="bilinear").mul_(2).sigmoid_()
    return amount


@lru_cache(maxsize=4)
def glyph_masks(size: int) -> Tensor:
    """Every glyph in every font, centred: [len(FONTS) * len(GLYPHS), size, size], the font changing slowest.

    The result is cached: copy it before you change it.
    """
    return _drawn([(font, GLYPHS) for font in FONTS], size)


@lru_cache(maxsize=4)
def ornate_masks(size: int) -> Tensor:
    """The ornate capitals, style by style: [len(ORNATE) * 26, size, size]; cached like :func:`glyph_masks`."""
    return _drawn(ORNATE, size)


def _drawn(alphabets: Sequence[tuple[str, Sequence[str]]], size: int) -> Tensor:
    """Draw the characters of each (font, characters), centred: [all characters, size, size] in 0..1."""
    import matplotlib  # here: slow to import, and only its fonts are wanted

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = []
    for name, characters in alphabets:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), round(size * 0.8))
        for character in characters:
            left, top, right, bottom = font.getbbox(character)
            canvas = Image.new("L", (size, size))
            corner = ((size - right - left) / 2, (size - bottom - top) / 2)
            ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
            masks.append(pil_to_tensor(canvas)[0] / 255)
    return torch.stack(masks)


def digit_masks(scans: Tensor, size: int) -> Tensor:
    """Scans [N, 8, 8] of 0..16 as smooth masks [N, size, size] with an empty margin."""
    inner = round(size * 0.7)
    masks = F.interpolate(scans[:, None] / 16, (inner, inner), mode="bicubic", align_corners=False)
    before = (size - inner) // 2
    after = size - inner - before
    return F.pad(masks, (before, after, before, after))[:, 0].sub_(0.1).mul_(1.4).clamp_(0, 1)
