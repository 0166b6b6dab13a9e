import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerlr_helpers.course import scenes

SIZE = 64
CENTRES = (torch.arange(SIZE) + 0.5) / SIZE - 0.5  # of the pixels, in image widths from the middle


def plain_factors(n, **changes):
    """Scenes with nothing in them but what ``changes`` say: a white shape on black, upright, without noise."""
    factors = scenes.draw_factors(n, torch.Generator().manual_seed(0))
    plain = {"background": scenes.BACKGROUNDS.index("flat"), "background_colour": 0.0, "second_colour": 0.0,
             "foreground_colour": 1.0, "rotation": 0.0, "shear": 0.0, "scale": 1.0, "shift_x": 0.0, "shift_y": 0.0,
             "noise": 0.0}
    for name, value in (plain | changes).items():
        factors[name] = torch.as_tensor(value, dtype=factors[name].dtype).expand(factors[name].shape).clone()
    return factors


def grey(mask, factors):
    """The scenes of one mask as grey images [N, S, S] in 0..1."""
    n = len(factors["noise"])
    images = scenes.render(mask[None], torch.zeros(n, dtype=torch.long), factors, torch.Generator().manual_seed(0))
    return images.float().mean(1) / 255


def box(half_width, half_height):
    return ((CENTRES.abs()[None, :] < half_width) & (CENTRES.abs()[:, None] < half_height)).float()


def centroid(image):
    return float((image.sum(0) * CENTRES).sum() / image.sum()), float((image.sum(1) * CENTRES).sum() / image.sum())


def long_axis(image):
    """The direction of a bar in degrees, anticlockwise from the x axis as one sees it (the y axis points down)."""
    xx = (image * CENTRES[None, :] ** 2).sum()
    yy = (image * CENTRES[:, None] ** 2).sum()
    xy = (image * CENTRES[None, :] * CENTRES[:, None]).sum()
    return math.degrees(-0.5 * math.atan2(2 * xy, xx - yy))


def test_there_are_64_letters_and_no_digit():
    assert len(set(scenes.GLYPHS)) == len(scenes.GLYPHS) == 64
    assert all(glyph.isalpha() for glyph in scenes.GLYPHS)


def test_every_letter_looks_different_in_every_one_of_16_fonts():
    masks = scenes.glyph_masks(SIZE)
    assert masks.shape == (16 * 64, SIZE, SIZE)
    assert masks.min() == 0
    assert masks.max() == 1
    # Two masks that differ in less than a few pixels would be one class under two labels, or one font under two names.
    by_font = masks.view(16, 64, -1)
    same_letter = min(float((by_font[a] - by_font[b]).abs().sum(1).min()) for a, b in itertools.combinations(range(16), 2))
    assert same_letter > 5
    for letters in by_font:
        distances = torch.cdist(letters, letters, p=1) + 1e9 * torch.eye(64)
        assert distances.min() > 10


