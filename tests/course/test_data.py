import random
import unicodedata

import pytest
import torch

from layerlr_helpers import handwritten_digits, printed_glyphs, shifted
from layerlr_helpers.course import scenes
from layerlr_helpers.course.data import ornate_letters
from layerlr_helpers.images import ImageSet

MAKERS = {"glyphs": lambda **options: printed_glyphs(40, image_size=32, **options),
          "digits": lambda **options: handwritten_digits(image_size=16, **options)}


def same(a, b):
    return (torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.class_names == b.class_names
            and a.factors.keys() == b.factors.keys() and all(torch.equal(a.factors[k], b.factors[k]) for k in a.factors))


# Built-in data


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shift", [None, "noisy", "permuted"])
def test_a_seed_decides_all_and_the_global_generators_nothing(make, shift):
    before = torch.get_rng_state(), random.getstate()
    first = make(seed=5, shift=shift)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.rand(1)
    assert same(first, make(seed=5, shift=shift))
    assert not torch.equal(first.images, make(seed=6, shift=shift).images)


def test_the_data_stay_on_the_set_of_64_letters_and_16_fonts(small_glyphs):
    many = printed_glyphs(4000, image_size=16)
    assert many.class_names == scenes.GLYPHS
    assert set(many.labels.tolist()) == set(range(64))
    assert set(many.factors["font"].tolist()) == set(range(16))


def test_ornate_letters_are_the_printed_capitals_in_four_other_forms():
    many = ornate_letters(2000, image_size=32, seed=3)
    assert many.class_names == scenes.GLYPHS[:26] == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert set(many.labels.tolist()) == set(range(26))
    assert set(many.factors["style"].tolist()) == set(range(4))
    assert same(many, ornate_letters(2000, image_size=32, seed=3))
    for _, characters in scenes.ORNATE:
        assert unicodedata.normalize("NFKC", characters) == "".join(many.class_names)
    masks = torch.cat([scenes.ornate_masks(32), scenes.glyph_masks(32)])
    assert len(masks.flatten(1).unique(dim=0)) == 4 * 26 + 16 * 64  # every one is drawn, and looks different


def test_there_are_1797_digits_about_as_many_of_each(small_digits):
    assert len(small_digits) == 1797
    assert small_digits.class_names == tuple("0123456789")
    counts = small_digits.labels.bincount()
    assert counts.min() >= 174
    assert counts.max() <= 183
    assert torch.equal(small_digits.factors["scan"], torch.arange(1797))


def test_label_and_factors_are_those_of_the_pixels():
    """The letter, its font and its pose give back where the letter's colour is."""
    data = printed_glyphs(200)
    factors = data.factors
    masks = scenes.glyph_masks(64)[factors["font"] * 64 + data.labels]
    shape = scenes._pose(masks[:, None], factors) > 0.95
    off = scenes._pose(masks[:, None], factors) < 0.05
    images = data.images.float() / 255

    def mean_where(where):
        return (images * where).sum((2, 3)) / where.sum((2, 3))

    enough = shape.sum((1, 2, 3)) > 40
    assert enough.float().mean() > 0.8
    # The noise averages out, but for what is clipped at black and white.
    assert (mean_where(shape) - factors["foreground_colour"])[enough].abs().max() < 0.05
    flat = factors["background"] == scenes.BACKGROUNDS.index("flat")
    assert (mean_where(off) - factors["background_colour"])[flat].abs().max() < 0.05
    darker = mean_where(shape).mean(1) < mean_where(off).mean(1)
    assert torch.equal(darker[enough], factors["dark_on_light"][enough])


@pytest.mark.parametrize(("make", "problem"), [
    (lambda: printed_glyphs(0), "n must be at least 1, not 0"),
    (lambda: printed_glyphs(4, image_size=15), "at least 16 pixels, not 15"),
    (lambda: handwritten_digits(image_size=8), "at least 16 pixels, not 8"),
])
def test_arguments_that_make_no_data_are_refused(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


# Shifts


def test_inverted_twice_is_the_original(small_glyphs):
    once = shifted(small_glyphs, "inverted")
    assert torch.equal(once.images.int() + small_glyphs.images.int(), torch.full_like(once.images, 255).int())
    assert same(shifted(once, "inverted"), small_glyphs)


def test_blur_keeps_the_mean_and_takes_the_detail(small_glyphs):
    blurred = shifted(small_glyphs, "blurred")
    before, after = small_glyphs.images.float(), blurred.images.float()
    assert (before.mean((2, 3)) - after.mean((2, 3))).abs().max() < 8  # grey levels; the edges are repeated outwards
    assert after.diff(dim=3).abs().mean() < 0.2 * before.diff(dim=3).abs().mean()
    constant = ImageSet(torch.full((1, 3, 32, 32), 77, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), ("a",))
    assert torch.equal(shifted(constant, "blurred").images, constant.images)


def test_noise_is_added_to_the_images_alone(small_glyphs):
    noisy = shifted(small_glyphs, "noisy", seed=1)
    assert torch.equal(noisy.labels, small_glyphs.labels)
    middle = (small_glyphs.images > 120) & (small_glyphs.images < 135)  # where 0..255 clips both sides alike
    error = (noisy.images.float() - small_glyphs.images.float())[middle]
    assert error.mean().abs() < 5
    assert error.std() > 80
    assert not torch.equal(noisy.images, shifted(small_glyphs, "noisy", seed=2).images)


@pytest.mark.parametrize("data", ["small_glyphs", "small_digits"])
def test_permuted_gives_every_class_the_number_of_another_and_its_name_follows(data, request):
    data = request.getfixturevalue(data)
    permuted = shifted(data, "permuted", seed=1)
    assert not (permuted.labels == data.labels).any()
    assert sorted(permuted.class_names) == sorted(data.class_names)
    assert [permuted.class_names[i] for i in permuted.labels] == [data.class_names[i] for i in data.labels]
    assert torch.equal(permuted.labels, shifted(data, "permuted", seed=2).labels)  # the same task for every seed


def test_an_unknown_shift_is_refused_with_the_known_ones(small_digits):
    with pytest.raises(ValueError, match="'sideways'; known are None, 'inverted', 'blurred', 'noisy', 'permuted'"):
        shifted(small_digits, "sideways")
