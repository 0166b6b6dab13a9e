"""Which pitfalls of fine-tuning do timm, fastai, Lightning and layerlr_helpers fall into? Each is run and measured.

    pip install .[compare]
    python benchmarks/peers.py

prints one table and writes it, with what was measured, to docs/pitfalls.md. A library that is not installed is left
out of the printed table, and the document is then left as it is. Everything runs on a ResNet-18 with random weights, on
a few images of noise, on one thread of the CPU, in a minute or two.

Every probe is a function without arguments that uses one library as its documentation says and returns a Finding:
whether it falls in, decided by a measured condition, and a note of what was measured.
"""

import contextlib
import functools
import importlib
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import layerlr_helpers as ours

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "pitfalls.md"
PEERS = {"timm": "timm", "fastai": "fastai", "Lightning": "lightning"}  # a column's title: the package to install
OURS = "layerlr_helpers"

LR = 1e-3  # of the head
CLASSES, SIZE, BATCH, BATCHES = 5, 32, 4, 2
STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("fc",))


def module(name: str):
    """An optional package's module, or None; some of them warn while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


timm = module("timm.optim") and module("timm.scheduler") and module("timm.utils") and module("timm")
fastai = module("fastai.vision.all")
lightning = module("lightning.pytorch")


@dataclass
class Finding:
    """Whether a library falls into a pitfall (None: it has no such feature) and what was measured."""

    falls: bool | None
    note: str

    @property
    def cell(self) -> str:
        return {True: "falls in", False: "avoids", None: "n/a"}[self.falls]


Probe = Callable[[], Finding]


def without(why: str) -> Probe:
    """The probe of a library that has no such feature."""
    return lambda: Finding(None, why)


# What all probes share: data, models, and how to compare.


def loader(batches: int = BATCHES) -> DataLoader:
    """The same few images of noise, in the same order, every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches * BATCH, 3, SIZE, SIZE, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % CLASSES), batch_size=BATCH)


def resnet() -> nn.Module:
    """torchvision's ResNet-18, the same random weights every time."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=CLASSES)


def train(model: nn.Module, optimizer: Optimizer, epochs: int = 1) -> None:
    """A plain loop in torch, for timm, which leaves the loop to its user."""
    model.train()
    for _ in range(epochs):
        for images, labels in loader():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_head(name: str) -> bool:
    return name.startswith(("fc.", "head."))


def moved(before: dict[str, Tensor], after: dict[str, Tensor], wanted: Callable[[str, Tensor], bool]) -> float:
    """The largest change of any value in the tensors that are wanted."""
    names = [name for name, value in before.items() if name in after and wanted(name, value)]
    return max(float((after[name] - before[name]).abs().max()) for name in names)


def untrained(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """The parameters that ask for gradients but are still what they were."""
    return [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def amount(value: float) -> str:
    return f"{value:.2g}" if value else "0"


# 1 to 3: a frozen backbone under a head that trains.


@dataclass
class Frozen:
    """What two epochs of training the head did to the frozen layers' BatchNorm."""

    statistics: float
    scale: float
    gap: float

    @classmethod
    def after(cls, model: nn.Module, head: nn.Module, run: Callable[[], object]) -> "Frozen":
        before, seen = state(model), {}
        handle = head.register_forward_pre_hook(lambda head, args: seen.update({head.training: args[0].detach().clone()}))
        run()
        after = state(model)
        with torch.no_grad():  # the images of the last step again
            model.eval()(list(loader())[-1][0])
        handle.remove()
        return cls(moved(before, after, lambda name, value: "running_" in name),
                   moved(before, after, lambda name, value: value.ndim == 1 and "running_" not in name and not is_head(name)),
                   float((seen[True] - seen[False]).norm() / seen[False].norm()))


@functools.cache
def frozen_timm(include_bn: bool = True) -> Frozen:
    model = timm_net()
    timm.utils.freeze(model, timm_backbone(model), include_bn_running_stats=include_bn)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR)
    return Frozen.after(model, model.fc, lambda: train(model, optimizer, 2))


@functools.cache
def frozen_fastai(train_bn: bool = True, bn_freeze: bool = False) -> Frozen:
    learner = fastai_learner(train_bn=train_bn, cbs=[fastai.BnFreeze()] if bn_freeze else [])
    learner.freeze()
    return Frozen.after(learner.model, learner.model.fc, lambda: learner.fit(2))


@functools.cache
def frozen_lightning(train_bn: bool = True) -> Frozen:
    net, stages = lightning_net(), lightning_classes()[1]
    never = lightning.callbacks.BackboneFinetuning(9) if train_bn else stages(9, train_bn=False)
    return Frozen.after(net, net.head, lambda: lightning_fit(net, never, epochs=2))


