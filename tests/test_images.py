import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from layerlr_helpers import ImageSet, image_folder

# --- images in memory -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", ["small_glyphs", "small_digits"])
def test_items_are_normalised_float_images_and_int_labels(data, request):
    data = request.getfixturevalue(data).subset(range(40))
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


def test_it_says_in_one_line_what_it_is(small_digits):
    assert repr(small_digits) == "ImageSet(1797 images of 32x32 pixels, 10 classes)"


@given(st.lists(st.integers(-256, 255), max_size=10))
def test_a_subset_keeps_labels_and_factors_beside_their_images(small_glyphs, rows):
    part = small_glyphs.subset(rows)
    assert len(part) == len(rows)
    for place, row in enumerate(rows):
        assert torch.equal(part.images[place], small_glyphs.images[row])
        assert part.labels[place] == small_glyphs.labels[row]
        assert part.factors["rotation"][place] == small_glyphs.factors["rotation"][row]


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


# --- folders of images ------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"no subfolders; put the images of each class into a subfolder"):
        image_folder(tmp_path)


def test_a_class_without_images_is_named(folder):
    (folder / "cow").mkdir()
    with pytest.raises(ValueError, match=r"\['cow'\].* contain no image that can be read \(\.jpg"):
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
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=r"'dog'.* contain no image that can be"):
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


# --- links and names --------------------------------------------------------------------------------------------------


def test_links_to_folders_and_files_are_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("more/4.png", "more/deep/5.png", "horses/6.png", "7.png"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        colour_image().save(elsewhere / name)
    (folder / "cat" / "linked").symlink_to(elsewhere / "more")
    (folder / "horse").symlink_to(elsewhere / "horses")
    (folder / "horse" / "7.png").symlink_to(elsewhere / "7.png")
    data = image_folder(folder, image_size=16)
    assert data.class_names == ("cat", "dog", "horse")
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 2, 2]


def test_a_folder_that_two_links_lead_to_is_read_for_each(folder, tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    colour_image().save(shared / "1.png")
    for place in ("cat/a", "cat/b", "dog/a"):
        (folder / place).symlink_to(shared)
    assert image_folder(folder, image_size=16).labels.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(("link", "target", "problem"), [
    ("cat/9.png", "not_fetched.png", "not_fetched.png, which is not there"),
    ("cat/more", "unmounted", "unmounted, which is not there"),
    ("dog/deep/back", "..", r"\.\., a folder that it is in itself"),
    ("cat/self", ".", r"\., a folder that it is in itself"),
    ("cat/all", "..", r"\.\., a folder that it is in itself"),
    ("cat/round", "round", "round, which is not there"),
])
def test_a_link_that_cannot_be_followed_is_named_or_skipped_as_asked(folder, link, target, problem):
    (folder / link).symlink_to(target)
    with pytest.raises(ValueError, match=rf"1 unreadable file.*{link} \(it is a link to {problem}\)"):
        image_folder(folder, image_size=16)
    with pytest.warns(UserWarning, match=rf"skipped 1 unreadable file.*{link}"):
        assert len(image_folder(folder, image_size=16, unreadable="skip")) == 3


def test_links_that_lead_to_one_another_end(folder):
    (folder / "cat" / "dogs").symlink_to(folder / "dog")
    (folder / "dog" / "cats").symlink_to(folder / "cat")
    with pytest.raises(ValueError, match=r"2 unreadable file.* a folder that it is in itself"):
        image_folder(folder, image_size=16)


@pytest.mark.parametrize(("target", "problem"), [("unmounted", "which is not there"), (".", "a folder that it is in itself")])
def test_a_class_that_is_a_link_to_nothing_is_never_left_out(folder, target, problem):
    (folder / "horse").symlink_to(target)
    for unreadable in ("raise", "skip"):
        with pytest.raises(ValueError, match=rf"the class .*horse cannot be read: it is a link to .*{problem}.*remove it"):
            image_folder(folder, image_size=16, unreadable=unreadable)


def test_links_to_what_would_not_be_read_anyway_do_no_harm(folder):
    for name in ("labels.csv", "loose.png", ".cache", "cat/notes.txt", "cat/.hidden.png", "dog/README"):
        (folder / name).symlink_to("nowhere")
    assert len(image_folder(folder, image_size=16)) == 3


def test_splits_are_known_also_where_one_is_a_link_to_nothing(folder):
    shutil.copytree(folder / "cat", folder / "all" / "train" / "cat")
    (folder / "all" / "val").symlink_to("unmounted")
    with pytest.raises(ValueError, match=r"parts of the data and no classes; pass one .* e\.g\. .*all.train$"):
        image_folder(folder / "all", image_size=16)


def bytes_path(folder, name):
    return os.fsdecode(os.fsencode(folder) + b"/" + name)


def test_a_class_whose_name_is_not_utf8_is_named_by_its_bytes(folder):
    os.rename(folder / "dog", bytes_path(folder, b"caf\xe9"))
    with pytest.raises(ValueError, match=r"the class folders b'caf\\xe9' in .* are not UTF-8.*rename them") as raised:
        image_folder(folder, image_size=16)
    str(raised.value).encode("utf-8")  # and so it can be printed


def test_other_names_may_be_any_bytes_and_can_be_printed(folder):
    (folder / "cat" / "1.jpg").rename(bytes_path(folder / "cat", b"\xff.jpg"))
    assert len(image_folder(folder, image_size=16)) == 3
    with open(bytes_path(folder / "cat", b"\xfe.png"), "wb") as file:
        file.write(b"nothing")
    with pytest.raises(ValueError, match=r"the first is b'.*\\xfe\.png'") as raised:
        image_folder(folder, image_size=16)
    str(raised.value).encode("utf-8")


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


@pytest.mark.parametrize(("arguments", "problem"), [
    ((torch.rand(4, 3, 8, 8), torch.zeros(4).long()), r"images are uint8 \[N, 3, H, W\], from 0 to 255, not torch.float32"),
    ((torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4).long()), r"not torch.uint8 \[4, 8, 8, 3\]"),
    ((torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(3).long()), "got 4 images and 3 labels"),
    ((torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 1])), "from 0 to 1; these go from 0 to 2"),
    ((torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4)), "labels are whole numbers, not torch.float32")])
def test_images_and_labels_that_do_not_fit_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        ImageSet(*arguments, ("a", "b"))


@pytest.mark.parametrize("splits", [("seg_train", "seg_test"), ("train_set", "test_set"), ("train-2", "val2017")])
def test_splits_are_known_by_a_part_of_their_name(folder, splits):
    for split in splits:
        shutil.copytree(folder / "cat", folder / "all" / split / "cat")
        shutil.copytree(folder / "dog", folder / "all" / split / "dog")
    with pytest.raises(ValueError, match="no classes"):
        image_folder(folder / "all", image_size=16)


def test_a_folder_around_the_classes_is_not_taken_for_a_class(folder, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, whole / "images")
    with pytest.raises(ValueError, match=r"one subfolder, images, which has the subfolders .*cat.*dog.*; if these are"):
        image_folder(whole, image_size=16)


def test_images_beside_the_class_folders_are_counted_in_a_warning(folder):
    colour_image().save(folder / "loose.png")
    with pytest.warns(UserWarning, match=r"left out 1 image\(s\) .* in no class's folder: loose.png"):
        image_folder(folder, image_size=16)
