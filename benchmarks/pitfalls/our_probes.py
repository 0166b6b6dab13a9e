"""The probes of layerlr_helpers, in the order of the document's rows."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import layerlr_helpers as ours
from benchmarks.pitfalls import shared
from benchmarks.pitfalls.shared import LR, STEPS_PER_EPOCH, Finding, noise, resnet18

DECAY = ours.layer_decay(LR, 0.5)


def layer_groups(model: nn.Module) -> list[ours.LayerGroup]:
    return ours.layer_groups(model, torch.zeros(1, 3, shared.IMAGE_SIZE, shared.IMAGE_SIZE))


def new_run() -> tuple[nn.Module, list[ours.LayerGroup], Optimizer]:
    """A model, its layer groups and an optimizer in which each group has half of the next one's rate."""
    model = resnet18()
    groups = layer_groups(model)
    return model, groups, AdamW(ours.param_groups(groups, DECAY, weight_decay=0.05))


def head_only(groups: list[ours.LayerGroup], batch_norm: str = "freeze") -> ours.ProgressiveUnfreezing:
    return ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan({"head": 0}), batch_norm=batch_norm)


def head_then_all(groups: list[ours.LayerGroup]) -> ours.ProgressiveUnfreezing:
    """Trains the head for one epoch, then everything."""
    return ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan({"*": STEPS_PER_EPOCH, "head": 0}))


def train(model: nn.Module, optimizer: Optimizer, **options) -> ours.History:
    return ours.fit(model, optimizer, noise(), progress=False, **options)


def train_on_frozen(batch_norm: str = "freeze") -> tuple[float, float, float]:
    model, groups, optimizer = new_run()
    unfreezing = head_only(groups, batch_norm)
    return shared.trained_on_frozen(model, model.fc, lambda: train(model, optimizer, epochs=2, unfreezing=unfreezing))


frozen_statistics, frozen_scale, frozen_output = shared.frozen_backbone_probes({
    "`ProgressiveUnfreezing`": train_on_frozen,
    '`batch_norm="statistics"`': lambda: train_on_frozen("statistics"),
    '`batch_norm="train"`': lambda: train_on_frozen("train")})


def frozen_after_training() -> Finding:
    model, groups, optimizer = new_run()
    train(model, optimizer, epochs=1)
    before, unfreezing = shared.copied_state(model), head_only(groups)
    return shared.trained_then_frozen(model, before, lambda: train(model, optimizer, epochs=1, unfreezing=unfreezing))


def unfrozen_parameters() -> Finding:
    model, groups, optimizer = new_run()
    before = shared.copied_state(model)
    train(model, optimizer, epochs=2, unfreezing=head_then_all(groups))
    count, head_optimizer = shared.untrained(model, before), AdamW(model.fc.parameters())
    error = shared.error_name(lambda: train(model, head_optimizer, epochs=1, unfreezing=head_then_all(groups)))
    return Finding(count > 0 or error is None,
                   f"parameters that never train after a plan of two stages: {count}; an optimizer that has only the head: "
                   f"{error or 'accepted'}")


def schedule_after_unfreezing() -> Finding:
    def head_over_stem(scheduler) -> list[float]:
        model, groups, optimizer = new_run()
        history = train(model, optimizer, epochs=3, schedule=scheduler(optimizer), unfreezing=head_then_all(groups))
        return [row["lr"]["head"] / row["lr"]["stem"] for row in history.rows if row["lr"]["stem"]]

    one_cycle = {"OneCycleLR": lambda optimizer: ours.one_cycle(optimizer, 3 * STEPS_PER_EPOCH + 1)}
    return shared.schedulers_finding("groups that are unfrozen in epoch 2 of 3", head_over_stem, shared.SCHEDULERS | one_cycle)


def resumed_run() -> Finding:
    total = 3 * STEPS_PER_EPOCH

    def trained_with_stops(*stops: int, checkpoint: Path | None = None) -> nn.Module:
        """Train to each of the stops and then to the end, each time with a new model, optimizer and schedule."""
        for steps in (*stops, total):
            model, groups, optimizer = new_run()
            train(model, optimizer, steps=steps, schedule=ours.one_cycle(optimizer, total), unfreezing=head_then_all(groups),
                  checkpoint=checkpoint)
        return model

    whole, outcomes = trained_with_stops(), []
    for stop in range(1, total):
        with tempfile.TemporaryDirectory() as folder:
            resumed = trained_with_stops(stop, checkpoint=Path(folder) / "run.pt")
        outcomes.append(shared.compared(whole, resumed))
    identical = outcomes.count("bit-identical")
    return Finding(identical < len(outcomes),
                   f"stopped at each step from 1 to {total - 1}, the unfreezing being at step {STEPS_PER_EPOCH}: "
                   f"{identical} of {len(outcomes)} runs are bit-identical to the one that was not stopped")


def rates_in_torch() -> Finding:
    _, _, optimizer = new_run()
    return shared.rates_in_torch_finding(
        "`layer_decay(decay=0.5)`", optimizer, lambda optimizer: OneCycleLR(optimizer, max_lr=LR, total_steps=10),
        "torch's OneCycleLR with one number as `max_lr`, which nothing here prevents (`one_cycle` passes one for each group)")


def unknown_model() -> Finding:
    counts = [len({group["lr"] for group in ours.param_groups(layer_groups(model), DECAY)})
              for model in (resnet18(), torch.compile(resnet18()), shared.DefinedInReverse())]
    return Finding(1 in counts, f"different rates on torchvision's ResNet-18: {counts[0]}, the same after `torch.compile`: "
                                f"{counts[1]}, a model of one's own: {counts[2]}")


def layer_order() -> Finding:
    groups = layer_groups(shared.DefinedInReverse())
    rates = DECAY(groups)
    return shared.layer_order_finding("parts of the head's rate in",
                                      {name: rates[group.name] / LR for group in groups for name in group.params})


def unknown_name() -> Finding:
    groups = layer_groups(resnet18())
    calls = {
        "a rate": lambda: ours.param_groups(groups, {"lyer1": LR, "*": LR}),
        "a pattern in `no_weight_decay`": lambda: ours.param_groups(groups, ours.uniform(LR), no_weight_decay=["lyer1.*"]),
        "a plan": lambda: ours.ProgressiveUnfreezing(groups, ours.UnfreezePlan({"lyer1": 0})),
    }
    outcomes = {name: shared.error_name(call) or "accepted" for name, call in calls.items()}
    return Finding("accepted" in outcomes.values(), "misspelt name in " + shared.listed(outcomes))


def ratios_of_rates() -> Finding:
    schedules = {"`slanted_triangular`": lambda optimizer: ours.slanted_triangular(optimizer, 20),
                 "`warmup_cosine`": lambda optimizer: ours.warmup_cosine(optimizer, 20, warmup_steps=5, final_factor=0.01),
                 "`one_cycle`": lambda optimizer: ours.one_cycle(optimizer, 20)}
    ratios = []
    for schedule in schedules.values():
        _, _, optimizer = new_run()
        rates = ours.preview(optimizer, schedule, 20)
        ratios += list(rates["head"] / rates["stem"])
    return shared.ratio_finding(f"{', '.join(schedules)}, head over first layer", ratios)