@functools.cache
def frozen_ours(batch_norm: str = "freeze") -> Frozen:
    model, groups, optimizer = our_parts()
    unfreezing = ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan({"head": 0}), batch_norm=batch_norm)
    return Frozen.after(model, model.fc, lambda: our_fit(model, optimizer, epochs=2, unfreezing=unfreezing))


FROZEN: dict[str, dict[str, Callable[[], Frozen]]] = {  # the first is the documented way, the others its options
    "timm": {"`timm.utils.freeze`": frozen_timm,
             "`include_bn_running_stats=False`": lambda: frozen_timm(False)},
    "fastai": {"`Learner.freeze`": frozen_fastai,
               "`train_bn=False`": lambda: frozen_fastai(False),
               "`train_bn=False` and the callback `BnFreeze`": lambda: frozen_fastai(False, True)},
    "Lightning": {"`BackboneFinetuning`": frozen_lightning,
                  "`BaseFinetuning.freeze(train_bn=False)`": lambda: frozen_lightning(False)},
    OURS: {"`ProgressiveUnfreezing`": frozen_ours,
           '`batch_norm="statistics"`': lambda: frozen_ours("statistics"),
           '`batch_norm="train"`': lambda: frozen_ours("train")},
}


def frozen(library: str, measure: str, what: str) -> Probe:
    """The probe that looks at one of the measures of :class:`Frozen`, for a library's default and for its options."""
    def probe() -> Finding:
        values = {way: getattr(run(), measure) for way, run in FROZEN[library].items()}
        (default, value), *options = values.items()
        note = f"{default}: {what} {amount(value)}" + "".join(f"; {way}: {amount(other)}" for way, other in options)
        return Finding(value > 0, note)

    return probe


# timm


def timm_net() -> nn.Module:
    """timm's ResNet-18 with its blocks open from the start; by default their last scale is 0 and stops all gradients."""
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=CLASSES, zero_init_last=False)


def timm_backbone(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_children() if name != "fc"]


def timm_freezing_again() -> Finding:
    model = timm_net()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR, weight_decay=0.05)
    train(model, optimizer)
    timm.utils.freeze(model, timm_backbone(model))
    return freezing_again(state(model), lambda: train(model, optimizer), model)


def timm_thawed() -> Finding:
    model = timm_net()
    before = state(model)
    timm.utils.freeze(model, timm_backbone(model))
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR)
    timm.utils.unfreeze(model)
    train(model, optimizer)
    late = len(untrained(model, before))
    model = timm_net()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR)
    timm.utils.freeze(model, timm_backbone(model))
    timm.utils.unfreeze(model)
    train(model, optimizer)
    early = len(untrained(model, before))
    return Finding(late + early > 0,
                   f"parameters that never train after `unfreeze`: {late} when `create_optimizer_v2` ran while they were "
                   f"frozen, {early} when it ran before (`unfreeze` makes new parameters for BatchNorm)")


def timm_resume() -> Finding:
    frozen_net, open_net = timm_net(), timm_net()
    timm.utils.freeze(frozen_net, timm_backbone(frozen_net))
    early, late = (timm.optim.create_optimizer_v2(net, "adamw", lr=LR, layer_decay=0.7) for net in (frozen_net, open_net))
    error = raised(lambda: late.load_state_dict(early.state_dict()))
    return Finding(error is not None,
                   f"`create_optimizer_v2` leaves frozen parameters out: {len(early.param_groups)} groups while frozen, "
                   f"{len(late.param_groups)} after; loading the first's state into the second: {error or 'works'}")


def timm_rates_arrive() -> Finding:
    optimizer = AdamW(timm.optim.param_groups_layer_decay(timm_net(), layer_decay=0.5), lr=LR)
    own, cosine = head_to_first(optimizer), after_cosine(optimizer)
    timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=10)
    return Finding(1 in (own, cosine),
                   f"head's rate over the first layer's after `param_groups_layer_decay(layer_decay=0.5)`: {own:.3g} "
                   f"in torch's AdamW, {cosine:.3g} under torch's CosineAnnealingLR; {head_to_first(optimizer):.3g} under "
                   "timm's own schedulers, which read `lr_scale`")


