import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from layerlr_helpers import few_shot_split, handwritten_digits, image_folder, printed_glyphs, shifted
from layerlr_helpers.course import scenes
from layerlr_helpers.course.data import INPUT_SHIFTS, OUTPUT_SHIFTS
from layerlr_helpers.images import ImageSet, denormalise, normalise

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


@pytest.mark.parametrize("data", ["small_glyphs", "small_digits"])
def test_items_are_normalised_float_images_and_int_labels(data, request):
    data = request.getfixturevalue(data)
    assert data.images.dtype == torch.uint8
    assert data.labels.dtype == torch.int64
    image, label = data[3]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert label == data.labels[3]
    by_hand = (data.images[3].double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) \
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert torch.allclose(image.double(), by_hand, atol=1e-6)
    assert len(data) == len(list(data)) == len(data.images)
    assert all(len(values) == len(data) for values in data.factors.values())


@given(st.integers(0, 255))
def test_denormalise_is_the_inverse_of_normalise(value):
    images = torch.full((2, 3, 4, 4), value, dtype=torch.uint8)
    assert torch.equal(denormalise(normalise(images)).mul(255).round().to(torch.uint8), images)


def test_the_data_stay_on_the_set_of_64_letters_and_16_fonts(small_glyphs):
    many = printed_glyphs(4000, image_size=16)
    assert many.class_names == scenes.GLYPHS
    assert set(many.labels.tolist()) == set(range(64))
    assert set(many.factors["font"].tolist()) == set(range(16))


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
    (lambda: printed_glyphs(4, image_size=16, shift="odd_even"), "needs classes named by whole numbers"),
])
def test_arguments_that_make_no_data_are_refused(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


def test_it_says_in_one_line_what_it_is(small_digits):
    assert repr(small_digits) == "ImageSet(1797 images of 32x32 pixels, 10 classes)"


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


def test_odd_even_regroups_the_digits(small_digits):
    two = shifted(small_digits, "odd_even")
    assert two.class_names == ("even", "odd")
    assert torch.equal(two.labels, small_digits.labels % 2)


def test_an_unknown_shift_is_refused_with_the_known_ones(small_digits):
    with pytest.raises(ValueError, match="unknown shift 'sideways'") as raised:
        shifted(small_digits, "sideways")
    assert all(repr(name) in str(raised.value) for name in INPUT_SHIFTS + OUTPUT_SHIFTS)


# Splitting and loading


@given(per_class=st.integers(1, 20), val_per_class=st.integers(0, 20), seed=st.integers(0, 1000))
def test_a_few_shot_split_deals_out_every_image_once(small_digits, per_class, val_per_class, seed):
    parts = few_shot_split(small_digits, per_class, val_per_class=val_per_class, seed=seed)
    train, val, _ = parts
    assert train.labels.bincount(minlength=10).tolist() == [per_class] * 10
    assert val.labels.bincount(minlength=10).tolist() == [val_per_class] * 10
    assert sorted(torch.cat([part.factors["scan"] for part in parts]).tolist()) == list(range(1797))


def test_the_seed_decides_the_split(small_digits):
    first, again, other = (few_shot_split(small_digits, seed=seed)[0].factors["scan"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_seed_has_the_same_validation_images(small_digits):
    first, other = (few_shot_split(small_digits, seed=seed) for seed in (0, 1))
    assert torch.equal(first[1].factors["scan"], other[1].factors["scan"])


@pytest.mark.parametrize(("sizes", "problem"), [
    ((160, 20), "class '0' has 178 images, too few for 160 to train on, 20 for validation"),
    ((0, 20), "per_class is 1 or above"),
    ((10, -1), "val_per_class 0 or above"),
])
def test_a_split_that_cannot_be_is_refused(small_digits, sizes, problem):
    with pytest.raises(ValueError, match=problem):
        few_shot_split(small_digits, sizes[0], val_per_class=sizes[1])


@given(st.lists(st.integers(-256, 255), max_size=20))
def test_a_subset_keeps_labels_and_factors_beside_their_images(small_glyphs, rows):
    part = small_glyphs.subset(rows)
    assert len(part) == len(rows)
    for at, row in enumerate(rows):
        assert torch.equal(part.images[at], small_glyphs.images[row])
        assert part.labels[at] == small_glyphs.labels[row]
        assert part.factors["rotation"][at] == small_glyphs.factors["rotation"][row]


def test_a_subset_can_be_chosen_by_a_mask(small_glyphs):
    striped = small_glyphs.subset(small_glyphs.factors["background"] == 2)
    assert 0 < len(striped) < len(small_glyphs)
    assert (striped.factors["background"] == 2).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_gives_what_indexing_gives(small_glyphs, workers):
    batches = list(DataLoader(small_glyphs.subset(range(10)), batch_size=4, num_workers=workers))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert [len(batch[1]) for batch in batches] == [4, 4, 2]
    assert torch.equal(images, torch.stack([small_glyphs[i][0] for i in range(10)]))
    assert labels.tolist() == [small_glyphs[i][1] for i in range(10)]


# Folders of images


def colour_image(size=(40, 30), colour=(200, 30, 30)):
    return Image.new("RGB", size, colour)


@pytest.fixture
def folder(tmp_path):
    """Two classes, of two images and one."""
    for name, colour in (("cat/1.jpg", (200, 30, 30)), ("cat/2.png", (30, 200, 30)), ("dog/deep/3.webp", (30, 30, 200))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        colour_image(colour=colour).save(tmp_path / name)
    return tmp_path


@pytest.fixture(params=["generated", *filter(None, [os.environ.get("LAYERLR_PHOTOS")])])
def any_folder(request, folder):
    return folder if request.param == "generated" else request.param


def test_every_subfolder_is_a_class(any_folder):
    data = image_folder(any_folder, image_size=48)
    classes = sorted(entry.name for entry in os.scandir(any_folder) if entry.is_dir())
    assert data.class_names == tuple(classes)
    assert set(data.labels.tolist()) == set(range(len(classes)))
    assert data.images.shape == (len(data.labels), 3, 48, 48)
    assert data.images.float().std() > 10
    assert data.factors["file"].tolist() == list(range(len(data)))


def test_images_keep_their_colours_and_order(folder):
    data = image_folder(folder, image_size=16)
    assert data.labels.tolist() == [0, 0, 1]
    assert data.images.float().mean((2, 3)).argmax(1).tolist() == [0, 1, 2]


def test_a_home_folder_may_be_written_as_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert len(image_folder(f"~/{folder.name}", image_size=16)) == 3


def test_hidden_and_other_files_are_left_out(folder):
    (folder / "cat" / "._1.jpg").write_bytes(b"what macOS leaves behind")
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "manual.pdf").write_text("no image either")
    (folder / "cat" / "odd.jpg").mkdir()
    for place in (folder / ".ipynb_checkpoints", folder / "cat" / ".ipynb_checkpoints"):
        place.mkdir()
        colour_image().save(place / "copy.png")
    assert len(image_folder(folder, image_size=16)) == 3


@pytest.mark.parametrize("splits", [("train", "val"), ("Test", "Training", "valid"), ("validation",)])
def test_folders_of_splits_are_not_taken_for_classes(folder, splits):
    for split in splits:
        shutil.copytree(folder / "cat", folder / "all" / split / "cat")
        shutil.copytree(folder / "dog", folder / "all" / split / "dog")
    first = next((split for split in splits if split.lower().startswith("train")), splits[0])
    with pytest.raises(ValueError, match=rf"no classes; pass one whose subfolders .* e\.g\. .*all.{first}$"):
        image_folder(folder / "all", image_size=16)
    assert image_folder(folder / "all" / first, image_size=16).class_names == ("cat", "dog")


def test_classes_that_are_only_named_like_splits_are_read(tmp_path):
    for name in ("test/1.png", "train/2.png"):
        (tmp_path / name).parent.mkdir()
        colour_image().save(tmp_path / name)
    assert image_folder(tmp_path, image_size=16).class_names == ("test", "train")
    (tmp_path / "steam train" / "deep").mkdir(parents=True)
    colour_image().save(tmp_path / "steam train" / "deep" / "3.png")
    assert image_folder(tmp_path, image_size=16).class_names == ("steam train", "test", "train")


def test_images_of_an_unknown_ending_are_counted_in_one_warning(folder):
    for name in ("cat/1.HEIC", "cat/2.heic", "dog/clip.mp4", "dog/5", "dog/.hidden.heic", "dog/Thumbs.db", "dog/LICENSE",
                 "cat/labels.json", "cat/README.md"):
        (folder / name).write_bytes(b"something")
    with pytest.warns(UserWarning, match=r"left out 4 .*\(2 \.heic, 1 without an ending, 1 \.mp4\).* as \.jpg") as caught:
        data = image_folder(folder, image_size=16)
    assert len(data) == 3
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere")


def test_a_folder_without_subfolders_says_how_it_should_be(tmp_path):
    colour_image().save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"no subfolders; put the images of each class.*\(1 images lie directly"):
        image_folder(tmp_path)


def test_a_class_without_images_is_named(folder):
    (folder / "cow").mkdir()
    with pytest.raises(ValueError, match=r"\['cow'\].* contain no image"):
        image_folder(folder)


def test_other_arguments_are_checked_first(tmp_path):
    with pytest.raises(ValueError, match="unreadable must be 'raise' or 'skip', not 'ignore'"):
        image_folder(tmp_path / "nowhere", unreadable="ignore")
    with pytest.raises(ValueError, match="at least 16 pixels"):
        image_folder(tmp_path / "nowhere", image_size=1)


def test_an_unreadable_file_is_named_or_skipped_as_asked(folder):
    (folder / "cat" / "broken.jpg").write_bytes((folder / "cat" / "1.jpg").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"1 unreadable file.*broken\.jpg"):
        image_folder(folder, image_size=16)
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable.*broken\.jpg"):
        data = image_folder(folder, image_size=16, unreadable="skip")
    assert data.labels.tolist() == [0, 0, 1]
    assert data.factors["file"].tolist() == [0, 1, 3]  # the broken one is the third of four


def test_a_class_of_which_no_image_can_be_read_is_an_error(folder):
    (folder / "dog" / "deep" / "3.webp").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=r"no readable image is left.*'dog'"):
        image_folder(folder, unreadable="skip")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what is odd in a damaged file
@pytest.mark.parametrize("ending", [".jpg", ".png", ".gif", ".tif", ".webp", ".bmp"])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_by_name_but_nothing_else(tmp_path_factory, ending, data):
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "cat" / f"x{ending}"
    file.parent.mkdir()
    colour_image().save(file)
    content = bytearray(file.read_bytes())
    for place in data.draw(st.lists(st.integers(0, min(len(content) - 1, 400)), max_size=5)):
        content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try:
        images = image_folder(folder, image_size=16).images
    except ValueError as error:
        images, message = None, str(error)
    assert images.shape == (1, 3, 16, 16) if images is not None else f"x{ending}" in message


def test_an_enormous_image_is_refused_by_name(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="unreadable"):
        image_folder(folder, image_size=16)


def saved(tmp_path, name, image, **options):
    (tmp_path / "a").mkdir(exist_ok=True)
    image.save(tmp_path / "a" / name, **options)
    return image_folder(tmp_path, image_size=32).images[0].float()


def ramp(size=(32, 32)):
    """Dark at the left, light at the right."""
    return Image.fromarray(np.linspace(0, 255, size[0]).astype(np.uint8)[None].repeat(size[1], 0))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "P", "RGBA", "LA", "1", "YCbCr"])
