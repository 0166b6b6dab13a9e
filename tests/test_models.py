import hashlib
import os
from http.client import IncompleteRead
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import get_model, resnet18

from layerlr_helpers import evaluate, layer_groups, load_resnet18, models, new_head, printed_glyphs
from layerlr_helpers.course.pretrain import UNSEEN_SEED
from layerlr_helpers.course.scenes import GLYPHS

IMAGENET_FILE = "resnet18-f37072fd.pth"


@pytest.mark.slow
def test_the_glyph_weights_read_unseen_letters():
    unseen = printed_glyphs(500, seed=UNSEEN_SEED)
    assert evaluate(load_resnet18(), DataLoader(unseen, 250))["accuracy"] >= 0.97


@pytest.mark.parametrize(("weights", "classes"), [("glyphs", len(GLYPHS)), (None, 1000)])
def test_without_num_classes_the_head_stays(weights, classes):
    model = load_resnet18(weights)
    assert model.fc.out_features == classes
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())


def test_num_classes_makes_a_new_head_and_leaves_the_rest():
    before, after = load_resnet18().state_dict(), load_resnet18(num_classes=7).state_dict()
    assert after["fc.weight"].shape == (7, 512)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("fc."))


def test_random_weights_come_from_torchs_generator():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        first = load_resnet18(None, num_classes=3).state_dict()
        torch.manual_seed(4)
        again = load_resnet18(None, num_classes=3).state_dict()
        other = load_resnet18(None, num_classes=3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"weights": "imagnet"}, "unknown weights 'imagnet'; known are 'glyphs', 'imagenet', None"),
    ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
])
def test_arguments_that_make_no_network_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        load_resnet18(**arguments)


def load_small(weights):
    """A small network of four layer groups; with weights, all of them are 1."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in model.parameters() if weights else ():
        nn.init.ones_(parameter)
    return model


def test_prepared_models_of_one_seed_have_the_same_new_head_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    first, again, random, other = (models.prepared_model(weights, 10, seed, load=load_small)[-1].weight
                                   for weights, seed in (("ones", 3), ("ones", 3), (None, 3), ("ones", 4)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert torch.equal(first, random)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("keep", range(4))
def test_a_prepared_model_keeps_the_weights_of_the_first_layers_and_has_random_ones_between_them_and_the_head(keep):
    random = models.prepared_model(None, None, seed=3, load=load_small)
    model = models.prepared_model("ones", None, seed=3, keep=keep, load=load_small)
    for place, layer in enumerate((0, 2, 4, 6)):
        kept = place < keep or layer == 6
        assert torch.equal(model[layer].weight, torch.ones_like(model[layer].weight) if kept else random[layer].weight)


# The checkpoint of this package


@pytest.fixture(scope="module")
def checkpoint_bytes():
    return models.checkpoint_path().read_bytes()


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """Load the glyph weights from a file with the given bytes."""
    def load(content):
        (tmp_path / models.CHECKPOINT).write_bytes(content)
        monkeypatch.setattr(models, "checkpoint_path", lambda: tmp_path / models.CHECKPOINT)
        return load_resnet18()

    return load


def test_the_checkpoint_is_small_and_in_half_precision(checkpoint_bytes, loads):
    assert len(checkpoint_bytes) < 23e6
    stored = torch.load(models.checkpoint_path(), weights_only=True)
    loaded = loads(checkpoint_bytes).state_dict()
    assert stored["fc.weight"].dtype == torch.float16
    assert all(torch.equal(loaded[name], value.to(loaded[name].dtype)) for name, value in stored.items())


@pytest.mark.parametrize("size", [0, 1000, 22_000_000])
def test_a_truncated_checkpoint_is_refused(checkpoint_bytes, loads, size):
    with pytest.raises(ValueError, match=rf"damaged or not the checkpoint of this version: {size:,} bytes.*git checkout"):
        loads(checkpoint_bytes[:size])


@given(content=st.binary(min_size=1, max_size=1000), place=st.integers(0), flip=st.integers(1, 255))
def test_a_checkpoint_with_one_other_byte_is_refused(tmp_path_factory, content, place, flip):
    file = tmp_path_factory.getbasetemp() / "flipped.pt"
    flipped = bytearray(content)
    flipped[place % len(content)] ^= flip
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped\.pt is damaged"):
        models.read_checkpoint(file, hashlib.sha256(content).hexdigest())


def test_a_missing_checkpoint_says_where_it_should_be_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(models, "CHECKPOINT", "lost.pt")
    with pytest.raises(FileNotFoundError, match=r"no lost\.pt in .*data or .*data; restore it with git checkout"):
        load_resnet18()


# ImageNet's weights, through torchvision's own loader and its cache


@pytest.fixture(scope="module")
def fake_home(tmp_path_factory):
    """A torch home with random weights in the place of torchvision's."""
    home = tmp_path_factory.mktemp("torch_home")
    file = home / "hub" / "checkpoints" / IMAGENET_FILE
    file.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), file)
    return home