def timm_unknown_model() -> Finding:
    with logged("timm") as messages:
        scales = timm_scales(resnet())
    model = timm_net()
    model.adapter = nn.Conv2d(3, 3, 1)
    with logged("timm") as adapter_messages:
        extended = timm_scales(model)
    adapter, scale = extended["adapter.weight"], extended["conv1.weight"]
    with logged("timm"):
        compiled = len(set(timm_scales(torch.compile(timm_net())).values()))
    count, known = len(set(scales.values())), len(set(timm_scales(timm_net()).values()))
    return Finding(count == 1,
                   f"different scales on torchvision's ResNet-18: {count} (warnings logged: {len(messages)}); on timm's own: "
                   f"{known}, the same after `torch.compile`: {compiled}; an adapter added in front of timm's own, where "
                   f"the first layer has {scale:.3g}, gets the scale {adapter:.3g} (warnings: {len(adapter_messages)})")


def timm_order() -> Finding:
    model = Backwards()
    model.pretrained_cfg = {"classifier": "fc"}  # what its automatic grouping asks for
    scales = timm_scales(model)
    first, last = scales["conv1.weight"], scales["layer4.1.conv2.weight"]
    return Finding(first > last, f"scales by the automatic grouping of a model defined back to front: {first:.3g} for the "
                                 f"layer that runs first, {last:.3g} for the last block")


def timm_unknown_name() -> Finding:
    pattern = raised(lambda: timm.optim.param_groups_layer_decay(timm_net(), no_weight_decay_list=["lyer1.*"]))
    freeze = raised(lambda: timm.utils.freeze(timm_net(), ["lyer1"]))
    return Finding(None in (pattern, freeze), f"a misspelt pattern in `no_weight_decay_list`: {pattern or 'accepted'}; a "
                                              f"misspelt module in `freeze`: {freeze or 'accepted'}")


def timm_keeps_ratios() -> Finding:
    optimizer = AdamW(timm.optim.param_groups_layer_decay(timm_net(), layer_decay=0.5), lr=LR)
    scheduler = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=10, warmup_epochs=2, min_lr=1e-5)[0]
    ratios = [head_to_first(optimizer)]
    for epoch in range(1, 10):
        scheduler.step(epoch)
        ratios.append(head_to_first(optimizer))
    return kept("cosine with warm-up and `min_lr`, head over first layer", ratios)


