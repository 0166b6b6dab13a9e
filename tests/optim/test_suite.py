"""LayerAdaptiveLR under the checks that torch runs its own optimizers through, with torch's own OptimizerInfo.

Each check runs for every direction and pool, and for every implementation. Two checks of torch's suite are left out. One
wants a complex tensor to step like its real and imaginary parts as two tensors; but a mean over a tensor differs from those
over its parts. Here a complex tensor steps like its view as a real one. The other loads state dicts of earlier versions, and
there are none.
"""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_error_inputs_func_adam,
)
from torch.testing._internal.common_utils import TestCase

from layerlr_helpers import LayerAdaptiveLR
from layerlr_helpers.optim import DIRECTIONS, POOLS

same = TestCase().assertEqual  # torch's comparison, with its tolerances for each type
VARIANTS = list(itertools.product(DIRECTIONS, POOLS))


def inputs(device="cpu", dtype=None):
    options = {"default": {}, "lr": {"lr": 0.01}, "weight decay": {"weight_decay": 0.1},
               "maximize": {"weight_decay": 0.1, "maximize": True}, "range": {"ratio_range": (0.2, 0.6)}}
    if dtype == torch.float16:  # 1e-8 is nothing in half precision, and 0 / 0 no number
        options = {name: {**kwargs, "eps": 0.1} for name, kwargs in options.items()}
    return [OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in options.items()]


def info_of(direction, pool):
    class Variant(LayerAdaptiveLR):
        def __init__(self, params, **kwargs):
            super().__init__(params, **{"direction": direction, "pool": pool, **kwargs})

    return OptimizerInfo(
        Variant, optim_inputs_func=inputs, optim_error_inputs_func=optim_error_inputs_func_adam,
        supported_impls=("foreach", "differentiable", "fused"), supports_fused_on=("cpu", "cuda"), has_capturable_arg=True,
        scheduler_inputs=([lambda o: StepLR(o, gamma=0.9, step_size=10)],
                          [lambda o: LinearLR(o, start_factor=0.4, total_iters=4), lambda o: ReduceLROnPlateau(o)],
                          [lambda o: ExponentialLR(o, gamma=0.99)]))


@pytest.fixture(params=VARIANTS, ids="-".join)
def info(request):
    return info_of(*request.param)


def all_inputs(info, skip=("differentiable",)):
    return _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info, skip=skip)


def pair(contiguous=True):
    """A weight and a bias, contiguous or cut out of larger tensors, and what makes a loss and its gradients of them."""
    weight, bias = ((torch.randn(10, 5), torch.randn(10)) if contiguous
                    else (torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]))
    weight, bias, x = Parameter(weight), Parameter(bias), torch.randn(5)

    def loss(weight=weight, bias=bias):
        for p in (weight, bias):
            p.grad = None
        value = (weight.mv(x) + bias).pow(2).sum()
        value.backward()
        return value

    return weight, bias, loss


def goes_the_right_way(first, last, kwargs):
    return last > first if kwargs.get("maximize") else last < first