@pytest.fixture(params=["fake", *filter(None, [os.environ.get("LAYERLR_TORCH_HOME")])])
def torch_home(request, fake_home, monkeypatch):
    home = fake_home if request.param == "fake" else request.param
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_come_from_torchvisions_cache(torch_home):
    model = load_resnet18("imagenet")
    assert model.fc.out_features == 1000
    assert not model.training
    stored = torch.load(f"{torch_home}/hub/checkpoints/{IMAGENET_FILE}", weights_only=True)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in ("conv1.weight", "fc.bias", "bn1.running_mean"))
    assert load_resnet18("imagenet", num_classes=6).fc.out_features == 6


@pytest.mark.parametrize("error", [URLError("no network"), TimeoutError("too slow"), IncompleteRead(b"")])
def test_no_network_is_an_error_that_says_what_to_do(empty_home, monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ConnectionError, match="could not be downloaded") as raised:
        load_resnet18("imagenet")
    for hint in (IMAGENET_FILE, str(empty_home), "weights='glyphs'"):
        assert hint in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"<html>log in first</html>", "truncated", "other net"])
def test_a_damaged_file_in_the_cache_is_named(empty_home, fake_home, content):
    file = empty_home / IMAGENET_FILE
    if content == "truncated":
        file.write_bytes((fake_home / "hub" / "checkpoints" / IMAGENET_FILE).read_bytes()[:-5000])
    elif content == "other net":
        torch.save(torch.nn.Linear(2, 2).state_dict(), file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){IMAGENET_FILE} are damaged .*delete this file"):
        load_resnet18("imagenet")


# A new head on any model

@pytest.mark.parametrize(("name", "head"), [
    ("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3"), *(
        pytest.param(*large, marks=pytest.mark.slow) for large in (
            ("vgg11", "classifier.6"), ("densenet121", "classifier"), ("convnext_tiny", "classifier.2"),
            ("vit_b_16", "heads.head")))])
def test_only_the_classifier_is_replaced(name, head):
    model = get_model(name).eval()
    before = model.state_dict()
    assert new_head(model, 7) is model
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{head}.weight", f"{head}.bias"]
    assert layer_groups(model)[-1].name == "head"
    size = 224 if name.startswith("vit") else 64
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 7)


def test_a_new_head_is_where_and_what_the_old_one_was():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False)
    model = nn.Sequential(*layers).double()
    new_head(model, 2, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert model[4].bias is None
    assert model[4].weight.dtype == torch.float64


def test_a_model_without_a_classifier_keeps_what_it_has():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(4, 3, 1))
    before = str(model)
    with pytest.raises(ValueError, match="has neither an nn\\.Linear nor an nn\\.Conv2d to replace"):
        new_head(model, 3, torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        new_head(model, 0)
    assert str(model) == before


class Small(nn.Module):
    """A body and classifiers in any attributes; ``forward`` says what becomes of them."""

    def __init__(self, forward, *, classes=3, **classifiers):
        super().__init__()
        for name, classifier in classifiers.items():  # defined first, run last
            setattr(self, name, classifier)
        self.body, self.num_classes, self._forward = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), classes, forward

    def forward(self, x):
        return self._forward(self, self.body(x))