def test_every_kind_of_pixel_becomes_the_same_rgb(tmp_path, mode):
    name = "x.jpg" if mode in ("CMYK", "YCbCr") else "x.png"
    image = saved(tmp_path, name, ramp().convert("RGB").convert(mode))
    assert image.shape == (3, 32, 32)
    assert (image - image.mean(0)).abs().max() < 12  # grey
    assert image.mean((0, 1)).diff().float().mean() > 5  # and brighter to the right


def test_sixteen_bits_a_pixel_are_scaled_and_not_clipped(tmp_path):
    image = saved(tmp_path, "x.png", Image.fromarray(np.asarray(ramp()).astype(np.uint16) * 256))
    assert (image.mean((0, 1)) - torch.linspace(0, 255, 32)).abs().max() < 2


@pytest.mark.parametrize(("dtype", "white", "ending"), [
    (np.int32, 255, "tif"), (np.int32, 65535, "tif"), (np.uint16, 65535, "png"), (np.float32, 1, "tif")])
def test_grey_values_of_every_kind_go_from_black_to_white(tmp_path, dtype, white, ending):
    image = saved(tmp_path, f"x.{ending}", Image.fromarray((np.asarray(ramp()) / 255 * white).astype(dtype)))
    assert (image.mean((0, 1)) - torch.linspace(0, 255, 32)).abs().max() < 2


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.float32, 0, 255), (np.float32, -1, 1), (np.float32, 0, np.nan),
                                                    (np.int32, -5, 9), (np.int32, 0, 70000)])