def timm_scales(model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


# fastai


def fastai_splitter(model: nn.Module) -> list[list[nn.Parameter]]:
    return [[p for name in stage for p in getattr(model, name).parameters()] for stage in STAGES]


def fastai_learner(**arguments):
    data = fastai.DataLoaders(loader(), loader())
    arguments = {"splitter": fastai_splitter, "loss_func": nn.CrossEntropyLoss(), "lr": LR} | arguments
    learner = fastai.Learner(data, resnet(), **arguments)
    learner.remove_cbs(fastai.ProgressCallback)
    learner.logger = lambda *_: None
    return learner


def fastai_rates(learner) -> list[float]:
    return [float(group["lr"]) for group in learner.opt.param_groups]


def fastai_trace(learner, at_epoch=lambda learner, epoch: None):
    """A callback that keeps every group's rate at each step and can do something at the start of an epoch."""
    class Trace(fastai.Callback):
        rates: list[list[float]] = []  # noqa: RUF012 - one class for each call

        def before_epoch(self):
            at_epoch(self.learn, self.epoch)

        def before_step(self):
            self.rates.append(fastai_rates(self.learn))

    return Trace()


def fastai_freezing_again() -> Finding:
    findings = []
    for options in ({}, {"wd": 0}):
        learner = fastai_learner(**options)
        learner.fit(1)
        learner.freeze()
        findings.append(freezing_again(state(learner.model), lambda learner=learner: learner.fit(1), learner.model))
    return Finding(findings[0].falls, f"{findings[0].note} (its `zero_grad` leaves gradients of 0, so weight decay goes on); "
                                      f"with `wd=0`, {findings[1].note}")


def fastai_thawed() -> Finding:
    learner = fastai_learner()
    before = state(learner.model)
    learner.freeze()
    learner.fit(1)
    learner.unfreeze()
    learner.fit(1, slice(LR / 100, LR))
    never = len(untrained(learner.model, before))
    return Finding(never > 0, f"parameters that never train after `unfreeze`: {never}")


def fastai_scheduler() -> Finding:
    learner = fastai_learner()
    learner.freeze()
    trace = fastai_trace(learner, lambda learner, epoch: learner.unfreeze() if epoch == 1 else None)
    learner.fit_one_cycle(3, slice(LR / 100, LR), cbs=trace)
    ratios = [rates[-1] / rates[0] for rates in trace.rates]
    return kept("`unfreeze` inside `fit_one_cycle`, head's rate over the first layer's", ratios)


def fastai_resume() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        whole = fastai_run(folder, save=True)
        again = fastai_run(folder, resume="run_0")
        learner = fastai_learner(path=folder).load("phase1")
    open_again = sum(p.requires_grad for name, p in learner.model.named_parameters() if not is_head(name))
    equal = same(whole.model, again.model)
    return Finding(not equal,
                   f"stopped after the first of two unfrozen epochs, then `load` and `start_epoch`: {verdict(equal)}; a "
                   f"checkpoint of the frozen phase loads with {open_again} backbone tensors trainable, so call `freeze` "
                   "again after `load`")


def fastai_run(folder: str, save: bool = False, resume: str | None = None):
    """An epoch with the head alone, then two with everything; or only the last one, from a checkpoint."""
    learner = fastai_learner(path=folder)
    if resume is None:
        learner.freeze()
        learner.fit_one_cycle(1, LR)
        learner.save("phase1")
        learner.unfreeze()
    else:
        learner.load(resume)
    saver = [fastai.SaveModelCallback(fname="run", every_epoch=True, with_opt=True)] if save else []
    learner.fit_one_cycle(2, slice(LR / 100, LR), cbs=saver, start_epoch=0 if resume is None else 1)
    return learner


def fastai_rates_arrive() -> Finding:
    wrap = functools.partial(fastai.OptimWrapper, opt=AdamW)
    ratios = []
    for options in ({}, {"opt_func": wrap}):
        learner = fastai_learner(**options)
        learner.fit(1, slice(LR / 100, LR))
        groups = learner.opt.opt.param_groups if options else learner.opt.param_groups
        ratios.append(groups[-1]["lr"] / groups[0]["lr"])
    return Finding(1 in ratios, f"head's rate over the first layer's after `slice(lr / 100, lr)`: {ratios[0]:.3g} in its own "
                                f"Adam, {ratios[1]:.3g} in torch's AdamW through `OptimWrapper`")


def fastai_unknown_model() -> Finding:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = fastai_learner(splitter=fastai.trainable_params)  # the default of Learner
        learner.create_opt()
        learner.opt.set_hyper("lr", slice(LR / 100, LR))
    rates = set(fastai_rates(learner))
    learner = fastai_learner()
    learner.create_opt()
    learner.opt.set_hyper("lr", slice(LR / 100, LR))
    return Finding(len(rates) == 1,
                   f"different rates after `slice(lr / 100, lr)` in a `Learner` with its default splitter: {len(rates)} "
                   f"(warnings: {len(caught)}); with a splitter written for this model: {len(set(fastai_rates(learner)))} "
                   "(`vision_learner` brings splitters for the models it knows)")


def fastai_unknown_name() -> Finding:
    learner = fastai_learner()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = raised(lambda: learner.freeze_to(-len(STAGES) - 3))
    trainable = all(p.requires_grad for p in learner.model.parameters())
    wrong = raised(lambda: learner.opt.set_hyper("lr", [LR, LR]))
    count, rest = len(STAGES), "nothing" if trainable else "something"
    return Finding(error is None and not caught, f"`freeze_to(-{count + 3})` with {count} groups: {error or 'accepted'}, "
                                                 f"{rest} is frozen; two rates for {count} groups: {wrong or 'accepted'}")


def fastai_keeps_ratios() -> Finding:
    learner = fastai_learner()
    trace = fastai_trace(learner)
    learner.fit_one_cycle(3, slice(LR / 100, LR), cbs=trace)
    return kept("`fit_one_cycle`, head over first layer", [rates[-1] / rates[0] for rates in trace.rates])


# Lightning


@functools.cache
def lightning_classes() -> tuple[type, type]:
    """A LightningModule with the documented ``backbone``, and a callback that does something at one epoch."""
    class Net(lightning.LightningModule):
        def __init__(self, scheduler=None):
            super().__init__()
            net = resnet()
            self.backbone, self.head = nn.Sequential(*list(net.children())[:-1], nn.Flatten()), net.fc
            self.scheduler, self.rates = scheduler, []

        def forward(self, images):
            return self.head(self.backbone(images))

        def training_step(self, batch, index):
            self.rates.append([group["lr"] for group in self.optimizers().param_groups])
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = AdamW([p for p in self.parameters() if p.requires_grad], lr=LR)
            if self.scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    class Stages(lightning.callbacks.BaseFinetuning):
        def __init__(self, epoch, act=None, *, freeze=True, train_bn=True):
            super().__init__()
            self.epoch, self.act, self.frozen, self.train_bn = epoch, act, freeze, train_bn

        def freeze_before_training(self, net):
            if self.frozen:
                self.freeze(net.backbone, train_bn=self.train_bn)

        def finetune_function(self, net, epoch, optimizer):
            if epoch == self.epoch:
                self.act(self, net, optimizer)

    return Net, Stages


def lightning_net(scheduler=None):
    return lightning_classes()[0](scheduler)


def lightning_fit(net, *callbacks, epochs: int, resume: Path | None = None, save: bool = False):
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
                                enable_checkpointing=save, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(net, loader(), ckpt_path=resume)
    return net


def lightning_freezing_again() -> Finding:
    net, before = lightning_net(), {}

    def freeze(callback, net, optimizer):
        callback.freeze(net.backbone, train_bn=False)
        before.update(state(net))

    callback = lightning_classes()[1](1, freeze, freeze=False)
    return freezing_again(before, lambda: lightning_fit(net, callback, epochs=2), net)


def lightning_thawed() -> Finding:
    net = lightning_net()
    before = state(net)
    lightning_fit(net, lightning.callbacks.BackboneFinetuning(1), epochs=2)
    whole = len(untrained(net, before))

    def thaw(callback, net, optimizer):
        for i, stage in enumerate((net.backbone[4], net.backbone[:4])):  # layer1, then the stem, each with its own rate
            callback.unfreeze_and_add_param_group(stage, optimizer, lr=LR / 10 ** (i + 1))

    net = lightning_net()
    lightning_fit(net, lightning_classes()[1](1, thaw, train_bn=False), epochs=2)
    staged = untrained(net, before)
    return Finding(whole + len(staged) > 0,
                   f"parameters that never train: {whole} after `BackboneFinetuning`; {len(staged)} after two calls of "
                   "`unfreeze_and_add_param_group` for layers with fresh BatchNorm, which compares by value, not identity (it "
                   "warns that they are in the optimizer already)")


STEADY = "no error, a steady ratio"
SCHEDULERS: dict[str, Callable[[Optimizer], object]] = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, LR, total_steps=3 * BATCHES + 1),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 3 * BATCHES),
    "StepLR": lambda optimizer: StepLR(optimizer, BATCHES, 0.5),
}


