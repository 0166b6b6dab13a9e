"""Features: what a layer passes on, and a head that trains on what its frozen backbone passes on."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet18

from layerlr_helpers import (
    LayerGroup,
    PlateauUnfreezing,
    ProgressiveUnfreezing,
    UnfreezePlan,
    cache_features,
    fit,
    head_module,
    layer_features,
    layer_groups,
    load_resnet18,
)
from layerlr_helpers.features import cached_head
from layerlr_helpers.minilm import load_minilm
from layerlr_helpers.texts import text_set
from tests.runs import model_state, same


@pytest.fixture
def digits(small_digits):
    return small_digits.subset(range(24))


class Augmented(Dataset):
    """Examples that are different each time, from torch's global generator."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.randn(6), 0


def new_net():
    torch.manual_seed(0)
    return load_resnet18("glyphs", num_classes=10)


def freeze_all_but_head(groups):
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))
    unfreezing.apply(0)
    return unfreezing


class Small(nn.Module):
    """A backbone with dropout and BatchNorm, and a head; what comes after the head is to be chosen."""

    def __init__(self, after=None, calls=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(5, 3)
        self.after, self.calls = after or (lambda logits: logits), calls

    def forward(self, x):
        features = self.body(x)
        logits = [self.head(features) for _ in range(self.calls)]
        return self.after(logits[0])


def frozen_small(**options):
    torch.manual_seed(0)
    model = Small(**options)
    groups = layer_groups(model)
    freeze_all_but_head(groups)
    return model, groups


def small_data(n=7):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.arange(n) % 3)


@pytest.mark.slow
def test_head_trained_on_cached_features_is_the_head_trained_through_the_model(digits):
    def loader(data):
        return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))

    through, cached = new_net(), new_net()
    groups = layer_groups(through)
    unfreezing = freeze_all_but_head(groups)
    long = fit(through, torch.optim.AdamW(through.parameters(), 3e-3), loader(digits), epochs=3, unfreezing=unfreezing)

    groups = layer_groups(cached)
    freeze_all_but_head(groups)
    features = cache_features(cached, digits, groups, batch_size=10)
    head = head_module(groups)
    assert head is cached.fc
    short = fit(head, torch.optim.AdamW(head.parameters(), 3e-3), loader(features), epochs=3)

    torch.testing.assert_close(cached.fc.weight, through.fc.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached.fc.bias, through.fc.bias, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cached.fc.weight, new_net().fc.weight, atol=1e-3)
    assert [row["loss"] for row in short.rows] == pytest.approx([row["loss"] for row in long.rows], rel=1e-3)


