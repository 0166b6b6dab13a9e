"""Wrong answers to the exercises of notebook 02 that somebody could well give."""

import torch
from torch.nn.functional import cross_entropy


def from_the_stem(groups, head_lr, decay):
    deepest = max(group.depth for group in groups)
    return {group.name: head_lr * decay ** (deepest - group.depth) for group in groups}


def one_factor_too_many(groups, head_lr, decay):
    return {group.name: head_lr * decay ** (group.depth + 1) for group in groups}


def by_place_in_the_list(groups, head_lr, decay):
    return {group.name: head_lr * decay ** i for i, group in enumerate(reversed(groups))}


def by_subtraction(groups, head_lr, decay):
    return {group.name: head_lr - head_lr * (1 - decay) * group.depth for group in groups}


def only_the_head_differs(groups, head_lr, decay):
    return {group.name: head_lr if group.depth == 0 else head_lr * decay for group in groups}


def a_list(groups, head_lr, decay):
    return [head_lr * decay ** group.depth for group in groups]


def train_emptied(model, optimizer, batches):
    model.train()
    for inputs, labels in batches:
        cross_entropy(model(inputs), labels).backward()
        optimizer.zero_grad()
        optimizer.step()


def train_never_emptied(model, optimizer, batches):
    model.train()
    for inputs, labels in batches:
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def train_emptied_once(model, optimizer, batches):
    optimizer.zero_grad()
    train_never_emptied(model, optimizer, batches)


def train_late(model, optimizer, batches):
    model.train()
    for inputs, labels in batches:
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()


def train_in_eval_mode(model, optimizer, batches):
    for inputs, labels in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def pull(factor):
    def change(groups):
        head = groups[-1]
        for group in groups:
            group["weight_decay"] *= factor(group["lr"], head["lr"])
    return change


def equal_rates(groups):
    for group in groups:
        group["lr"] = groups[-1]["lr"]


def names_that_it_has(model, optimizer):
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in held]


def first_group_only(model, optimizer):
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    return [name for name, p in model.named_parameters() if id(p) not in held]


def by_value(model, optimizer):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [name for name, p in model.named_parameters()
            if not any(torch.equal(p.flatten()[:1], other.flatten()[:1]) for other in held)]


def by_gradient(model, optimizer):
    return [name for name, p in model.named_parameters() if not p.requires_grad]


WRONG = {
    "2.1": [from_the_stem, one_factor_too_many, by_place_in_the_list, by_subtraction, only_the_head_differs, a_list],
    "2.2": [train_emptied, train_never_emptied, train_late, train_in_eval_mode],
    "2.3": [pull(lambda lr, head: lr / head), pull(lambda lr, head: 1), pull(lambda lr, head: 1 / lr), equal_rates],
    "2.4": [lambda decay, depth, new: decay, lambda decay, depth, new: decay ** (new / depth),
            lambda decay, depth, new: decay * depth / new, lambda decay, depth, new: 1 - (1 - decay) * depth / new],
    "2.5": [names_that_it_has, first_group_only, by_gradient, lambda model, optimizer: len(list(model.parameters()))],
}