def test_grey_values_that_may_mean_anything_are_refused_by_name_or_skipped(folder, dtype, low, high):
    pixels = np.full((20, 20), low, dtype)
    pixels[3] = high
    Image.fromarray(pixels).save(folder / "cat" / "odd.tif")
    with pytest.raises(ValueError, match=r"1 unreadable file.*odd\.tif .*pixels go from .* so scale them to that"):
        image_folder(folder, image_size=16)
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable.*odd\.tif"):
        assert len(image_folder(folder, image_size=16, unreadable="skip")) == 3


def test_transparent_pixels_become_white(tmp_path):
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 16, 32))
    image = saved(tmp_path, "x.png", picture)
    assert image[:, 16, 4].tolist() == [255, 0, 0]
    assert image[:, 16, 28].tolist() == [255, 255, 255]


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that a quarter turn clockwise puts it right
    image = saved(tmp_path, "x.jpg", ramp((320, 240)), exif=exif)
    assert image.mean((0, 2))[0] < 40  # what was left is now at the top
    assert image.mean((0, 2))[-1] > 215


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 3)])
def test_odd_sizes_are_read(tmp_path, size):
    assert saved(tmp_path, "x.png", colour_image(size)).mean((1, 2)).tolist() == [200, 30, 30]


# The rest of the process


def test_importing_the_package_changes_no_settings_of_torch_or_matplotlib():
    code = """
import matplotlib, numpy, torch
settings = lambda: (dict(matplotlib.rcParams), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                    torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
import matplotlib.pyplot
before = settings()
import layerlr_helpers, layerlr_helpers.course.plots, layerlr_helpers.course.pretrain
assert settings() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