def test_features_are_the_inputs_of_the_head_in_the_order_of_the_data(digits):
    model = new_net()
    groups = layer_groups(model)
    freeze_all_but_head(groups)
    features, labels = cache_features(model, digits, batch_size=7).tensors
    assert features.shape == (24, 512)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(labels, digits.labels)
    images = torch.stack([digits[i][0] for i in range(24)])
    torch.testing.assert_close(model.fc(features), model.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model, groups = frozen_small()
    model.train()
    model.body[1].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = model_state(model)
    cache_features(model, small_data(), groups, batch_size=3)
    assert same(before, model_state(model))


def test_the_backbone_runs_in_eval_mode_whatever_the_mode_of_the_model():
    model, groups = frozen_small()
    quiet = cache_features(model.eval(), small_data(), groups).tensors[0]
    loud = cache_features(model.train(), small_data(), groups, batch_size=2).tensors[0]
    torch.testing.assert_close(loud, quiet)


def test_inputs_may_be_a_dictionary():
    class Named(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return {"x": small_data(5)[i][0]}, i % 3

    model, groups = frozen_small()
    named, plain = (cache_features(model, data, groups).tensors[0] for data in (Named(), small_data(5)))
    assert torch.equal(named, plain)


def test_a_trainable_backbone_is_named(digits):
    model, groups = frozen_small()
    model.body[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters of the backbone are still trainable.*body\.1\.weight"):
        cache_features(model, small_data(), groups)
    with pytest.raises(ValueError, match=r"60 parameters .*conv1\.weight.*UnfreezePlan\(\{'head': 0\}\)"):
        cache_features(load_resnet18("glyphs"), digits)


def test_a_head_that_shares_weights_with_the_backbone_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(6, 6), nn.Linear(6, 6)  # in this order the shared one is the head's
            self.body.weight = self.head.weight

        def forward(self, x):
            return self.head(self.body(x))

    model = Tied()
    model.body.requires_grad_(False)
    with pytest.raises(ValueError, match=r"shares body\.weight with the backbone"):
        cache_features(model, small_data())


def test_a_head_of_several_modules_or_a_part_of_one_is_refused():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    with pytest.raises(ValueError, match="has 2 modules"):
        cache_features(model, small_data())
    model, _ = frozen_small()
    with pytest.raises(ValueError, match="only a part of its module"):
        cache_features(model, small_data(), layer_groups(model, granularity="tensor"))


@pytest.mark.parametrize(("depths", "message"), [((1, 0, 0), "has 2 heads (a, b)"), ((3, 2, 1), "has 0 heads (none)")])
def test_no_head_or_several_of_them_are_refused_with_the_names_of_the_groups(depths, message):
    model = nn.ModuleDict({"body": nn.Linear(6, 5), "a": nn.Linear(5, 3), "b": nn.Linear(5, 3)})
    groups = [LayerGroup(name, dict(module.named_parameters(prefix=name)), {name: module}, depth, model=model)
              for (name, module), depth in zip(model.items(), depths, strict=True)]
    with pytest.raises(ValueError, match=rf"{re.escape(message)}.*the groups are body, a, b"):
        head_module(groups)
    assert cached_head(model, groups, small_data(), ProgressiveUnfreezing(groups, UnfreezePlan({"b": 0}))) is None


def test_something_after_the_head_or_a_head_that_runs_twice_is_refused():
    for after in (lambda logits: logits.softmax(1), lambda logits: (logits, logits), lambda logits: logits[:, :2]):
        model, groups = frozen_small(after=after)
        with pytest.raises(ValueError, match="not the head's output"):
            cache_features(model, small_data(), groups)
        assert not model.head._forward_hooks
    model, groups = frozen_small(calls=2)
    with pytest.raises(ValueError, match="ran 2 times"):
        cache_features(model, small_data(), groups)


def test_random_augmentation_and_empty_data_are_refused():
    model, groups = frozen_small()
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match="example 0 differs from itself"):
        cache_features(model, Augmented(), groups)
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ValueError, match="no example"):
        cache_features(model, small_data(0), groups)


# --- cached_head ------------------------------------------------------------------------------------------------------

def frozen_net(dropout=0.0, **options):
    model, groups = frozen_small(**options)
    model.body[3].p = dropout
    return model, groups


def test_a_head_that_trains_alone_on_a_deterministic_backbone_is_given_with_its_features():
    model, groups = frozen_net()
    generator = torch.get_rng_state()
    head, features = cached_head(model, groups, small_data(), ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0})))
    assert head is model.head
    assert all(map(torch.equal, features.tensors, cache_features(model, small_data(), groups).tensors))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("unfreezing", [
    lambda groups: None,
    lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0, "stem": 9})),
    lambda groups: ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}), batch_norm="statistics"),
    lambda groups: PlateauUnfreezing(groups),
], ids=["none", "later", "statistics", "plateau"])
def test_there_are_no_features_for_a_head_that_does_not_train_alone(unfreezing):
    model, groups = frozen_net()
    assert cached_head(model, groups, small_data(), unfreezing(groups)) is None


@pytest.mark.parametrize(("net", "data"), [({"dropout": 0.5}, small_data()), ({"calls": 2}, small_data()), ({}, Augmented()),
                                           ({"after": lambda logits: logits * 2}, small_data())],
                         ids=["dropout", "two calls", "augmentation", "something after the head"])
def test_there_are_no_features_where_the_backbone_or_the_data_are_random_or_the_head_is_not_the_end(net, data):
    model, groups = frozen_net(**net)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"head": 0}))
    assert cached_head(model, groups, data, unfreezing) is None