def test_letters_fit_into_their_masks():
    masks = scenes.glyph_masks(SIZE)
    rim = torch.ones(SIZE, SIZE, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    touching = (masks[:, rim].amax(1) > 0).sum()
    assert touching <= 6  # the widest bold and italic Ж, Ш and Ю lose a pixel or two at their sides
    assert masks.flatten(1).sum(1).min() > 50  # and each has ink: no font lacks a letter


@given(st.integers(0, 2**40), st.integers(1, 40))
def test_factors_are_drawn_from_their_ranges(seed, n):
    factors = scenes.draw_factors(n, torch.Generator().manual_seed(seed))
    assert {len(values) for values in factors.values()} == {n}
    for name in ("background_colour", "second_colour", "foreground_colour"):
        assert factors[name].shape == (n, 3)
        assert ((factors[name] >= 0) & (factors[name] <= 1)).all()
    assert ((factors["stripe_direction"] >= 0) & (factors["stripe_direction"] < 180)).all()
    assert set(factors["background"].tolist()) <= set(range(4))
    lighter = factors["background_colour"].mean(1) > 0.45  # a light ground has every channel at 0.45 or above
    assert lighter[factors["dark_on_light"]].all()


def test_stripes_vary_in_the_direction_and_with_the_frequency_that_the_factors_say():
    n = 90
    factors = plain_factors(n, background=scenes.BACKGROUNDS.index("stripes"), second_colour=1.0, stripe_frequency=4.0)
    factors["stripe_direction"] = torch.arange(n) * 180.0 / n
    images = grey(torch.zeros(SIZE, SIZE), factors)
    down, right = torch.gradient(images, dim=(1, 2))
    # The doubled angle, as a direction and its opposite are the same stripes.
    measured = torch.rad2deg(0.5 * torch.atan2((2 * right * down).sum((1, 2)), (right**2 - down**2).sum((1, 2)))) % 180
    away = (measured - factors["stripe_direction"]).abs()
    assert torch.minimum(away, 180 - away).max() < 2
    peaks = torch.fft.rfft(images[0].mean(0) - images[0].mean()).abs().argmax()
    assert peaks == 4


def test_a_gradient_runs_from_one_colour_to_the_other_in_its_direction():
    factors = plain_factors(2, background=scenes.BACKGROUNDS.index("gradient"), second_colour=1.0)
    factors["stripe_direction"] = torch.tensor([0.0, 90.0])
    rightwards, downwards = grey(torch.zeros(SIZE, SIZE), factors)
    assert (rightwards[:, 1:] >= rightwards[:, :-1]).all()
    assert (downwards[1:] >= downwards[:-1]).all()
    assert rightwards[:, 0].max() < 0.05
    assert rightwards[:, -1].min() > 0.95


def test_blobs_are_blotches_between_the_two_colours():
    factors = plain_factors(8, background=scenes.BACKGROUNDS.index("blobs"), second_colour=1.0)
    images = grey(torch.zeros(SIZE, SIZE), factors)
    assert images.flatten(1).std(1).min() > 0.1
    assert (images[:, 1:] - images[:, :-1]).abs().max() < 0.3  # smooth


@given(st.floats(-0.12, 0.12), st.floats(-0.12, 0.12))
def test_a_shift_moves_the_shape_right_and_down_by_that_part_of_the_image(x, y):
    right, down = centroid(grey(box(0.2, 0.2), plain_factors(1, shift_x=x, shift_y=y))[0])
    assert right == pytest.approx(x, abs=0.005)
    assert down == pytest.approx(y, abs=0.005)


@given(st.floats(-25, 25))
def test_a_rotation_turns_the_shape_anticlockwise(angle):
    assert long_axis(grey(box(0.35, 0.06), plain_factors(1, rotation=angle))[0]) == pytest.approx(angle, abs=1)


@given(st.floats(0.75, 1.1))
def test_a_scale_makes_the_shape_larger(scale):
    area = grey(box(0.25, 0.25), plain_factors(1, scale=scale)).sum() / grey(box(0.25, 0.25), plain_factors(1)).sum()
    assert area == pytest.approx(scale**2, rel=0.03)


@given(st.floats(-0.3, 0.3))
def test_a_shear_leans_the_shape_and_keeps_its_area(shear):
    upright, leaning = grey(box(0.1, 0.3), plain_factors(1)), grey(box(0.1, 0.3), plain_factors(1, shear=shear))
    assert leaning.sum() == pytest.approx(float(upright.sum()), rel=0.03)
    top, bottom = (float((half.sum(0) * CENTRES).sum() / half.sum()) for half in (leaning[0][:32], leaning[0][32:]))
    assert top - bottom == pytest.approx(0.3 * shear, abs=0.01)


def test_noise_has_the_standard_deviation_that_the_factors_say():
    factors = plain_factors(3, background_colour=0.5)
    factors["noise"] = torch.tensor([0.0, 0.05, 0.1])
    images = scenes.render(torch.zeros(1, SIZE, SIZE), torch.zeros(3, dtype=torch.long), factors, torch.Generator())
    assert (images / 255).flatten(1).std(1) == pytest.approx(factors["noise"], abs=0.002)


def test_every_scene_has_its_own_factors_and_mask_also_across_the_chunks_of_rendering():
    n = scenes._CHUNK + 100
    factors = plain_factors(n)
    factors["foreground_colour"] = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    index = torch.arange(n) % 2
    middles = scenes.render(masks, index, factors, torch.Generator())[:, :, 8, 8]
    assert middles[index == 0].max() == 0
    assert middles[index == 1] / 255 == pytest.approx(factors["foreground_colour"][index == 1], abs=0.005)


def test_a_scanned_digit_keeps_its_strokes_and_an_empty_margin(small_digits):
    from sklearn.datasets import load_digits

    scans = torch.as_tensor(load_digits().images[:50], dtype=torch.float32)
    masks = scenes.digit_masks(scans, 64)
    assert masks.shape == (50, 64, 64)
    assert ((masks >= 0) & (masks <= 1)).all()
    assert masks[:, :9].max() == masks[:, -9:].max() == masks[..., :9].max() == masks[..., -9:].max() == 0
    inner = masks[:, 9:54, 9:54]
    small = torch.nn.functional.adaptive_avg_pool2d(inner, 8)
    pairs = torch.stack([scans.flatten(1), small.flatten(1)], 1)
    assert min(float(torch.corrcoef(pair)[0, 1]) for pair in pairs) > 0.95
