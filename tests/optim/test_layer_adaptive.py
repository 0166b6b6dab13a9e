"""LayerAdaptiveLR against a reference written out by hand, and as an optimizer among torch's others."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from layerlr_helpers import (
    LayerAdaptiveLR,
    few_shot_split,
    fit,
    handwritten_digits,
    layer_decay,
    layer_groups,
    param_groups,
    uniform,
)
from layerlr_helpers.optim import DIRECTIONS, POOLS

SHAPES = [(4, 3), (3,), (), (2, 2, 2)]
DEFAULTS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "ratio_range": (0.0, math.inf)}


def gradients(seed=0, steps=6, scale=1.0):
    """For each step one gradient a tensor, with a drift beside the noise, so that ratios differ."""
    rng = np.random.default_rng(seed)
    return [[scale * (rng.normal(size=shape) + k) for k, shape in enumerate(SHAPES)] for _ in range(steps)]


def reference(start, grads, direction, pool, lr, betas, eps, weight_decay, ratio_range):
    """The rule in NumPy and double precision, written from its description: the weights after each step."""
    layers = [[i] for i in range(len(start))] if pool == "tensor" else [list(range(len(start)))]
    p = [np.array(x, dtype=np.float64) for x in start]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, g in enumerate(grads, start=1):
        for layer in layers:
            for i in layer:
                m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
                v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i] ** 2
            m_hat = {i: m[i] / (1 - betas[0] ** t) for i in layer}
            v_hat = {i: v[i] / (1 - betas[1] ** t) for i in layer}
            if direction == "adam_mini":
                mean = np.mean(np.concatenate([np.ravel(v_hat[i]) for i in layer]))
                v_hat = {i: np.full_like(v_hat[i], mean) for i in layer}
            u = {i: m_hat[i] / (np.sqrt(v_hat[i]) + eps) for i in layer}
            k = np.clip(np.mean(np.concatenate([np.ravel(np.abs(u[i])) for i in layer])), *ratio_range)
            for i in layer:
                p[i] = p[i] * (1 - lr * weight_decay) - lr * k * (m_hat[i] if direction == "momentum" else u[i])
    return p


def tensors(dtype=torch.float64, seed=1):
    rng = np.random.default_rng(seed)
    return [nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=dtype)) for shape in SHAPES]


def steps(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype)
        optimizer.step()


rules = pytest.mark.parametrize(("direction", "pool"), list(itertools.product(DIRECTIONS, POOLS)))


# --- the rule ---------------------------------------------------------------------------------------------------------

@rules
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-2, "lr": 0.3}, {"betas": (0.0, 0.0)},
    {"ratio_range": (0.6, 0.7)}, {"ratio_range": (0.0, 0.0), "weight_decay": 0.1},
], ids=str)
def test_the_weights_are_those_of_the_reference(direction, pool, options):
    params = tensors()
    expected = reference([p.detach().numpy() for p in params], gradients(), direction, pool, **(DEFAULTS | options))
    steps(LayerAdaptiveLR(params, **{"lr": 0.01, **options}, direction=direction, pool=pool), params, gradients())
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-12, atol=1e-14)


@rules
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_lower_precisions_come_close(direction, pool, dtype, tolerance):
    params = tensors(dtype)
    expected = reference([p.detach().double().numpy() for p in params], gradients(), direction, pool, **DEFAULTS)
    steps(LayerAdaptiveLR(params, lr=0.01, direction=direction, pool=pool), params, gradients())
    for p, e in zip(params, expected, strict=True):
        assert p.dtype == dtype
        np.testing.assert_allclose(p.detach().double().numpy(), e, rtol=tolerance, atol=tolerance)


@rules
def test_each_group_has_its_options(direction, pool):
    first, second = tensors(), tensors(seed=2)
    second_options = {"lr": 0.1, "ratio_range": (0.5, 0.6), "weight_decay": 0.2, "eps": 1e-3, "betas": (0.8, 0.9)}
    groups = [{"params": first}, {"params": second, "direction": direction, "pool": pool, **second_options}]
    optimizer = LayerAdaptiveLR(groups, lr=0.01)
    expected = [*reference([p.detach().numpy() for p in first], gradients(), "momentum", "tensor", **DEFAULTS),
                *reference([p.detach().numpy() for p in second], gradients(), direction, pool, **second_options)]
    steps(optimizer, [*first, *second], [[*step, *step] for step in gradients()])
    for p, e in zip([*first, *second], expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-12)


# --- what the ratio measures ------------------------------------------------------------------------------------------

def ratios(grads, betas=(0.9, 0.999), **options):
    """The ratio after each step on one tensor."""
    p = nn.Parameter(torch.zeros(grads[0].shape, dtype=grads[0].dtype))
    optimizer = LayerAdaptiveLR([p], lr=1.0, betas=betas, **options)
    recorded = []
    for g in grads:
        p.grad = g
        optimizer.step()
        recorded.append(next(iter(optimizer.layer_rates().values())))
    return recorded


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 1e3), st.sampled_from(["momentum", "adam"]))
def test_a_constant_gradient_has_a_ratio_of_one_from_the_first_step_on(size, direction):
    g = torch.full((5,), size) * torch.tensor([1, -1, 1, 1, -1])
    assert ratios([g] * 20, direction=direction) == pytest.approx([1.0] * 20, abs=2e-5)


def test_pure_noise_has_a_ratio_of_about_a_fifth():
    # After many steps m is normal with variance (1 - beta1) / (1 + beta1), so E|m| = 0.23 * 0.798 of a gradient's sd.
    generator = torch.Generator().manual_seed(0)
    recorded = ratios([torch.randn(2000, generator=generator) for _ in range(400)])
    expected = math.sqrt(0.1 / 1.9) * math.sqrt(2 / math.pi)
    assert np.mean(recorded[200:]) == pytest.approx(expected, rel=0.05)
    assert expected == pytest.approx(0.183, abs=0.001)


def test_more_signal_gives_a_higher_ratio():
    ends = []
    for signal in (0.0, 0.3, 1.0, 3.0):
        generator = torch.Generator().manual_seed(0)
        ends.append(np.mean(ratios([signal + torch.randn(500, generator=generator) for _ in range(150)])[100:]))
    assert ends == sorted(ends)
    assert ends[2] == pytest.approx(0.73, abs=0.05)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from(["momentum", "adam"]), st.sampled_from(POOLS))
def test_a_ratio_lies_between_zero_and_little_above_one(seed, direction, pool):
    params = tensors()
    optimizer = LayerAdaptiveLR(params, lr=1.0, direction=direction, pool=pool)
    steps(optimizer, params, gradients(seed, steps=8))
    # By Cauchy and Schwarz |m̂| / sqrt(v̂) is largest for a gradient that grows, and little above 1 for a short run.
    assert all(0 <= rate <= 1.6 for rate in optimizer.layer_rates().values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_only_the_momentum_direction_is_proportional_to_the_gradient(direction, scale):
    moves = []
    for factor in (1.0, scale):
        params = tensors()
        before = [p.detach().clone() for p in params]
        steps(LayerAdaptiveLR(params, lr=0.01, eps=0, direction=direction), params, gradients(scale=factor))
        moves.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    for plain, scaled in zip(*moves, strict=True):
        torch.testing.assert_close(scaled, plain * (scale if direction == "momentum" else 1.0), rtol=1e-8, atol=1e-12)


def test_the_adam_direction_held_at_a_ratio_of_one_is_adamw():
    ours, theirs = tensors(), tensors()
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    steps(LayerAdaptiveLR(ours, direction="adam", ratio_range=(1, 1), **options), ours, gradients())
    steps(torch.optim.AdamW(theirs, **options), theirs, gradients())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@rules
def test_weight_decay_is_decoupled_and_shrinks_as_in_adamw(direction, pool):
    ours, theirs = tensors(), tensors()
    zeros = [[np.zeros(shape) for shape in SHAPES]] * 3
    steps(LayerAdaptiveLR(ours, lr=0.1, weight_decay=0.5, direction=direction, pool=pool), ours, zeros)
    steps(torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.5), theirs, zeros)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@rules
def test_maximize_is_the_step_of_the_opposite_gradient(direction, pool):
    ours, theirs = tensors(), tensors()
    opposite = [[-g for g in step] for step in gradients()]
    steps(LayerAdaptiveLR(ours, direction=direction, pool=pool, maximize=True, weight_decay=0.1), ours, gradients())
    steps(LayerAdaptiveLR(theirs, direction=direction, pool=pool, weight_decay=0.1), theirs, opposite)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adam_mini_stores_one_number_a_tensor_in_place_of_v():
    params = tensors()
    optimizer = LayerAdaptiveLR(params, direction="adam_mini")
    steps(optimizer, params, gradients(steps=1))
    assert all(optimizer.state[p]["exp_avg_sq"].numel() == 1 for p in params)


# --- as an optimizer --------------------------------------------------------------------------------------------------

@rules
def test_state_dicts_resume_bit_for_bit(direction, pool):
    options = {"lr": 0.05, "weight_decay": 0.1, "direction": direction, "pool": pool}
    whole, first = tensors(torch.float32), tensors(torch.float32)
    steps(LayerAdaptiveLR(whole, **options), whole, gradients(steps=8))
    optimizer = LayerAdaptiveLR(first, **options)
    steps(optimizer, first, gradients(steps=8)[:3])
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = LayerAdaptiveLR(second, lr=9.0)  # everything else comes from the state
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.layer_rates() == optimizer.layer_rates()
    steps(resumed, second, gradients(steps=8)[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_as_the_original_does(copied):
    params = tensors()
    optimizer = LayerAdaptiveLR(params, lr=0.05)
    steps(optimizer, params, gradients(steps=2))
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    steps(optimizer, params, gradients(steps=4)[2:])
    steps(twin, twins, gradients(steps=4)[2:])
    assert all(torch.equal(a, b) and a is not b for a, b in zip(params, twins, strict=True))


def test_groups_and_their_parameters_stay_in_the_order_given():
    params = [nn.Parameter(torch.ones(i + 1)) for i in range(20)]
    groups = [{"params": params[i:i + 2], "name": str(i)} for i in range(18, -1, -2)]
    optimizer = LayerAdaptiveLR(groups)
    steps(optimizer, params, [[np.ones(p.shape) for p in params]] * 2)
    assert [group["name"] for group in optimizer.param_groups] == [str(i) for i in range(18, -1, -2)]
    given = [p for i in range(18, -1, -2) for p in params[i:i + 2]]
    assert all(a is b for a, b in zip(given, (p for g in optimizer.param_groups for p in g["params"]), strict=True))


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    p = nn.Parameter(torch.ones(3))
    optimizer = LayerAdaptiveLR([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    assert closure().item() < 3.0
    assert optimizer.step() is None


@pytest.mark.parametrize("pool", POOLS)
def test_a_parameter_without_gradient_stays_as_it_is_and_counts_for_nothing(pool):
    params, others = tensors(), tensors()
    idle = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = LayerAdaptiveLR([idle, *params], weight_decay=0.5, pool=pool)
    steps(optimizer, [idle, *params], [[None, *step] for step in gradients()])
    steps(LayerAdaptiveLR(others, weight_decay=0.5, pool=pool), others, gradients())
    assert torch.equal(idle, torch.ones(4, dtype=torch.float64))
    assert idle not in optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@rules
def test_empty_tensors_and_empty_groups_disturb_nothing(direction, pool):
    params, others = tensors(), tensors()
    empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))
    optimizer = LayerAdaptiveLR([{"params": []}, {"params": [empty, *params]}], direction=direction, pool=pool)
    steps(optimizer, [empty, *params], [[np.empty((0, 3)), *step] for step in gradients()])
    steps(LayerAdaptiveLR(others, direction=direction, pool=pool), others, gradients())
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_gradient_of_zero_moves_nothing_and_makes_no_nan():
    for direction in DIRECTIONS:
        params = tensors()
        before = [p.detach().clone() for p in params]
        steps(LayerAdaptiveLR(params, direction=direction), params, [[np.zeros(shape) for shape in SHAPES]] * 3)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_tensor_rate_is_the_same_as_a_number():
    params, others = tensors(), tensors()
    lr = torch.tensor(0.5, dtype=torch.float64)
    steps(LayerAdaptiveLR(params, lr=lr, weight_decay=0.1), params, gradients())
    steps(LayerAdaptiveLR(others, lr=0.5, weight_decay=0.1), others, gradients())
    assert lr == 0.5
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_sparse_gradients_are_refused_in_so_many_words():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="LayerAdaptiveLR does not support sparse gradients"):
        LayerAdaptiveLR([embedding.weight]).step()
    assert torch.equal(embedding.weight, before)


BAD = [({"lr": -1.0}, "Invalid learning rate: -1.0"), ({"lr": math.nan}, "Invalid learning rate"),
       ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
       ({"eps": -1e-8}, "Invalid epsilon value"), ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
       ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1"), ({"weight_decay": -1.0}, "Invalid weight_decay value"),
       ({"direction": "sgd"}, "Invalid direction: 'sgd'; known are 'momentum', 'adam', 'adam_mini'"),
       ({"pool": "layer"}, "Invalid pool: 'layer'; known are 'tensor', 'group'"),
       ({"ratio_range": (2.0, 1.0)}, "Invalid ratio_range"), ({"ratio_range": (-1.0, 1.0)}, "Invalid ratio_range"),
       ({"ratio_range": (math.nan, 1.0)}, "Invalid ratio_range")]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value))
def test_invalid_hyper_parameters_are_refused_for_all_for_a_group_and_for_a_group_added_later(options, message):
    params, more = tensors(), tensors(seed=2)
    with pytest.raises(ValueError, match=message):
        LayerAdaptiveLR(params, **options)
    with pytest.raises(ValueError, match=message):
        LayerAdaptiveLR([{"params": params, **options}])
    optimizer = LayerAdaptiveLR(params)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": more, **options})
    assert all(a.keys() == b.keys() and all(a[k] is b[k] for k in a)
               for a, b in zip(before, optimizer.param_groups, strict=True))


def test_a_bad_default_is_refused_also_where_every_group_has_its_own_value():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        LayerAdaptiveLR([{"params": tensors(), "lr": 0.1}], lr=-1.0)


def test_a_group_added_later_takes_the_defaults_and_trains():
    params, more = tensors(), tensors(seed=2)
    optimizer = LayerAdaptiveLR(params, lr=0.1, direction="adam")
    optimizer.add_param_group({"params": more})
    assert optimizer.param_groups[1]["direction"] == "adam"
    before = [p.detach().clone() for p in more]
    steps(optimizer, [*params, *more], [[*step, *step] for step in gradients(steps=1)])
    assert not any(torch.equal(p, b) for p, b in zip(more, before, strict=True))


# --- what each layer did ----------------------------------------------------------------------------------------------

def test_layer_rates_have_a_name_for_every_tensor_or_for_every_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    groups = param_groups(layer_groups(model), uniform(0.1))
    for pool, names in (("tensor", ["stem/0", "stem/1", "head/0"]), ("group", ["stem", "head"])):
        optimizer = LayerAdaptiveLR(copy.deepcopy(groups), pool=pool)
        assert optimizer.layer_rates() == {}  # nothing has stepped yet
        params = [p for group in optimizer.param_groups for p in group["params"]]
        steps(optimizer, params, [[np.ones(p.shape) for p in params]])
        assert optimizer.layer_rates() == pytest.approx(dict.fromkeys(names, 0.1))


def test_layer_rates_have_the_parameters_names_where_the_optimizer_was_given_them():
    model = nn.Linear(3, 2)
    optimizer = LayerAdaptiveLR(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert list(optimizer.layer_rates()) == ["weight", "bias"]


def test_layer_rates_are_those_of_the_last_step_also_after_the_schedule_moved_on():
    params = tensors()
    optimizer = LayerAdaptiveLR(params, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps(optimizer, params, gradients(steps=1))
    before = optimizer.layer_rates()
    schedule.step()
    assert optimizer.layer_rates() == before
    assert all(rate == pytest.approx(0.1, rel=1e-6) for rate in before.values())  # the first step's ratio is 1


def test_the_ratio_range_holds_the_rates():
    params = tensors()
    optimizer = LayerAdaptiveLR([{"params": params[:2], "ratio_range": (0.0, 0.2)},
                                 {"params": params[2:], "ratio_range": (3.0, 5.0)}], lr=0.1)
    steps(optimizer, params, gradients())
    low, high = list(optimizer.layer_rates().values())[:2], list(optimizer.layer_rates().values())[2:]
    assert all(0 < rate <= 0.02 + 1e-9 for rate in low)
    assert high == pytest.approx([0.3, 0.3])


@pytest.fixture(scope="module")
def digits():
    return few_shot_split(handwritten_digits(image_size=32), 3, val_per_class=1, seed=0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "lr"), [("momentum", 0.03), ("adam", 1e-3), ("adam_mini", 1e-3)])
def test_it_trains_a_resnet18_on_real_digits(direction, lr, digits):
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    groups = layer_groups(model, digits[0][0][None])
    optimizer = LayerAdaptiveLR(param_groups(groups, layer_decay(lr, 0.9)), direction=direction, pool="group")
    history = fit(model, optimizer, DataLoader(digits, 15), steps=8, progress=False).to_frame()
    assert history.loss[-2:].mean() < 0.6 * history.loss[:2].mean()
    assert list(optimizer.layer_rates()) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
