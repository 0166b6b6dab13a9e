"""Wrong answers to the exercises of notebook 03 that somebody could well give."""

import math
from itertools import combinations, pairwise

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import layerlr_helpers as ll


def cosine(part):
    return (1 + math.cos(math.pi * part)) / 2


def up(step, warmup):
    return (step + 1) / (warmup + 1)


def from_zero(step, total, warmup, floor):
    return step / warmup if step < warmup else floor + (1 - floor) * cosine((step - warmup) / (total - warmup))


def one_step_early(step, total, warmup, floor):
    return (step + 1) / warmup if step < warmup else floor + (1 - floor) * cosine((step - warmup) / (total - warmup))


def with_a_jump(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else floor + (1 - floor) * cosine(step / total)


def too_long(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else floor + (1 - floor) * cosine((step - warmup) / total)


def to_the_last_step_only(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else floor + (1 - floor) * cosine((step - warmup) / (total - 1 - warmup))


def whole_wave(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else floor + (1 - floor) * cosine(2 * (step - warmup) / (total - warmup))


def without_floor(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else cosine((step - warmup) / (total - warmup))


def cut_off(step, total, warmup, floor):
    return max(floor, without_floor(step, total, warmup, floor)) if step >= warmup else up(step, warmup)


def floor_added(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else floor + cosine((step - warmup) / (total - warmup))


def without_warmup(step, total, warmup, floor):
    return floor + (1 - floor) * cosine(step / total)


def bare_cosine(step, total, warmup, floor):
    return up(step, warmup) if step < warmup else math.cos(math.pi * (step - warmup) / (total - warmup))


def floor_under_all(step, total, warmup, floor):
    return floor + (1 - floor) * without_floor(step, total, warmup, floor)


def with_eta_min(floor_of):
    def schedule(optimizer, total, share):
        return CosineAnnealingLR(optimizer, total, eta_min=floor_of([group["lr"] for group in optimizer.param_groups], share))
    return schedule


def cut_off_below(optimizer, total, share):
    return LambdaLR(optimizer, lambda step: max(share, cosine(step / total)))


def returns_nothing(optimizer, total, share):
    ll.warmup_cosine(optimizer, total, warmup_steps=0, final_factor=share)


def with_warmup(optimizer, total, share):
    return ll.warmup_cosine(optimizer, total, warmup_steps=total // 10, final_factor=share)


def to_the_last_step(optimizer, total, share):
    return ll.warmup_cosine(optimizer, total - 1, warmup_steps=0, final_factor=share)


def cycle_with_one_peak(optimizer, total, share):
    return OneCycleLR(optimizer, max_lr=optimizer.param_groups[-1]["lr"], total_steps=total, final_div_factor=1 / share,
                      cycle_momentum=False)


def calls(number_of):
    return lambda loader, epochs: [number_of(epoch, loader) for epoch in epochs]


def distances(loader, epochs):
    return [(epoch - before) * len(loader) for before, epoch in pairwise([0, *epochs])]


def one_number(loader, epochs):
    return len(loader)


def loop(in_batch, after_epoch=(), empties=True, before_epoch=()):
    def train(model, optimizer, schedule, loader, epochs):
        def do(parts):
            for part in parts:
                {"optimizer": optimizer, "schedule": schedule}[part].step()

        for _ in range(epochs):
            do(before_epoch)
            for inputs, labels in loader:
                if empties:
                    optimizer.zero_grad()
                cross_entropy(model(inputs), labels).backward()
                do(in_batch)
            do(after_epoch)
    return train


def pairs_of(rates):
    rates = rates.where(rates > 0)
    return [(rates[one] / rates[other]).dropna() for one, other in combinations(rates, 2)]


def spread(ratio):
    return ratio.max() / ratio.min()


def first_and_last(rates):
    return max(max(ratio.iloc[0] / ratio.iloc[-1], ratio.iloc[-1] / ratio.iloc[0]) for ratio in pairs_of(rates))


def largest_ratio(rates):
    return max(ratio.max() for ratio in pairs_of(rates))


def ends_only(rates):
    rates = rates.where(rates > 0)
    return spread(rates.iloc[:, 0] / rates.iloc[:, -1])


def against(column):
    def drift(rates):
        rates = rates.where(rates > 0)
        relative = rates.div(rates.iloc[:, column], axis=0)
        return (relative.max() / relative.min()).max()
    return drift


def neighbours_only(rates):
    rates = rates.where(rates > 0)
    return max(spread(rates[one] / rates[other]) for one, other in pairwise(rates))


def with_zeros(rates):
    return max(spread(rates[one] / rates[other]) for one, other in combinations(rates, 2))


def difference(rates):
    return max(ratio.max() - ratio.min() for ratio in pairs_of(rates))


def fall_of_the_rates(rates):
    return rates.where(rates > 0).apply(spread).max()


def yes_or_no(rates):
    return max(map(spread, pairs_of(rates))) > 1.01


WRONG = {
    "3.1": [from_zero, one_step_early, with_a_jump, too_long, to_the_last_step_only, whole_wave, without_floor, cut_off,
            floor_added, without_warmup, bare_cosine, floor_under_all],
    "3.2": [with_eta_min(lambda rates, share: share), with_eta_min(lambda rates, share: 0),
            with_eta_min(lambda rates, share: share * rates[-1]), with_eta_min(lambda rates, share: share * min(rates)),
            cut_off_below, returns_nothing, with_warmup, to_the_last_step, cycle_with_one_peak],
    "3.3": [calls(lambda epoch, loader: epoch), calls(lambda epoch, loader: epoch * len(loader.dataset)),
            calls(lambda epoch, loader: epoch * loader.batch_size),
            calls(lambda epoch, loader: epoch * (len(loader.dataset) // loader.batch_size)),
            calls(lambda epoch, loader: epoch * math.ceil(len(loader.dataset) / loader.batch_size)),
            calls(lambda epoch, loader: epoch * len(loader) - 1), calls(lambda epoch, loader: (epoch - 1) * len(loader)),
            distances, one_number],
    "3.4": [loop(["schedule", "optimizer"]), loop(["optimizer"], ["schedule"]), loop(["optimizer", "schedule"], ["schedule"]),
            loop(["schedule"]), loop(["optimizer"]), loop([], ["optimizer", "schedule"]),
            loop(["optimizer", "schedule", "schedule"]), loop(["optimizer", "schedule"], empties=False),
            loop(["optimizer"], before_epoch=["schedule"])],
    "3.5": [first_and_last, largest_ratio, ends_only, neighbours_only, with_zeros, difference, fall_of_the_rates, yes_or_no,
            against(0), against(-1), lambda rates: torch.ones(2)],
}
