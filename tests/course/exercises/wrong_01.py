"""Wrong answers to the exercises of notebook 01 that somebody could well give."""

import torch
from torch.optim.swa_utils import update_bn


def lists_against(control_of, order=(1, -1), count_all=False):
    def added_and_lost(trained, untrained, margin):
        control = control_of(trained, untrained)
        return [[stage for stage in trained if sign * (trained[stage] - control[stage]) > (0 if count_all else margin)]
                for sign in order]
    return added_and_lost


def the_untrained(trained, untrained):
    return untrained


def the_input(trained, untrained):
    return dict.fromkeys(trained, trained["input"])


def the_stage_before(trained, untrained):
    values = list(trained.values())
    return dict(zip(trained, values[:1] + values[:-1], strict=True))


def the_best_untrained(trained, untrained):
    return dict.fromkeys(trained, max(untrained.values()))


def differences_only(trained, untrained, margin):
    return {stage: trained[stage] - untrained[stage] for stage in trained}


def norm(tensors):
    return sum(value.square().sum() for value in tensors) ** 0.5


def kernels(parameters):
    return [value for value in parameters.values() if value.ndim > 1]


def changes(before, after):
    return [after[name] - before[name] for name in before if before[name].ndim > 1]


def moved_with_scales(before, after):
    return norm(after[name] - before[name] for name in before) / norm(before.values())


def distance_only(before, after):
    return norm(changes(before, after))


def over_the_end(before, after):
    return norm(changes(before, after)) / norm(kernels(after))


def growth(before, after):
    return norm(kernels(after)) / norm(kernels(before)) - 1


def without_root(before, after):
    return (norm(changes(before, after)) / norm(kernels(before))) ** 2


def percent(before, after):
    return 100 * norm(changes(before, after)) / norm(kernels(before))


def mean_of_ratios(before, after):
    ratios = [change.norm() / start.norm() for change, start in zip(changes(before, after), kernels(before), strict=True)]
    return sum(ratios) / len(ratios)


def sums_of_lengths(before, after):
    return sum(c.norm() for c in changes(before, after)) / sum(k.norm() for k in kernels(before))


def rates(rate_of):
    return lambda layers, goal: {name: float(rate_of(weight, goal)) for name, weight in layers.items()}


def rates_in_a_list(layers, goal):
    return [goal * weight.square().mean().sqrt() for weight in layers.values()]


def passes_in_eval_mode(model, batches, share):
    for batch in batches:
        model(batch)


def ignores_share(model, batches, share):
    update_bn(batches, model)


def left_in_train_mode(model, batches, share):
    model.train()
    for batch in batches:
        model(batch)


def momentum_as_share(model, batches, share):
    training = model.training
    norms = [module for module in model.modules() if hasattr(module, "momentum")]
    for module in norms:
        module.momentum = share
    model.train()
    for batch in batches:
        model(batch)
    model.train(training)
    for module in norms:
        module.momentum = 0.1


def momentum_stays_changed(model, batches, share):
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = share
    update_bn(batches, model)


def blend_with(measure, new_share=lambda share: share):
    def blend_statistics(model, batches, share):
        old = {name: value.clone() for name, value in model.named_buffers()}
        measure(model, batches)
        for name, value in model.named_buffers():
            if "running" in name:
                value.lerp_(old[name], 1 - new_share(share))
    return blend_statistics


def blend_two_dimensional_only(model, batches, share):
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    old = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    update_bn(batches, model)
    for norm, (mean, variance) in zip(norms, old, strict=True):
        norm.running_mean.lerp_(mean, 1 - share)
        norm.running_var.lerp_(variance, 1 - share)


def usual_passes(model, batches):
    training = model.training
    model.train()
    for batch in batches:
        model(batch)
    model.train(training)


def usual_momentum(model, batches, share):
    usual_passes(model, batches)


def measure(model, batches):
    update_bn(batches, model)


def measure_last(model, batches):
    update_bn(batches[-1:], model)


def trains(model, batches, share):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = model.training
    model.train()
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
    model.train(training)


def greatest_gain(rows, stages=slice(None)):
    accuracy = rows.pivot_table(index="seed", columns="stage", values="accuracy")
    return accuracy.sub(accuracy["all"], axis=0).mean()[stages].idxmax()


def any_statistics(rows):
    return greatest_gain(rows[rows["split"] == "validation"])


def with_the_test_rows(rows):
    return greatest_gain(rows[rows["statistics"] == "follow"])


def allowed(rows):
    return rows.query("split == 'validation' and statistics == 'follow'")


def not_paired(rows):
    return allowed(rows).groupby("stage")["accuracy"].mean().idxmax()


def best_run(rows):
    return allowed(rows).sort_values("accuracy")["stage"].iloc[-1]


def only_seeds_of_all_stages(rows):
    accuracy = allowed(rows).pivot_table(index="seed", columns="stage", values="accuracy").dropna()
    return accuracy.sub(accuracy["all"], axis=0).mean().idxmax()


def only_stages_of_all_seeds(rows):
    accuracy = allowed(rows).pivot_table(index="seed", columns="stage", values="accuracy").dropna(axis="columns")
    return accuracy.sub(accuracy["all"], axis=0).mean().idxmax()


def always_a_stage(rows):
    return greatest_gain(allowed(rows), ["stem", "layer1", "layer2", "layer3", "layer4", "head"])


def kernels_only_longer(before, after):
    return norm(kernels(after)) / norm(kernels(before))


def typical(weight):
    return weight.square().mean().sqrt()


WRONG = {
    "1.1": [lists_against(the_input), lists_against(the_stage_before), lists_against(the_best_untrained),
            lists_against(the_untrained, order=(-1, 1)), lists_against(the_untrained, count_all=True), differences_only],
    "1.2": [moved_with_scales, distance_only, over_the_end, growth, without_root, percent, mean_of_ratios, sums_of_lengths,
            kernels_only_longer],
    "1.3": [rates(lambda weight, goal: goal), rates(lambda weight, goal: goal * weight.norm()),
            rates(lambda weight, goal: goal / typical(weight)), rates(lambda weight, goal: goal * weight.abs().mean()),
            rates(lambda weight, goal: typical(weight)), rates(lambda weight, goal: goal * weight.mean().abs()),
            rates(lambda weight, goal: goal * weight.std()), rates_in_a_list],
    "1.4": [passes_in_eval_mode, ignores_share, left_in_train_mode, momentum_as_share, momentum_stays_changed,
            blend_with(measure, lambda share: 1 - share), blend_with(usual_passes), blend_with(measure_last),
            usual_momentum, trains, blend_two_dimensional_only],
    "1.5": [any_statistics, with_the_test_rows, not_paired, best_run, only_seeds_of_all_stages, only_stages_of_all_seeds,
            always_a_stage, lambda rows: rows.shape],
}
