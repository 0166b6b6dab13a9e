"""Wrong answers to the exercises of notebook 04 that somebody could well give."""

import torch
from torch.nn.functional import cross_entropy


def steps(model, optimizer, batches, set_to_none=True):
    for inputs, labels in batches:
        optimizer.zero_grad(set_to_none=set_to_none)
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def freeze(model, head):
    model.requires_grad_(False)
    head.requires_grad_(True)


def flag_of_the_module(model, head, optimizer, batches):
    model.requires_grad, head.requires_grad = False, True
    steps(model.eval(), optimizer, batches)


def head_frozen_too(model, head, optimizer, batches):
    model.requires_grad_(False)
    head.requires_grad = True
    steps(model.eval(), optimizer, batches)


def zeros(model, head, optimizer, batches):
    freeze(model, head)
    steps(model.eval(), optimizer, batches, set_to_none=False)


def emptied_after_the_step(model, head, optimizer, batches):
    freeze(model.eval(), head)
    for inputs, labels in batches:
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def eval_before_train(model, head, optimizer, batches):
    freeze(model.eval(), head)
    steps(model.train(), optimizer, batches)


def statistics_not_tracked(model, head, optimizer, batches):
    freeze(model.train(), head)
    for module in model.modules():
        module.track_running_stats = False
    steps(model, optimizer, batches)


def emptied_once(model, head, optimizer, batches):
    freeze(model.eval(), head)
    optimizer.zero_grad()
    for inputs, labels in batches:
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def never_stepped(model, head, optimizer, batches):
    freeze(model.eval(), head)
    for inputs, labels in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()


def last_batch_only(model, head, optimizer, batches):
    freeze(model.eval(), head)
    steps(model, optimizer, batches[-1:])


def changed(kept=lambda model: {name: value.clone() for name, value in model.state_dict().items()},
            looked_at=lambda model: model.state_dict(), in_head=lambda name, head: name.startswith(f"{head}."),
            equal=torch.equal):
    def names(head, model, train):
        before = kept(model)
        train(model)
        return {name for name, value in dict(looked_at(model)).items()
                if not in_head(name, head) and not equal(value, before[name])}
    return names


class RemembersWhatTrains:
    def __init__(self):
        self.joined = 0

    def __call__(self, step, names, every):
        if step % every == 0:
            self.joined += 1
        return [*names[:-1][:self.joined], names[-1]]


def one_step_late(step, names, every):
    return [*[name for i, name in enumerate(names[:-1]) if step > i * every or i == 0], names[-1]]


def plateau(better=lambda loss, best: loss < best, since_last=False, again=True, longer=0, in_a_row=True, forget=False):
    def epochs(losses, patience):
        best, waited, found = losses[0], 0, []
        for epoch, loss in enumerate(losses[1:], start=2):
            if not better(loss, best):
                waited += 1
            elif in_a_row:
                waited = 0
            if better(loss, best) or since_last:
                best = loss
            if waited >= patience + longer and not better(loss, best):
                found.append(epoch)
                waited = 0 if again else waited
                best = float("inf") if forget else best
        return found
    return epochs


def places(plan, names, step):
    return [i for i, name in enumerate(names) if plan.get(name, step + 1) <= step]


WRONG = {
    "4.1": [flag_of_the_module, head_frozen_too, zeros, emptied_after_the_step, eval_before_train, statistics_not_tracked,
            emptied_once, never_stepped],
    "4.2": [changed(kept=lambda model: model.state_dict()), changed(looked_at=lambda model: model.named_parameters()),
            changed(looked_at=lambda model: model.named_buffers()), changed(in_head=lambda name, head: name.startswith(head)),
            changed(equal=lambda new, old: torch.allclose(new.float(), old.float())),
            changed(in_head=lambda name, head: False), changed(in_head=lambda name, head: name.split(".")[0] == head),
            changed(in_head=lambda name, head: name.split(".")[0] == head.split(".")[0]),
            changed(equal=lambda new, old: not new.is_floating_point() or torch.equal(new, old)),
            lambda head, model, train: train(model), lambda head, model, train: head],
    "4.3": [lambda step, names, every: names[:1 + step // every], lambda step, names, every: names[-1 - step // every:],
            lambda step, names, every: [*names[:-1][:step // every], names[-1]], one_step_late,
            lambda step, names, every: {*names[:-1][step // every:][:1], names[-1]}, RemembersWhatTrains(),
            lambda step, names, every: [*names[:-1][:1 + step], names[-1]], lambda step, names, every: names,
            lambda step, names, every: 1 + step // every,
            lambda step, names, every: [*names[:step // every + 1], names[-1]]],
    "4.4": [plateau(since_last=True), plateau(lambda loss, best: loss <= best), plateau(again=False), plateau(longer=1),
            plateau(lambda loss, best: loss > best), plateau(in_a_row=False), plateau(forget=True),
            lambda losses, patience: plateau()(losses, patience)[:1],
            lambda losses, patience: [epoch - 1 for epoch in plateau()(losses, patience)]],
    "4.5": [lambda plan, names, step: len(places(plan, names, step)),
            lambda plan, names, step: len(names) - min(places(plan, names, step), default=len(names)) - 1,
            lambda plan, names, step: len(names) - max(places(plan, names, step), default=len(names)),
            lambda plan, names, step: min(places(plan, names, step), default=-1) + 1,
            lambda plan, names, step: len(names) - min(places(plan, names, step - 1), default=len(names)),
            lambda plan, names, step: len(names) - min(places(plan, names, 1000)), lambda plan, names, step: 5,
            lambda plan, names, step: len(names) - min(places(plan, names, step), default=0)],
}
