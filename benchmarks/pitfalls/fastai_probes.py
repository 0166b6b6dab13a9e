"""The probes of fastai, in the order of the document's rows."""

import functools
import tempfile
import warnings

import fastai.vision.all as fastai
from torch import nn
from torch.optim import AdamW

from benchmarks.pitfalls import shared
from benchmarks.pitfalls.shared import LR, Finding, noise, resnet18

STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("fc",))
RATES = slice(LR / 100, LR)


def stage_parameters(model: nn.Module) -> list[list[nn.Parameter]]:
    return [[p for name in stage for p in getattr(model, name).parameters()] for stage in STAGES]


def new_learner(**options) -> fastai.Learner:
    options = {"splitter": stage_parameters, "loss_func": nn.CrossEntropyLoss(), "lr": LR} | options
    learner = fastai.Learner(fastai.DataLoaders(noise(), noise()), resnet18(), **options)
    learner.remove_cbs(fastai.ProgressCallback)
    learner.logger = lambda *_: None
    return learner


class RecordRatios(fastai.Callback):
    """Records the head's rate over the first layer's at each step; unfreezes at the start of an epoch, if one is given."""

    def __init__(self, unfreeze_at: int | None = None):
        self.unfreeze_at, self.ratios = unfreeze_at, []

    def before_epoch(self):
        if self.epoch == self.unfreeze_at:
            self.learn.unfreeze()

    def before_step(self):
        self.ratios.append(shared.head_over_first(self.learn.opt))


def train_on_frozen(**options) -> tuple[float, float, float]:
    learner = new_learner(**options)
    learner.freeze()
    return shared.trained_on_frozen(learner.model, learner.model.fc, lambda: learner.fit(2))


frozen_statistics, frozen_scale, frozen_output = shared.frozen_backbone_probes({
    "`Learner.freeze`": train_on_frozen,
    "`train_bn=False`": lambda: train_on_frozen(train_bn=False),
    "`train_bn=False` and the callback `BnFreeze`": lambda: train_on_frozen(train_bn=False, cbs=[fastai.BnFreeze()])})


def frozen_after_training() -> Finding:
    def finding(**options) -> Finding:
        learner = new_learner(**options)
        learner.fit(1)
        learner.freeze()
        return shared.trained_then_frozen(learner.model, shared.copied_state(learner.model), lambda: learner.fit(1))

    default, without_decay = finding(), finding(wd=0)
    return Finding(default.falls_in, f"{default.note} (its `zero_grad` leaves gradients of 0, so weight decay goes on); "
                                     f"with `wd=0`, {without_decay.note}")


def unfrozen_parameters() -> Finding:
    learner = new_learner()
    before = shared.copied_state(learner.model)
    learner.freeze()
    learner.fit(1)
    learner.unfreeze()
    learner.fit(1, RATES)
    count = shared.untrained(learner.model, before)
    return Finding(count > 0, f"parameters that never train after `unfreeze`: {count}")


def schedule_after_unfreezing() -> Finding:
    learner, recorder = new_learner(), RecordRatios(unfreeze_at=1)
    learner.freeze()
    learner.fit_one_cycle(3, RATES, cbs=recorder)
    return shared.ratio_finding("`unfreeze` inside `fit_one_cycle`, head's rate over the first layer's", recorder.ratios)


def resumed_run() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        whole = new_learner(path=folder)
        whole.freeze()
        whole.fit_one_cycle(1, LR)
        whole.save("frozen")
        whole.unfreeze()
        saving = fastai.SaveModelCallback(fname="epoch", every_epoch=True, with_opt=True)
        whole.fit_one_cycle(2, RATES, cbs=saving)
        resumed = new_learner(path=folder).load("epoch_0")
        resumed.fit_one_cycle(2, RATES, start_epoch=1)
        frozen = new_learner(path=folder).load("frozen")
    outcome = shared.compared(whole.model, resumed.model)
    trainable = sum(p.requires_grad for name, p in frozen.model.named_parameters() if not shared.is_head(name))
    return Finding(outcome != "bit-identical",
                   f"stopped after the first of two unfrozen epochs, then `load` and `start_epoch`: {outcome}; a checkpoint of "
                   f"the frozen phase loads with {trainable} backbone tensors trainable, so call `freeze` again after `load`")


def rates_in_torch() -> Finding:
    ratios = []
    for options in ({}, {"opt_func": functools.partial(fastai.OptimWrapper, opt=AdamW)}):
        learner = new_learner(**options)
        learner.fit(1, RATES)
        ratios.append(shared.head_over_first(learner.opt.opt if options else learner.opt))
    return Finding(1 in ratios, f"head's rate over the first layer's after `slice(lr / 100, lr)`: {ratios[0]:.3g} in its own "
                                f"Adam, {ratios[1]:.3g} in torch's AdamW through `OptimWrapper`")


def unknown_model() -> Finding:
    def different_rates(**options) -> int:
        learner = new_learner(**options)
        learner.create_opt()
        learner.opt.set_hyper("lr", RATES)
        return len({float(group["lr"]) for group in learner.opt.param_groups})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = different_rates(splitter=fastai.trainable_params)  # the default of Learner
    return Finding(count == 1,
                   f"different rates after `slice(lr / 100, lr)` in a `Learner` with its default splitter: {count} "
                   f"(warnings: {len(caught)}); with a splitter written for this model: {different_rates()} "
                   "(`vision_learner` brings splitters for the models it knows)")


layer_order = shared.not_applicable("the user's splitter says it")


def unknown_name() -> Finding:
    learner, count = new_learner(), len(STAGES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = shared.error_name(lambda: learner.freeze_to(-count - 3))
    frozen = "nothing" if all(p.requires_grad for p in learner.model.parameters()) else "something"
    wrong_number = shared.error_name(lambda: learner.opt.set_hyper("lr", [LR, LR]))
    return Finding(error is None and not caught,
                   f"`freeze_to(-{count + 3})` with {count} groups: {error or 'accepted'}, {frozen} is frozen; two rates for "
                   f"{count} groups: {wrong_number or 'accepted'}")


def ratios_of_rates() -> Finding:
    recorder = RecordRatios()
    new_learner().fit_one_cycle(3, RATES, cbs=recorder)
    return shared.ratio_finding("`fit_one_cycle`, head over first layer", recorder.ratios)
