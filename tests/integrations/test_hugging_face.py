"""Hugging Face's Trainer carries out a plan, logs every group's rate, and resumes bit for bit."""

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from layerlr_helpers import (
    PlateauUnfreezing,
    ProgressiveUnfreezing,
    UnfreezePlan,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
)
from layerlr_helpers.integrations.hugging_face import UnfreezingTrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries are their affair


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(1, 99, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": int(ids[0] > 49)}


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2))


def parts(model, every=2):
    groups = layer_groups(model, {"input_ids": torch.ones(1, 6, dtype=torch.long)})
    optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(1e-2, 0.5)))
    return groups, optimizer, ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=every))


def trainer(folder, model, optimizer, unfreezing, steps=9, **options):
    arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, save_steps=1, logging_steps=1, seed=1,
                                  report_to=[], use_cpu=True, disable_tqdm=True, **options)
    return Trainer(model, arguments, train_dataset=Data(), optimizers=(optimizer, one_cycle(optimizer, 9)),
                   callbacks=[UnfreezingTrainerCallback(unfreezing)])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_the_rates_in_the_log_are_those_of_the_plan(tmp_path, options):
    groups, optimizer, unfreezing = parts(model := bert())
    run = trainer(tmp_path, model, optimizer, unfreezing, steps=8, **options)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        trained = {group.name for group in groups if row[f"lr/{group.name}"] > 0}
        assert trained == unfreezing.plan.trainable_at(row["step"] - 1)


@pytest.mark.slow
def test_a_run_resumed_at_any_step_around_an_unfreezing_has_the_same_weights_bit_for_bit(tmp_path):
    _, optimizer, unfreezing = parts(whole := bert())
    trainer(tmp_path / "whole", whole, optimizer, unfreezing).train()
    for step in (1, 2, 3):  # a layer unfreezes at step 2
        _, optimizer, unfreezing = parts(resumed := bert())
        trainer(tmp_path / f"{step}", resumed, optimizer, unfreezing).train(
            resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-{step}")
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_what_an_adapter_method_froze_never_moves(tmp_path):
    model = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    fixed = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    _, optimizer, unfreezing = parts(model)
    trainer(tmp_path, model, optimizer, unfreezing).train()
    assert fixed
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before) and not now[name].requires_grad for name, before in fixed.items())
    assert any(p.requires_grad and "lora" in name for name, p in now.items())


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    groups, _, unfreezing = parts(model := bert())
    with pytest.raises(ValueError, match=f"{groups[0].name}.* are not in the optimizer"):
        trainer(tmp_path, model, torch.optim.SGD(groups[-1].params.values(), lr=0.1), unfreezing).train()


def test_what_would_drift_in_several_processes_is_refused():
    _, optimizer, unfreezing = parts(bert())
    callback = UnfreezingTrainerCallback(unfreezing)

    def begin(finds_unused):
        arguments = type("Arguments", (), {"world_size": 2, "ddp_find_unused_parameters": finds_unused})
        callback.on_train_begin(arguments, None, None, optimizer=optimizer)

    begin(True)
    for finds_unused in (None, False):
        with pytest.raises(ValueError, match="ddp_find_unused_parameters=True"):
            begin(finds_unused)
    unfreezing.apply(0)  # frozen before the Trainer wraps the model
    with pytest.raises(ValueError, match="were frozen before the training began"):
        begin(True)


def test_an_unfreezing_that_is_no_plan_is_refused():
    groups = layer_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="PlateauUnfreezing decides by validation metrics"):
        UnfreezingTrainerCallback(PlateauUnfreezing(groups))
    with pytest.raises(TypeError, match="expected a ProgressiveUnfreezing"):
        UnfreezingTrainerCallback(UnfreezePlan({"*": 0}))