X = torch.zeros(2, 4)


def state(model):
    """Which modules a model has, and what it says of itself."""
    return [*model.named_modules()], {name: value for name, value in vars(model).items() if isinstance(value, int)}


def test_the_classifier_is_what_runs_last_whatever_was_defined_last():
    model = Small(lambda m, x: m.classifier(m.neck(x)), classifier=nn.Linear(8, 3), neck=nn.Linear(8, 8))
    neck = model.neck
    assert new_head(model, 5, X)(X).shape == (2, 5)
    assert model.neck is neck
    assert model.classifier.out_features == 5


def test_several_classifiers_of_which_the_output_is_the_mean_are_all_replaced():
    model = Small(lambda m, x: (m.first(x) + m.second(x)) / 2, first=nn.Linear(8, 3), second=nn.Linear(8, 3))
    new_head(model, 5, X)
    assert model.first.out_features == model.second.out_features == 5
    assert model(X).shape == (2, 5)


def test_of_several_outputs_one_has_to_be_chosen():
    model = Small(lambda m, x: {"logits": m.classes(x), "boxes": m.boxes(x)}, classes=3, boxes=nn.Linear(8, 4))
    model.classes = nn.Linear(8, 3)
    before = state(model)
    with pytest.raises(ValueError, match=r"several outputs, from head\.\w+, head\.\w+; choose one .*head=…"):
        new_head(model, 5, X)
    assert state(model) == before
    boxes = model.boxes
    new_head(model, 5, X, head="classes")
    assert {name: tuple(output.shape) for name, output in model(X).items()} == {"logits": (2, 5), "boxes": (2, 4)}
    assert model.boxes is boxes


@pytest.mark.parametrize("head", [None, "body"])
def test_a_model_without_a_head_is_refused_and_stays_as_it_was(head):
    model = Small(lambda m, x: m.encoder(x[:, None]), encoder=nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False))
    before = state(model)
    message = "has no head of its own to replace" if head is None else "with 5 outputs in place of body.0, the model would fail"
    with pytest.raises(ValueError, match=message):
        new_head(model, 5, X, head=head)
    assert state(model) == before


@pytest.mark.parametrize("forward", [
    lambda m, x: m.fc(x) * m.scale,  # fails with more classes
    lambda m, x: m.fc(x).argmax(1),  # returns no scores
    lambda m, x: m.fc(x) @ m.mixing,  # is projected to three again
], ids=["fails", "no scores", "another number"])
def test_if_the_output_would_not_be_one_of_that_many_classes_the_old_layer_comes_back(forward):
    model = Small(forward, fc=nn.Linear(8, 3))
    model.register_buffer("scale", torch.ones(3))
    model.register_buffer("mixing", torch.ones(3, 3))
    before = state(model)
    with pytest.raises(ValueError, match=r"with 5 outputs in place of fc, .*replace the classifier by hand"):
        new_head(model, 5, X)
    assert state(model) == before


@pytest.mark.parametrize("name", ["num_classes", "num_labels"])
def test_the_model_its_parts_and_its_settings_know_the_new_number_of_classes(name):
    model = Small(lambda m, x: m.fc(x), fc=nn.Linear(8, 3))
    model.num_classes = None
    model.config = SimpleNamespace(**{name: 3, "hidden_size": 8})
    setattr(model, name, 3)
    setattr(model.body, name, 3)
    setattr(model.body[0], name, 8)  # the number of something else
    new_head(model, 5, X)
    assert [getattr(owner, name) for owner in (model, model.body, model.config, model.body[0])] == [5, 5, 5, 8]
    assert model.config.hidden_size == 8


def test_a_wrong_name_for_the_head_is_refused_with_the_modules_that_there_are():
    model = Small(lambda m, x: m.fc(x), fc=nn.Linear(8, 3))
    before = state(model)
    with pytest.raises(ValueError, match=r"no module matches 'head'; there are: fc, body, body\.0"):
        new_head(model, 5, X, head="head")
    assert state(model) == before