def lightning_scheduler() -> Finding:
    def thaw(callback, net, optimizer):
        callback.unfreeze_and_add_param_group(net.backbone, optimizer)

    results = {}
    for name, scheduler in SCHEDULERS.items():
        net = lightning_net(scheduler)
        error = raised(lambda net=net: lightning_fit(net, lightning_classes()[1](1, thaw), epochs=3))
        results[name] = error or ratio_change([rates[0] / rates[1] for rates in net.rates if len(rates) > 1])
    return Finding(any(text != STEADY for text in results.values()),
                   f"a group added in epoch 2 of 3: {listed(results)} (steady, but it starts at its full rate, off the "
                   "schedule's curve: notebook 03)")


def lightning_resume() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        saver = lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        whole = lightning_net()
        lightning_fit(whole, lightning.callbacks.BackboneFinetuning(1), saver, epochs=3, save=True)
        results, trainable = {}, 0
        for epoch, where in ((0, "stopped before the unfreezing"), (1, "stopped after it")):
            again = lightning_net()
            path = Path(folder) / f"epoch={epoch}.ckpt"
            error = raised(lambda again=again, path=path: lightning_fit(
                again, lightning.callbacks.BackboneFinetuning(1), epochs=3, resume=path))
            results[where] = error or verdict(same(whole, again))
            trainable = sum(p.requires_grad for p in again.backbone.parameters())
    total = len(list(again.backbone.parameters()))
    return Finding(set(results.values()) != {verdict(True)},
                   f"{listed(results)}, with {trainable} of {total} backbone tensors trainable")


def lightning_rates_arrive() -> Finding:
    net = lightning_net(SCHEDULERS["CosineAnnealingLR"])
    lightning_fit(net, lightning.callbacks.BackboneFinetuning(1), epochs=2)
    head, backbone = net.rates[-1]
    return Finding(head == backbone, "head's rate over the backbone's after `BackboneFinetuning`, in torch's AdamW under "
                                     f"CosineAnnealingLR: {head / backbone:.3g}")


def lightning_unknown_model() -> Finding:
    net = lightning_net()
    net.body, net.forward = net.backbone, lambda images: net.head(net.body(images))
    del net.backbone
    error = raised(lambda: lightning_fit(net, lightning.callbacks.BackboneFinetuning(1), epochs=1))
    return Finding(error is None, f"`BackboneFinetuning` on a module without an attribute `backbone`: {error or 'accepted'}")


