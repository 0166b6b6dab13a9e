"""Lightning's Trainer carries out a plan, logs every group's rate, and resumes bit for bit."""

from types import SimpleNamespace

import lightning
import peft
import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from layerlr_helpers import (
    PlateauUnfreezing,
    ProgressiveUnfreezing,
    UnfreezePlan,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
)
from layerlr_helpers.integrations.lightning import RandomStateCallback, UnfreezingCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries are their affair


class Module(lightning.LightningModule):
    """A network with an optimizer of all its groups, as the callback's docstring says."""

    def __init__(self, net, example):
        super().__init__()
        self.net, self.groups = net, layer_groups(net, example)

    def training_step(self, batch, index):
        inputs, labels = batch
        output = self.net(inputs)
        return nn.functional.cross_entropy(getattr(output, "logits", output), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(param_groups(self.groups, layer_decay(1e-2, 0.5)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle(optimizer, 9), "interval": "step"}}


def small():
    torch.manual_seed(0)
    return Module(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
                  torch.ones(2, 6))


def batches(inputs=None):
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)) if inputs is None else inputs
    return DataLoader(TensorDataset(inputs, torch.arange(24) % 2), 8)


def plan(module):
    return UnfreezePlan.top_down(module.groups, every=3)


def trainer(folder, module, *callbacks, **options):
    unfreezing = ProgressiveUnfreezing(module.groups, plan(module))
    return Trainer(**{"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
                      "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
                      "callbacks": [UnfreezingCallback(unfreezing), *callbacks], **options})


class Rates(lightning.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_rates_in_the_log_are_those_of_the_plan(tmp_path, accumulate):
    module, rates = small(), Rates()
    trainer(tmp_path, module, rates, accumulate_grad_batches=accumulate).fit(module, batches())
    assert len(rates.rows) == 9
    for batch, row in enumerate(rates.rows):
        trained = {group.name for group in module.groups if row[f"lr/{group.name}"] > 0}
        assert trained == plan(module).trainable_at(batch // accumulate)


class StatefulLoader:
    """Says which batch comes next, as Lightning asks of a loader that shall go on within an epoch."""

    def __init__(self):
        self.batches, self.next = list(batches()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]
        self.next = 0

    def state_dict(self):
        return {"next": self.next % len(self.batches)}

    def load_state_dict(self, state):
        self.next = state["next"]


def resumed_like_the_whole(folder, make, steps, loader, *callbacks):
    """Whether runs that are resumed at these steps have the weights of a whole run, bit for bit."""
    whole = make()
    every_step = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    torch.manual_seed(1)
    trainer(folder, whole, every_step, *(each() for each in callbacks), enable_checkpointing=True).fit(whole, loader())
    same = {}
    for step in steps:
        resumed = make()
        trainer(folder, resumed, *(each() for each in callbacks)).fit(resumed, loader(), ckpt_path=folder / f"step={step}.ckpt")
        same[step] = all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    return same


def test_a_run_resumed_at_any_step_around_an_unfreezing_has_the_same_weights_bit_for_bit(tmp_path):
    same = resumed_like_the_whole(tmp_path, small, (2, 3, 4), StatefulLoader)  # a layer unfreezes at step 3
    assert same == {2: True, 3: True, 4: True}


def test_with_the_state_of_the_random_numbers_a_resumed_run_has_the_same_dropout_and_order_of_batches(tmp_path):
    def make():
        torch.manual_seed(0)
        return Module(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)), torch.ones(2, 6))

    def shuffled():
        return DataLoader(batches().dataset, 8, shuffle=True)

    assert resumed_like_the_whole(tmp_path, make, (3, 6), shuffled, RandomStateCallback) == {3: True, 6: True}
    assert resumed_like_the_whole(tmp_path / "without", make, (3, 6), shuffled) == {3: False, 6: False}


def test_what_an_adapter_method_froze_never_moves(tmp_path):
    base = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2))
    net = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    module = Module(net, {"input_ids": torch.ones(1, 6, dtype=torch.long)})
    fixed = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
    trainer(tmp_path, module).fit(module, batches(torch.randint(1, 99, (24, 6))))
    now = dict(net.named_parameters())
    assert fixed
    assert all(torch.equal(now[name], before) and not now[name].requires_grad for name, before in fixed.items())
    assert any(p.requires_grad and "lora" in name for name, p in now.items())


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    module = small()
    module.configure_optimizers = lambda: torch.optim.SGD(module.groups[-1].params.values(), lr=0.1)
    with pytest.raises(ValueError, match=r"groups stem, .* are not in the optimizer"):
        trainer(tmp_path, module).fit(module, batches())


def test_what_would_drift_in_several_processes_is_refused(tmp_path):
    module = small()
    unfreezing = ProgressiveUnfreezing(module.groups, plan(module))
    optimizer = module.configure_optimizers()["optimizer"]

    def start(model):
        two_processes = SimpleNamespace(world_size=2, optimizers=[optimizer], strategy=SimpleNamespace(model=model))
        UnfreezingCallback(unfreezing).on_train_start(two_processes, module)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        start(DistributedDataParallel(module, find_unused_parameters=True))
        for model in (DistributedDataParallel(module), module):  # the second as another strategy would have it
            with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
                start(model)
        unfreezing.apply(0)  # frozen before the Trainer wraps the model
        with pytest.raises(ValueError, match="were frozen before the training began"):
            start(DistributedDataParallel(module, find_unused_parameters=True))
    finally:
        torch.distributed.destroy_process_group()


def test_an_unfreezing_that_is_no_plan_is_refused():
    with pytest.raises(ValueError, match="PlateauUnfreezing decides by validation metrics"):
        UnfreezingCallback(PlateauUnfreezing(small().groups))
    with pytest.raises(TypeError, match="expected a ProgressiveUnfreezing"):
        UnfreezingCallback(UnfreezePlan({"*": 0}))