# --- the update -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_loss_goes_the_right_way_in_every_implementation_with_and_without_schedules(info, contiguous):
    for constructors, given in itertools.product([(), *info.scheduler_inputs], range(len(all_inputs(info)))):
        kwargs = all_inputs(info)[given].kwargs
        weight, bias, loss = pair(contiguous)
        optimizer = info.optim_cls([weight, bias], **kwargs)
        schedulers = [make(optimizer) for make in constructors]
        first = loss().item()
        for _ in range(10):
            value = optimizer.step(loss)
            for scheduler in schedulers:
                scheduler.step(*([value.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert goes_the_right_way(first, loss().item(), kwargs)


def test_groups_have_options_of_their_own(info):
    for given in all_inputs(info):
        weight, bias, loss = pair()
        still = Parameter(torch.randn(2))
        before, first = still.detach().clone(), loss().item()
        optimizer = info.optim_cls([{"params": [weight], "lr": 1e-3, **given.kwargs},
                                    {"params": [bias], "lr": 1e-3, **given.kwargs, "weight_decay": 0.0},
                                    {"params": [still]}], lr=1e-28)
        for _ in range(10):
            value = loss()
            still.grad = torch.rand_like(still)
            optimizer.step()
        assert goes_the_right_way(first, value.item(), given.kwargs)
        same(still, before)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_in_a_tensor_is_as_good_as_a_number(info, shape):
    for given in all_inputs(info):
        weight, bias, loss = pair()
        others = [Parameter(p.detach().clone()) for p in (weight, bias)]
        number = info.optim_cls([weight, bias], **{**given.kwargs, "lr": 1e-3})
        options = {**given.kwargs, "lr": torch.full(shape, 1e-3)}
        if given.kwargs.get("foreach"):
            with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
                info.optim_cls(others, **options)
            continue
        tensor = info.optim_cls(others, **options)
        for _ in range(5):
            loss()
            number.step()
            loss(*others)
            tensor.step()
            same([weight, bias], others)


def test_a_complex_tensor_steps_like_its_view_as_a_real_one(info):
    for given in all_inputs(info, skip=("differentiable", "fused")):
        numbers = [torch.randn(10, 5, dtype=torch.complex64), torch.randn(10, dtype=torch.complex64), torch.randn(10, 5)]
        numbers = [number.requires_grad_() for number in numbers]
        reals = [(torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_() for p in numbers]
        optimizers = [info.optim_cls(params, **given.kwargs) for params in (numbers, reals)]
        for _ in range(3):
            for number, real in zip(numbers, reals, strict=True):
                real.grad = torch.randn_like(real)
                number.grad = torch.view_as_complex(real.grad) if number.is_complex() else real.grad
            for optimizer in optimizers:
                optimizer.step()
            same([torch.view_as_real(p) if p.is_complex() else p for p in numbers], reals)


# --- implementations are equal to the definition ----------------------------------------------------------------------

def assert_equal_to_the_definition(info, flag, dtype, options=None, **tolerance):
    """Seven steps of a small network, one without gradients and two with a frozen layer: weights and state are equal."""
    for given in inputs(dtype=dtype):
        networks, optimizers = [], []
        for on in (False, True):
            torch.manual_seed(1)
            network = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
            number = torch.empty((), dtype=dtype, requires_grad=True)  # has no dimension
            number.grad = torch.rand_like(number)
            networks.append(network)
            optimizers.append(info.optim_cls([*network.parameters(), number], **given.kwargs, **(options or {}), **{flag: on}))
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        tracker = TensorTracker(tolerance)
        for step in range(7):
            for network, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                network[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    network(x).sum().backward()
                optimizer.step()
            for p, q in zip(*(network.parameters() for network in networks), strict=True):
                tracker.add(p)
                tracker.pop_check_set(q, TestCase())
                ours, theirs = optimizers[0].state[p], optimizers[1].state[q]
                assert ours.keys() == theirs.keys()
                for key in ours:
                    tracker.add(ours[key])
                    tracker.pop_check_set(theirs[key], TestCase())
        assert tracker.all_popped()


def test_foreach_is_equal_to_the_definition(info):
    assert_equal_to_the_definition(info, "foreach", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_is_equal_to_the_definition(info, dtype):
    assert_equal_to_the_definition(info, "fused", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_type_changes_nothing_but_the_type_of_the_step(info, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        tolerance = {"atol": 1e-5, "rtol": 1e-4} if default == torch.float16 else {}
        assert_equal_to_the_definition(info, "foreach", torch.float64, **tolerance)
        p = Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = info.optim_cls([p], foreach=True)
        optimizer.step()
        assert optimizer.state[p]["step"].dtype == (torch.float64 if default == torch.float64 else torch.float32)
    finally:
        torch.set_default_dtype(before)


# --- nothing to do, and what cannot be done ---------------------------------------------------------------------------

def test_without_gradients_or_with_zeros_nothing_moves(info):
    for given in all_inputs(info, skip=()):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = [p.clone() for p in params]
        info.optim_cls(params, **given.kwargs).step(lambda: torch.tensor([1.0]))
        same(params, before)
        if not given.kwargs.get("weight_decay"):
            p = torch.randn(5, 1, requires_grad=True)
            before = p.detach().clone()
            p = p.clone() if given.kwargs.get("differentiable") else p
            p.grad = torch.zeros_like(p)
            info.optim_cls([p], **given.kwargs).step(lambda: torch.tensor([1.0]))
            same(p, before)


def test_errors_are_those_of_adam(info):
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        kind = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with kind(error.error_type, match=error.error_regex):
            info.optim_cls(given.params if given.params is not None else [Parameter(torch.ones(1))], **given.kwargs)
    p = Parameter(torch.ones(1))
    for other in ("foreach", "differentiable"):
        with pytest.raises(RuntimeError, match=f"`fused` (and|does not support) `{other}`"):
            info.optim_cls([p], fused=True, **{other: True})


def test_fused_refuses_meta_tensors_and_steps_once_they_are_real(info):
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        optimizer = info.optim_cls(network.parameters(), fused=True)
        for p in network.parameters():
            p.grad = torch.rand_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    network.to_empty(device="cpu")
    for p in network.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()


@pytest.mark.parametrize("foreach", [False, True, None])
def test_meta_tensors_step_otherwise(info, foreach):
    p = Parameter(torch.ones(3, 2, device="meta"))
    p.grad = torch.ones_like(p)
    optimizer = info.optim_cls([p], foreach=foreach, weight_decay=0.1)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (3, 2)


# --- mixed precision --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [None, 1.0, 4.0])
def test_a_fused_step_with_an_infinite_gradient_leaves_no_trace(info, scale):
    for given in inputs():
        params = [torch.ones(1) for _ in range(3)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = info.optim_cls(params, fused=True, **given.kwargs)
        optimizer.grad_scale = None if scale is None else torch.full((1,), scale)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        for p in params:
            assert torch.equal(p, torch.ones(1))
            assert torch.equal(p.grad, torch.ones(1))
            for key, value in optimizer.state[p].items():
                assert not value.any(), key


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing_but_the_scale_and_skips_what_overflows(info, fused):
    ends = []
    for scaled in (False, True):
        torch.manual_seed(0)
        weight, bias, loss = pair()
        optimizer = info.optim_cls([weight, bias], fused=fused, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(4):
            loss()
            for p in (weight, bias):
                p.grad.mul_(scaler.get_scale())
            if step == 2 and scaled:
                weight.grad[0, 0] = torch.inf
            scaler.scale(torch.ones(()))  # makes the scale
            if step == 2 and not scaled:
                continue
            scaler.step(optimizer)
            scaler.update()
        ends.append([weight.detach(), bias.detach()])
    same(*ends)


# --- state ------------------------------------------------------------------------------------------------------------

def named(params, names):
    return [(f"name{i}", p) for i, p in enumerate(params)] if names else params


@pytest.mark.slow
@pytest.mark.parametrize(("first_named", "second_named"), list(itertools.product([False, True], repeat=2)))
def test_a_loaded_state_goes_on_as_the_original_does(info, first_named, second_named):
    def without_names(state):
        return {**state, "param_groups": [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]}

    for given in all_inputs(info):
        weight, bias, loss = pair()
        optimizer = info.optim_cls(named([weight, bias], first_named), **given.kwargs)
        for _ in range(5):
            optimizer.step(loss)
        others = [Parameter(p.detach().clone()) for p in (weight, bias)]
        loaded = info.optim_cls(named(others, second_named), **given.kwargs)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if first_named or second_named:
            assert loaded.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]
        for _ in range(5):
            optimizer.step(loss)
            loaded.step(functools.partial(loss, *others))
            same([weight, bias], others)
        same(without_names(optimizer.state_dict()), without_names(loaded.state_dict()))
        loaded.param_groups.extend(loaded.param_groups)  # the same parameters twice have the same numbers
        same(without_names(optimizer.state_dict())["param_groups"][-1],
                          without_names(loaded.state_dict())["param_groups"][-1])


def test_the_state_is_the_same_after_a_file_a_pickle_and_a_copy(info):
    for given in all_inputs(info):
        weight, bias, loss = pair()
        optimizer = info.optim_cls([weight, bias], **given.kwargs)
        for _ in range(3):
            optimizer.step(loss)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        same(torch.load(file, weights_only=True), optimizer.state_dict())
        copied = copy.deepcopy(optimizer)
        assert {k for k in vars(copied) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
        same(copied.state_dict(), optimizer.state_dict())
        repr(optimizer)


def test_a_pickled_optimizer_steps_on():
    weight, bias, loss = pair()
    optimizer = LayerAdaptiveLR([weight, bias])
    optimizer.step(loss)
    again = pickle.loads(pickle.dumps(optimizer))
    same(again.state_dict(), optimizer.state_dict())
    again.step()


def test_every_parameter_with_a_gradient_has_state_after_a_step(info):
    for given in all_inputs(info):
        network = nn.Linear(5, 5)
        optimizer = info.optim_cls(network.parameters(), **given.kwargs)
        network(torch.rand(2, 5)).sum().backward()
        optimizer.step()
        assert all(len(optimizer.state[p]) for p in network.parameters())


# --- hooks ------------------------------------------------------------------------------------------------------------

def test_hooks_run_in_their_order(info):
    order = []

    def note(number):
        return lambda *args: order.append(number)

    optimizer = info.optim_cls([torch.ones(2)])
    handles = [register_optimizer_step_pre_hook(note(0)), register_optimizer_step_post_hook(note(3)),
               optimizer.register_step_pre_hook(note(1)), optimizer.register_step_post_hook(note(2))]
    optimizer.step()
    assert order == [0, 1, 2, 3]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert order == [0, 1, 2, 3]


def test_state_dict_hooks_run_before_and_after(info):
    optimizer = info.optim_cls([torch.rand(2, 3, requires_grad=True)])

    def rate(value):
        def hook(optimizer, state):
            state = copy.deepcopy(state)
            state["param_groups"][0]["lr"] = value
            return state
        return hook

    optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("seen", 1))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "had": state["state"].pop("seen")})
    state = optimizer.state_dict()
    assert state.pop("had") == 1
    assert not state["state"]
    optimizer.register_load_state_dict_pre_hook(rate(0.002))
    optimizer.register_load_state_dict_pre_hook(rate(0.003), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: o.state.__setitem__("loaded", o.param_groups[0]["lr"]))
    optimizer.load_state_dict(state)
    assert optimizer.state["loaded"] == optimizer.param_groups[0]["lr"] == 0.002


# --- differentiable, compiled ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}], ids=str)
def test_a_step_can_be_differentiated(info, options):
    scalar = info.optim_cls([torch.ones(1)]).defaults["direction"] == "adam_mini"

    def step(p, grad, m, v):
        p, m, v = p.clone(), m.clone(), v.clone()
        p.grad = grad
        optimizer = info.optim_cls([p], lr=0.9, differentiable=True, **options)
        optimizer.state[p].update({"step": torch.tensor(10.0, dtype=torch.float64), "exp_avg": m, "exp_avg_sq": v,
                                   "rate": torch.zeros((), dtype=torch.float64)})
        optimizer.step()
        return p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]

    torch.manual_seed(0)
    given = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in (10, 10, 10, () if scalar else 10)]
    assert torch.autograd.gradcheck(step, given)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # of the compiler
def test_a_compiled_step_is_the_same_step_without_a_break_in_the_graph(info, options):
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        weight, bias, loss = pair()
        optimizer = info.optim_cls([weight, bias], lr=torch.tensor(0.01) if not options else 0.01, weight_decay=0.1, **options)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        for _ in range(3):
            loss()
            step()
        ends.append([weight.detach(), bias.detach()])
    same(*ends)
