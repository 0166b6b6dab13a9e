"""Wrong answers to the exercises of notebook 06 that somebody could well give."""

import copy

import torch
from torch import nn

import layerlr_helpers as ll


def groups_with(rate, spared):
    def make(groups, head_lr, decay, weight_decay):
        return [{"params": [p], "lr": rate(groups, group, head_lr, decay),
                 "weight_decay": 0.0 if spared(name, p) else weight_decay}
                for group in groups for name, p in group.params.items()]
    return make


def right_rate(groups, group, head_lr, decay):
    return head_lr * decay ** group.depth


def rate_by_place(groups, group, head_lr, decay):
    return head_lr * decay ** (len(groups) - 1 - groups.index(group))


def rate_one_too_low(groups, group, head_lr, decay):
    return head_lr * decay ** (group.depth + 1)


def is_vector(name, p):
    return p.ndim < 2


def norms_by_another_name(name, p):
    return "norm" in name.lower() or name.endswith("bias")


def matrices_only(groups, head_lr, decay, weight_decay):
    return [{"params": [p for p in group.params.values() if p.ndim > 1], "lr": head_lr, "weight_decay": weight_decay}
            for group in groups]


def with_the_helper_but_all_decayed(groups, head_lr, decay, weight_decay):
    return ll.param_groups(groups, ll.layer_decay(head_lr, decay), weight_decay=weight_decay)


def by_name_of_the_group(groups, head_lr, decay, weight_decay):
    return {group.name: head_lr * decay ** group.depth for group in groups}


def carried(rate_at, head=lambda head_lr, top_lr, decay: head_lr):
    def carry_over(groups, head_lr, top_lr, below_lr):
        decay = below_lr / top_lr
        return {g.name: rate_at(g.depth, head_lr, top_lr, decay) if g.depth else head(head_lr, top_lr, decay) for g in groups}
    return carry_over


def carried_by_place(groups, head_lr, top_lr, below_lr):
    return {g.name: head_lr if i == 0 else top_lr * (below_lr / top_lr) ** (i - 1) for i, g in enumerate(reversed(groups))}


def upside_down(groups, head_lr, top_lr, below_lr):
    return {g.name: head_lr if g.depth == 0 else top_lr * (top_lr / below_lr) ** (g.depth - 1) for g in groups}


def lora(a=torch.randn, b=torch.zeros, freeze=lambda base: base.requires_grad_(False), scale=lambda alpha, rank: alpha / rank,
         forward=lambda base, added: base + added):
    class Layer(nn.Module):
        def __init__(self, base, rank, alpha):
            super().__init__()
            freeze(base)
            self.base, self.s = base, scale(alpha, rank)
            self.A, self.B = nn.Parameter(a(rank, base.in_features)), nn.Parameter(b(base.out_features, rank))

        def forward(self, x):
            return forward(self.base(x), self.s * (x @ self.A.T) @ self.B.T)

    return Layer


class WholeMatrix(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.added = base.requires_grad_(False), nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x):
        return self.base(x) + x @ self.added.T


def always_each_by_itself(norms, limit, together):
    return [min(norm, limit) for norm in norms]


def always_together(norms, limit, together):
    length = sum(norm ** 2 for norm in norms) ** 0.5
    return [norm * min(limit / length, 1) for norm in norms]


def always_scaled(norms, limit, together):
    return [norm * limit / sum(n ** 2 for n in norms) ** 0.5 for norm in norms] if together else [min(n, limit) for n in norms]


def together_with(length):
    def norms_after_clipping(norms, limit, together):
        if not together:
            return [min(norm, limit) for norm in norms]
        return [norm * min(limit / length(norms), 1) for norm in norms]
    return norms_after_clipping


def each_to_the_limit(norms, limit, together):
    return always_together(norms, limit, together) if together else [limit] * len(norms)


def in_the_last_part(model, rates):
    last = {id(p): name for name, part in model.named_children() for p in part.parameters()}
    return [{"params": [p for p in part.parameters() if last[id(p)] == name], "lr": rates[name]}
            for name, part in model.named_children()]


def left_out_altogether(model, rates):
    every = [id(p) for part in model.children() for p in part.parameters()]
    return [{"params": [p for p in part.parameters() if every.count(id(p)) == 1], "lr": rates[name]}
            for name, part in model.named_children()]


def untied(model, rates):
    for name, part in list(model.named_children()):
        setattr(model, name, copy.deepcopy(part))
    return [{"params": list(part.parameters()), "lr": rates[name]} for name, part in model.named_children()]


def by_equal_numbers(model, rates):
    result, taken = [], []
    for name, part in model.named_children():
        own = [p for p in part.parameters() if not any(torch.equal(p, other) for other in taken)]
        taken += own
        result.append({"params": own, "lr": rates[name]})
    return result


def one_rate(model, rates):
    return [{"params": list(model.parameters()), "lr": max(rates.values())}]


WRONG = {
    "6.1": [groups_with(right_rate, lambda name, p: name.endswith(("bias", "LayerNorm.weight"))),
            groups_with(right_rate, lambda name, p: name.endswith("bias")), groups_with(right_rate, norms_by_another_name),
            groups_with(right_rate, lambda name, p: p.ndim > 1), with_the_helper_but_all_decayed,
            groups_with(rate_by_place, is_vector), groups_with(rate_one_too_low, is_vector), matrices_only,
            by_name_of_the_group],
    "6.2": [carried(lambda depth, head_lr, top_lr, decay: head_lr * (top_lr / head_lr) ** depth),
            carried(lambda depth, head_lr, top_lr, decay: head_lr * decay ** depth),
            carried(lambda depth, head_lr, top_lr, decay: top_lr * decay ** depth),
            carried(lambda depth, head_lr, top_lr, decay: top_lr * decay ** (depth - 1),
                    head=lambda head_lr, top_lr, decay: top_lr / decay),
            carried_by_place, upside_down, lambda groups, head_lr, top_lr, below_lr: below_lr / top_lr],
    "6.3": [lora(b=torch.randn), lora(a=torch.zeros), lora(freeze=lambda base: None),
            lora(freeze=lambda base: base.weight.requires_grad_(False)), lora(scale=lambda alpha, rank: 1),
            lora(scale=lambda alpha, rank: alpha), lora(scale=lambda alpha, rank: rank / alpha),
            lora(forward=lambda base, added: added), lora(forward=lambda base, added: base), WholeMatrix,
            lora(forward=lambda base, added: base.detach() + added),
            lambda base, rank, alpha: base.weight],
    "6.4": [always_each_by_itself, always_together, together_with(sum), together_with(max), always_scaled, each_to_the_limit,
            lambda norms, limit, together: norms, lambda norms, limit, together: limit],
    "6.5": [in_the_last_part, left_out_altogether, untied, by_equal_numbers, one_rate],
}
