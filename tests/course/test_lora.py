import pytest
import torch
from torch import nn

from layerlr_helpers import fit, layer_groups, param_groups, per_group, uniform
from layerlr_helpers.course.lora import LoRALinear, add_lora
from layerlr_helpers.minilm import load_minilm


def test_a_layer_begins_as_what_it_was_and_then_adds_the_product():
    base = nn.Linear(6, 4)
    lora, x = LoRALinear(base, rank=2, alpha=8), torch.randn(3, 6)
    assert torch.equal(lora(x), base(x))
    nn.init.normal_(lora.lora_B)
    merged = base.weight + 8 / 2 * lora.lora_B @ lora.lora_A
    assert torch.allclose(lora(x), nn.functional.linear(x, merged, base.bias), atol=1e-5)


def test_the_matrices_are_of_the_layers_precision_and_on_its_device():
    lora = LoRALinear(nn.Linear(6, 4, dtype=torch.bfloat16, device="meta"), rank=2, alpha=8)
    assert {(p.dtype, p.device.type) for p in lora.parameters()} == {(torch.bfloat16, "meta")}


def test_only_the_small_matrices_and_the_head_train():
    model = add_lora(load_minilm(num_classes=3), rank=4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"head.weight", "head.bias",
                         *(f"bert.encoder.layer.{i}.attention.self.{layer}.lora_{part}"
                           for i in range(6) for layer in ("query", "value") for part in "AB")}
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = layer_groups(model)
    batches = [({"input_ids": torch.tensor([[101, 2023, 102]])}, torch.tensor([1]))] * 2
    fit(model, torch.optim.AdamW(param_groups(groups, uniform(1e-2))), batches, epochs=1, progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable


def test_b_can_be_given_another_rate_than_a():
    groups = layer_groups(add_lora(load_minilm(None, num_classes=3)), granularity="tensor")
    rates = per_group({"*": 1e-3, "*.lora_B": 1.6e-2})(groups)
    assert {name.rpartition(".")[2] for name, lr in rates.items() if lr == 1.6e-2} == {"lora_B"}


def test_layers_and_heads_that_are_not_there_are_named_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"no linear layer of Sequential is called query or value; they are called 0, 1"):
        add_lora(model)
    with pytest.raises(ValueError, match="Sequential has no module 'head'"):
        add_lora(model, ["0"])
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model[0], nn.Linear)
