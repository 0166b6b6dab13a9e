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


def pull_on_a_copy(groups):
    head = groups[-1]
    return [group | {"weight_decay": head["lr"] * head["weight_decay"] / group["lr"]} for group in groups]


def held_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def what_it_lacks(optimizer, model):
    held = {id(p) for p in held_by(optimizer)}
    return len([name for name, p in model.named_parameters() if id(p) not in held])


def held_by_value(optimizer, model):
    return sum(not any(torch.equal(p, q) for q in model.parameters()) for p in held_by(optimizer))


def held_by_shape(optimizer, model):
    return len([p for p in held_by(optimizer) if p.shape not in [q.shape for q in model.parameters()]])


def difference_of_lengths(optimizer, model):
    return len(held_by(optimizer)) - len(list(model.parameters()))


def difference_not_below_zero(optimizer, model):
    return max(difference_of_lengths(optimizer, model), 0)


def in_the_first_group(optimizer, model):
    own = {id(p) for p in model.parameters()}
    return sum(id(p) not in own for p in optimizer.param_groups[0]["params"])


def numbers_in_tensors(optimizer, model):
    own = {id(p) for p in model.parameters()}
    return sum(p.numel() for p in held_by(optimizer) if id(p) not in own)


def the_tensors_themselves(optimizer, model):
    own = {id(p) for p in model.parameters()}
    return [p for p in held_by(optimizer) if id(p) not in own]


def without_gradient(optimizer, model):
    return len([p for p in held_by(optimizer) if p.grad is None])


def not_trainable(optimizer, model):
    return len([p for p in held_by(optimizer) if not p.requires_grad])


WRONG = {
    "2.1": [from_the_stem, one_factor_too_many, by_place_in_the_list, by_subtraction, only_the_head_differs, a_list],
    "2.2": [train_emptied, train_never_emptied, train_late, train_in_eval_mode],
    "2.3": [pull(lambda lr, head: lr / head), pull(lambda lr, head: 1), pull(lambda lr, head: 1 / lr), equal_rates,
            pull_on_a_copy],
    "2.4": [lambda decay, depth, new: decay, lambda decay, depth, new: decay ** (new / depth),
            lambda decay, depth, new: decay * depth / new, lambda decay, depth, new: 1 - (1 - decay) * depth / new],
    "2.5": [what_it_lacks, held_by_value, held_by_shape, difference_of_lengths, difference_not_below_zero, in_the_first_group,
            numbers_in_tensors, the_tensors_themselves, without_gradient, not_trainable],
}