# --- layer_features -----------------------------------------------------------------------------------------------------

def images(n=5, size=32):
    return TensorDataset(torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 2)


def test_features_of_a_resnet_are_one_row_an_image_and_one_column_a_channel_in_the_order_of_the_layers():
    model, data = resnet18(weights=None).eval(), images()
    groups = layer_groups(model, data[0][0][None])
    features = layer_features(model, data, groups, batch_size=2)
    assert {name: values.shape for name, values in features.items()} == {
        "stem": (5, 64), "layer1": (5, 64), "layer2": (5, 128), "layer3": (5, 256), "layer4": (5, 512), "head": (5, 1000)}
    assert list(features) == [group.name for group in groups]
    assert all(values.dtype == np.float32 for values in features.values())
    with torch.no_grad():
        x = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(data.tensors[0])))))
        np.testing.assert_allclose(features["layer1"], x.mean((2, 3)).numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(features["head"], model(data.tensors[0]).numpy(), rtol=1e-3, atol=1e-5)


def test_the_model_and_the_random_numbers_are_left_alone():
    model, data = resnet18(weights=None).train(), images(2)
    model.layer3.eval()
    groups = layer_groups(model, data[0][0][None])
    before = model_state(model)
    layer_features(model, data, groups)
    assert same(before, model_state(model))
    with pytest.raises(RuntimeError):
        layer_features(model, TensorDataset(torch.ones(2, 4), torch.ones(2)), groups)
    assert same(before, model_state(model))


def test_tokens_are_averaged_and_channels_kept():
    model = nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), nn.Linear(6, 3))
    tokens = torch.randn(5, 7, 4)
    groups = layer_groups(model, tokens)
    features = layer_features(model, TensorDataset(tokens, torch.zeros(5)), groups)
    assert [values.shape for values in features.values()] == [(5, 6), (5, 6), (5, 3)]
    np.testing.assert_allclose(features["stem"], model[0](tokens).mean(1).detach().numpy(), rtol=1e-4, atol=1e-6)


def test_padding_does_not_change_what_is_known_of_a_text():
    texts = ["Sort an array.", "Return the eigenvalues of a symmetric matrix, in ascending order."]
    model = load_minilm(num_classes=2)
    groups = layer_groups(model)
    together = layer_features(model, text_set(texts, [0, 1], "ab"), groups)
    for row, text in enumerate(texts):
        alone = layer_features(model, text_set([text], [row], "ab"), groups)
        assert list(alone) == [group.name for group in groups]
        for name, values in alone.items():
            np.testing.assert_allclose(values[0], together[name][row], atol=1e-4)


def test_a_text_whose_tokens_are_all_masked_has_features_of_zero_and_not_no_number():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.fc = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            return self.fc(self.embedding(input_ids).mean(1))

    model, ids = Tokens(), torch.tensor([[1, 2, 3]])
    groups = layer_groups(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    data = [({"input_ids": ids[0], "attention_mask": torch.tensor(mask)}, 0) for mask in ([1, 1, 0], [0, 0, 0])]
    features = layer_features(model, data, groups)["stem"]
    np.testing.assert_allclose(features, [model.embedding(ids)[0, :2].mean(0).detach().numpy(), np.zeros(4)], atol=1e-6)


def test_modules_that_return_several_tensors_give_the_first():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1])

    model, data = Recurrent(), TensorDataset(torch.randn(5, 7, 4), torch.zeros(5))
    features = layer_features(model, data, layer_groups(model, granularity="child"))
    assert {name: values.shape for name, values in features.items()} == {"rnn": (5, 6), "fc": (5, 2)}


def test_a_group_of_which_no_module_runs_is_left_out():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.idle, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x + self.shift)

    model = Shifted()
    with pytest.warns(UserWarning, match="idle"):
        groups = layer_groups(model, torch.zeros(1, 4), granularity="child")
    assert [group.name for group in groups] == ["shift", "idle (unused)", "fc"]
    assert list(layer_features(model, TensorDataset(torch.ones(3, 4), torch.ones(3)), groups)) == ["fc"]