def lightning_keeps_ratios() -> Finding:
    spans = []
    for options in ({}, {"lambda_func": lambda epoch: 1.0}):
        net = lightning_net()
        lightning_fit(net, lightning.callbacks.BackboneFinetuning(1, **options), epochs=6)
        spans.append([rates[0] / rates[1] for rates in net.rates if len(rates) > 1])
    return kept("head's rate over the backbone's in `BackboneFinetuning`", spans[0],
                f"; with a constant `lambda_func`: {ratio_span(spans[1])}")


# layerlr_helpers


def our_parts(lr: float = LR, decay: float = 0.5):
    model = resnet()
    groups = ours.layer_groups(model, torch.zeros(1, 3, SIZE, SIZE))
    return model, groups, AdamW(ours.param_groups(groups, ours.layer_decay(lr, decay), weight_decay=0.05))


def our_fit(model, optimizer, **arguments):
    return ours.fit(model, optimizer, loader(), progress=False, **arguments)


def our_plan(groups):
    """The head for one epoch, then everything."""
    plan = ours.UnfreezePlan({group.name: BATCHES for group in groups[:-1]} | {groups[-1].name: 0})
    return ours.ProgressiveUnfreezing(groups, plan)


def our_freezing_again() -> Finding:
    model, groups, optimizer = our_parts()
    our_fit(model, optimizer, epochs=1)
    unfreezing = ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan({"head": 0}))
    return freezing_again(state(model), lambda: our_fit(model, optimizer, epochs=1, unfreezing=unfreezing), model)


def our_thawed() -> Finding:
    model, groups, optimizer = our_parts()
    before = state(model)
    our_fit(model, optimizer, epochs=2, unfreezing=our_plan(groups))
    never = len(untrained(model, before))
    head_only = AdamW(model.fc.parameters())
    error = raised(lambda: our_fit(model, head_only, epochs=1, unfreezing=our_plan(groups)))
    return Finding(never > 0 or error is None,
                   f"parameters that never train after a plan of two stages: {never}; an optimizer that has only the head: "
                   f"{error or 'accepted'}")


def our_scheduler() -> Finding:
    makers = SCHEDULERS | {"OneCycleLR": lambda optimizer: ours.one_cycle(optimizer, 3 * BATCHES + 1)}
    results = {}
    for name, scheduler in makers.items():
        model, groups, optimizer = our_parts()
        rows = []
        error = raised(lambda o=optimizer, m=model, g=groups, s=scheduler, r=rows: r.extend(
            our_fit(m, o, epochs=3, schedule=s(o), unfreezing=our_plan(g)).rows))
        results[name] = error or ratio_change([row["lr"]["head"] / row["lr"]["stem"] for row in rows if row["lr"]["stem"]])
    return Finding(any(text != STEADY for text in results.values()), "groups that thaw in epoch 2 of 3: " + listed(results))


def our_resume() -> Finding:
    total = 3 * BATCHES
    whole, equal = our_interrupted((), total, None), []
    for stop in range(1, total):
        with tempfile.TemporaryDirectory() as folder:
            equal.append(same(whole, our_interrupted((stop,), total, Path(folder) / "run.pt")))
    return Finding(not all(equal), f"stopped at each step from 1 to {total - 1}, the unfreezing being at step {BATCHES}: "
                                   f"{sum(equal)} of {len(equal)} runs are bit-identical to the one that was not stopped")


def our_interrupted(stops: Sequence[int], total: int, path: Path | None) -> nn.Module:
    """A run that is stopped at each of ``stops`` and goes on with everything made anew."""
    for end in (*stops, total):
        model, groups, optimizer = our_parts()
        our_fit(model, optimizer, steps=end, schedule=ours.one_cycle(optimizer, total), unfreezing=our_plan(groups),
                checkpoint=path)
    return model


def our_rates_arrive() -> Finding:
    optimizer = our_parts()[2]
    own, cosine = head_to_first(optimizer), after_cosine(optimizer)
    OneCycleLR(optimizer, max_lr=LR, total_steps=10)
    return Finding(1 in (own, cosine),
                   f"head's rate over the first layer's after `layer_decay(decay=0.5)`: {own:.3g} in torch's AdamW, "
                   f"{cosine:.3g} under torch's CosineAnnealingLR; {head_to_first(optimizer):.3g} under torch's OneCycleLR "
                   "with one number as `max_lr`, which nothing here prevents (`one_cycle` passes one for each group)")


def our_unknown_model() -> Finding:
    counts = []
    for model in (resnet(), torch.compile(resnet()), Backwards()):
        groups = ours.layer_groups(model, torch.zeros(1, 3, SIZE, SIZE))
        counts.append(len({group["lr"] for group in ours.param_groups(groups, ours.layer_decay(LR, 0.5))}))
    return Finding(1 in counts, f"different rates on torchvision's ResNet-18: {counts[0]}, the same after `torch.compile`: "
                                f"{counts[1]}, a model of one's own: {counts[2]}")


