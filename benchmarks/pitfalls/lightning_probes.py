"""The probes of Lightning, in the order of the document's rows."""

import tempfile
from functools import partial
from pathlib import Path

import lightning.pytorch as lightning
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.optim import AdamW

from benchmarks.pitfalls import shared
from benchmarks.pitfalls.shared import LR, Finding, noise, resnet18


class Network(lightning.LightningModule):
    """ResNet-18 with the attribute ``backbone`` that the documentation asks for; it records each step's rates."""

    def __init__(self, scheduler=None):
        super().__init__()
        network = resnet18()
        self.backbone, self.head = nn.Sequential(*list(network.children())[:-1], nn.Flatten()), network.fc
        self.scheduler, self.rates = scheduler, []

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, index):
        images, labels = batch
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        optimizer = AdamW([p for p in self.parameters() if p.requires_grad], lr=LR)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def head_over_backbone(self) -> list[float]:
        """The head's rate over the backbone's at each step that had both."""
        return [rates[0] / rates[1] for rates in self.rates if len(rates) > 1]


class InSecondEpoch(BaseFinetuning):
    """Freezes the backbone before training, unless told not to, and calls ``action`` at the start of the second epoch."""

    def __init__(self, action=lambda callback, network, optimizer: None, *, freeze=True, train_bn=True):
        super().__init__()
        self.action, self.freeze_first, self.train_bn = action, freeze, train_bn

    def freeze_before_training(self, network):
        if self.freeze_first:
            self.freeze(network.backbone, train_bn=self.train_bn)

    def finetune_function(self, network, epoch, optimizer):
        if epoch == 1:
            self.action(self, network, optimizer)


def fit(network: Network, *callbacks, epochs: int, checkpoint: Path | None = None) -> Network:
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
                                enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(network, noise(), ckpt_path=checkpoint)
    return network


def train_on_frozen(callback: BaseFinetuning) -> tuple[float, float, float]:
    network = Network()
    return shared.trained_on_frozen(network, network.head, lambda: fit(network, callback, epochs=2))


frozen_statistics, frozen_scale, frozen_output = shared.frozen_backbone_probes({
    "`BackboneFinetuning`": lambda: train_on_frozen(BackboneFinetuning(9)),  # an epoch that is not reached
    "`BaseFinetuning.freeze(train_bn=False)`": lambda: train_on_frozen(InSecondEpoch(train_bn=False))})


def frozen_after_training() -> Finding:
    network, before = Network(), {}

    def freeze(callback, network, optimizer):
        callback.freeze(network.backbone, train_bn=False)
        before.update(shared.copied_state(network))

    return shared.trained_then_frozen(network, before, lambda: fit(network, InSecondEpoch(freeze, freeze=False), epochs=2))


def unfrozen_parameters() -> Finding:
    def unfreeze_in_two_calls(callback, network, optimizer):
        layer1, stem = network.backbone[4], network.backbone[:4]
        callback.unfreeze_and_add_param_group(layer1, optimizer, lr=LR / 10)
        callback.unfreeze_and_add_param_group(stem, optimizer, lr=LR / 100)

    counts = []
    for callback in (BackboneFinetuning(1), InSecondEpoch(unfreeze_in_two_calls, train_bn=False)):
        network = Network()
        before = shared.copied_state(network)
        counts.append(shared.untrained(fit(network, callback, epochs=2), before))
    return Finding(sum(counts) > 0,
                   f"parameters that never train: {counts[0]} after `BackboneFinetuning`; {counts[1]} after two calls of "
                   "`unfreeze_and_add_param_group` for layers with fresh BatchNorm, which compares by value, not identity (it "
                   "warns that they are in the optimizer already)")


def schedule_after_unfreezing() -> Finding:
    def unfreeze(callback, network, optimizer):
        callback.unfreeze_and_add_param_group(network.backbone, optimizer)

    return shared.schedulers_finding(
        "a group added in epoch 2 of 3",
        lambda scheduler: fit(Network(scheduler), InSecondEpoch(unfreeze), epochs=3).head_over_backbone(),
        end=" (steady, but it starts at its full rate, off the schedule's curve: notebook 03)")


def resumed_run() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        whole = fit(Network(), BackboneFinetuning(1), saving, epochs=3)
        outcomes = {}
        for epoch, stop in ((0, "stopped before the unfreezing"), (1, "stopped after it")):
            resumed, checkpoint = Network(), Path(folder) / f"epoch={epoch}.ckpt"
            error = shared.error_name(partial(fit, resumed, BackboneFinetuning(1), epochs=3, checkpoint=checkpoint))
            outcomes[stop] = error or shared.compared(whole, resumed)
    trainable = [p.requires_grad for p in resumed.backbone.parameters()]
    return Finding(set(outcomes.values()) != {"bit-identical"},
                   f"{shared.listed(outcomes)}, with {sum(trainable)} of {len(trainable)} backbone tensors trainable")


def rates_in_torch() -> Finding:
    network = fit(Network(shared.SCHEDULERS["CosineAnnealingLR"]), BackboneFinetuning(1), epochs=2)
    ratio = network.head_over_backbone()[-1]
    return Finding(ratio == 1, "head's rate over the backbone's after `BackboneFinetuning`, in torch's AdamW under "
                               f"CosineAnnealingLR: {ratio:.3g}")


def unknown_model() -> Finding:
    network = Network()
    network.body, network.forward = network.backbone, lambda images: network.head(network.body(images))
    del network.backbone
    error = shared.error_name(lambda: fit(network, BackboneFinetuning(1), epochs=1))
    return Finding(error is None, f"`BackboneFinetuning` on a module without an attribute `backbone`: {error or 'accepted'}")


layer_order = shared.not_applicable("the user's callback says it")
unknown_name = shared.not_applicable("it takes modules, not names")


def ratios_of_rates() -> Finding:
    default, constant = (fit(Network(), callback, epochs=6).head_over_backbone()
                         for callback in (BackboneFinetuning(1), BackboneFinetuning(1, lambda_func=lambda epoch: 1.0)))
    finding = shared.ratio_finding("head's rate over the backbone's in `BackboneFinetuning`", default)
    return Finding(finding.falls_in, f"{finding.note}; with a constant `lambda_func`: {shared.first_and_last(constant)}")