def our_order() -> Finding:
    groups = ours.layer_groups(Backwards(), torch.zeros(1, 3, SIZE, SIZE))
    rates = ours.layer_decay(LR, 0.5)(groups)
    by_tensor = {name: rates[group.name] for group in groups for name in group.params}
    first, last = by_tensor["conv1.weight"] / LR, by_tensor["layer4.1.conv2.weight"] / LR
    return Finding(first > last, f"parts of the head's rate in a model defined back to front: {first:.3g} for the layer that "
                                 f"runs first, {last:.3g} for the last block")


def our_unknown_name() -> Finding:
    groups = our_parts()[1]
    tries = {"a rate": lambda: ours.param_groups(groups, {"lyer1": LR, "*": LR}),
             "a pattern in `no_weight_decay`": lambda: ours.param_groups(groups, ours.uniform(LR), no_weight_decay=["lyer1.*"]),
             "a plan": lambda: ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan({"lyer1": 0}))}
    results = {name: raised(call) or "accepted" for name, call in tries.items()}
    return Finding("accepted" in results.values(), "misspelt name in " + listed(results))


def our_keeps_ratios() -> Finding:
    makers = {"`slanted_triangular`": lambda optimizer: ours.slanted_triangular(optimizer, 20),
              "`warmup_cosine`": lambda optimizer: ours.warmup_cosine(optimizer, 20, warmup_steps=5, final_factor=0.01),
              "`one_cycle`": lambda optimizer: ours.one_cycle(optimizer, 20)}
    frames = [ours.preview(our_parts()[2], maker, 20) for maker in makers.values()]
    return kept(f"{', '.join(makers)}, head over first layer", [r for frame in frames for r in frame["head"] / frame["stem"]])


# How the probes judge.


class Backwards(nn.Module):
    """ResNet-18 with its parts defined in the reverse of the order in which they run."""

    def __init__(self):
        super().__init__()
        net = resnet()
        self.order = [name for name, _ in net.named_children()]
        for name in reversed(self.order):
            self.add_module(name, getattr(net, name))

    def forward(self, images: Tensor) -> Tensor:
        for name in self.order[:-1]:
            images = getattr(self, name)(images)
        return self.fc(images.flatten(1))


def freezing_again(before: dict[str, Tensor], run: Callable[[], object], model: nn.Module) -> Finding:
    run()
    change = moved(before, state(model), lambda name, value: value.ndim > 1 and not is_head(name))
    return Finding(change > 0, f"largest change of a kernel in an epoch after it was frozen: {amount(change)}")


def head_to_first(optimizer: Optimizer) -> float:
    return optimizer.param_groups[-1]["lr"] / optimizer.param_groups[0]["lr"]


def after_cosine(optimizer: Optimizer) -> float:
    """The head's rate over the first layer's half way along torch's CosineAnnealingLR."""
    scheduler = CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    return head_to_first(optimizer)


def verdict(equal: bool) -> str:
    return "bit-identical" if equal else "differs"


def steady(ratios: Sequence[float]) -> bool:
    return all(math.isclose(value, ratios[0], rel_tol=1e-6) for value in ratios)


def ratio_span(ratios: Sequence[float]) -> str:
    return f"{ratios[0]:.3g} at first, {ratios[-1]:.3g} at last"


def ratio_change(ratios: Sequence[float]) -> str:
    return STEADY if steady(ratios) else f"goes on in silence, head over new group {ratio_span(ratios)}"


def kept(what: str, ratios: Sequence[float], more: str = "") -> Finding:
    return Finding(not steady(ratios), f"{what}: {ratio_span(ratios)}{more}")


def raised(call: Callable[[], object]) -> str | None:
    """The name of the exception that a call raises, or None."""
    try:
        call()
    except Exception as error:  # which one is what is measured
        return type(error).__name__
    return None


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[logging.LogRecord]]:
    """The warnings that a library logs, kept from being printed."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger(name)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def listed(results: dict[str, str]) -> str:
    return ", ".join(f"{name}: {text}" for name, text in results.items())


# The table.


def frozen_row(measure: str, what: str) -> dict[str, Probe]:
    return {library: frozen(library, measure, what) for library in FROZEN}


def row(*probes: Probe) -> dict[str, Probe]:
    return dict(zip((*PEERS, OURS), probes, strict=True))


NO_PLAN = without("thawing during a run is left to its user")
PITFALLS: dict[str, dict[str, Probe]] = {
    "A frozen layer's BatchNorm statistics move in train mode":
        frozen_row("statistics", "largest change of a running statistic"),
    "A frozen layer's BatchNorm scale and shift still train":
        frozen_row("scale", "largest change of a scale or shift"),
    "A frozen layer normalises by the batch in train mode, so its output is not that of eval mode":
        frozen_row("gap", "relative difference between the backbone's output at the last step and in eval mode"),
    "Frozen after it has trained, a layer is still moved by momentum or weight decay":
        row(timm_freezing_again, fastai_freezing_again, lightning_freezing_again, our_freezing_again),
    "After unfreezing, some parameters are in no optimizer and never train":
        row(timm_thawed, fastai_thawed, lightning_thawed, our_thawed),
    "Unfreezing stops or derails the learning-rate schedule":
        row(NO_PLAN, fastai_scheduler, lightning_scheduler, our_scheduler),
    "A run resumed around an unfreezing fails or differs from one that was never stopped":
        row(timm_resume, fastai_resume, lightning_resume, our_resume),
    "Layer-wise rates are lost on torch's own optimizers and schedulers":
        row(timm_rates_arrive, fastai_rates_arrive, lightning_rates_arrive, our_rates_arrive),
    "A model that the library does not know gets one rate everywhere":
        row(timm_unknown_model, fastai_unknown_model, lightning_unknown_model, our_unknown_model),
    "Layers are ordered as they are defined, not as they run":
        row(timm_order, without("the user's splitter says it"), without("the user's callback says it"), our_order),
    "A name, pattern or index of a group that does not exist is accepted in silence":
        row(timm_unknown_name, fastai_unknown_name, without("it takes modules, not names"), our_unknown_name),
    "The library's own schedule changes the ratios between the layers' rates":
        row(timm_keeps_ratios, fastai_keeps_ratios, lightning_keeps_ratios, our_keeps_ratios),
}


def columns() -> list[str]:
    """The libraries that are installed; says how to get the others."""
    installed = {"timm": timm, "fastai": fastai, "Lightning": lightning}
    for library, package in PEERS.items():
        if installed[library] is None:
            print(f"{library} is left out: the package {package} is not installed; pip install .[compare] installs it")
    return [*(library for library in PEERS if installed[library] is not None), OURS]


def table(findings: dict[str, dict[str, Finding]], libraries: Sequence[str]) -> str:
    lines = [f"| | pitfall | {' | '.join(libraries)} |", "|" + "---|" * (len(libraries) + 2)]
    lines += [f"| {i} | {title} | {' | '.join(cells[library].cell for library in libraries)} |"
              for i, (title, cells) in enumerate(findings.items(), start=1)]
    return "\n".join(lines)


def notes(findings: dict[str, dict[str, Finding]]) -> str:
    parts = []
    for i, (title, cells) in enumerate(findings.items(), start=1):
        lines = [f"- {library}, {finding.cell}: {finding.note}." for library, finding in cells.items()]
        parts.append("\n".join([f"**{i}. {title}.**", "", *lines]))
    return "\n\n".join(parts)


def document(findings: dict[str, dict[str, Finding]], libraries: Sequence[str]) -> str:
    packages = [*PEERS.values(), "torch", "torchvision"]
    versions = ", ".join(f"{package} {version(package).split('+')[0]}" for package in packages)
    return f"""# Pitfalls of layer-wise fine-tuning, and who falls into them

Each cell was measured by running the library, used as its documentation says, on a ResNet-18 with random weights and a
few images of noise. "Falls in" means that what the row says happened in documented use, with the defaults; where an
option avoids it, the notes name the option. Some of it is by design and documented: fastai and Lightning let BatchNorm
train in frozen layers on purpose, and Lightning's backbone is meant to catch up with the head. "n/a" means that the
library leaves this to its user. The probes test what this package set out to avoid, so read the column `{OURS}` as a regression
test and the others as what to look out for; each of these libraries does much that this one does not.

Versions: {versions}.

This page is generated: `pip install .[compare]`, then `python benchmarks/peers.py`.

{table(findings, libraries)}

## What was measured

{notes(findings)}
"""


def main() -> None:
    """Run every probe, print the table, and write the document if no library is missing."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as fast for models as small as these, and the same numbers everywhere
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    libraries = columns()
    findings = {title: {library: probes[library]() for library in libraries} for title, probes in PITFALLS.items()}
    print(table(findings, libraries), notes(findings), sep="\n\n")
    if len(libraries) <= len(PEERS):
        print("\ndocs/pitfalls.md is left as it is, since not all libraries are installed")
    else:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(findings, libraries), encoding="utf-8")


if __name__ == "__main__":
    main()
