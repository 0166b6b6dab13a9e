"""Wrong answers to the exercises of notebook 08 that somebody could well give."""

import math

import torch


def drawn_from_all(labels, per_class, seed):
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = per_class * len(labels.unique())
    return rows[:wanted], rows[wanted:]


def so_many_altogether(labels, per_class, seed):
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows[:per_class], rows[per_class:]


def by_class(order, test=lambda rows, per_class: rows[per_class:]):
    def split(labels, per_class, seed):
        generator = torch.Generator().manual_seed(seed)
        classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
        classes = [order(rows, generator) for rows in classes]
        return torch.cat([rows[:per_class] for rows in classes]), torch.cat([test(rows, per_class) for rows in classes])
    return split


def shuffled(rows, generator):
    return rows[torch.randperm(len(rows), generator=generator)]


def without_generator(rows, generator):
    return rows[torch.randperm(len(rows))]


def in_order(rows, generator):
    return rows


def with_putting_back(rows, generator):
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]


def all_are_tested(rows, per_class):
    return rows


def few_are_tested(rows, per_class):
    return rows[per_class:2 * per_class]


def only_train(labels, per_class, seed):
    return by_class(shuffled)(labels, per_class, seed)[0]


def seen(alike):
    def seen_before(train_images, test_images):
        return [row for row, image in enumerate(test_images) if any(alike(image, other) for other in train_images)]
    return seen_before


def same_number(train_images, test_images):
    return [row for row in range(min(len(train_images), len(test_images))) if torch.equal(train_images[row], test_images[row])]


def numbers_in_train(train_images, test_images):
    return seen(torch.equal)(test_images, train_images)


def with_in(train_images, test_images):
    return [row for row, image in enumerate(test_images) if image in train_images]


def all_duplicates(train_images, test_images):
    images = list(torch.cat([train_images, test_images]))
    return [row for row, image in enumerate(test_images) if sum(torch.equal(image, other) for other in images) > 1]


def the_images(train_images, test_images):
    return [test_images[row] for row in seen(torch.equal)(train_images, test_images)]


def none_seen(train_images, test_images):
    return []


def measured_error(right, total):
    share = right / total
    reach = 1.96 * math.sqrt(share * (1 - share) / total)
    return share - reach, share + reach


def cut_off(right, total):
    low, high = measured_error(right, total)
    return max(low, 0.0), min(high, 1.0)


def wilson(reach=lambda p, total: 1.96 * (p * (1 - p) / total).sqrt(), ends=lambda fits: (fits.min(), fits.max())):
    def wilson_interval(right, total):
        p = torch.linspace(0, 1, 10_001)
        return ends(p[(right / total - p).abs() <= reach(p, total)])
    return wilson_interval


def confusion(recalls=lambda counts: counts.diagonal() / counts.sum(1),
              pairs=lambda counts: (counts + counts.T).fill_diagonal_(-1)):
    def read_confusion(matrix):
        names, counts = list(matrix.index), torch.tensor(matrix.to_numpy())
        i, j = divmod(pairs(counts.clone()).argmax().item(), len(names))
        return dict(zip(names, recalls(counts).tolist(), strict=True)), [names[i], names[j]]
    return read_confusion


def only_recalls(matrix):
    return confusion()(matrix)[0]


def one_name(matrix):
    return confusion()(matrix)[0], matrix.index[0]


def rates(height=lambda suggestion, head_lr: head_lr if math.isnan(suggestion) else head_lr * suggestion,
          first=lambda number, shift: shift - number // 2, factor=3.0):
    def rates_to_try(suggestion, head_lr, number, shift):
        start = first(number, shift)
        return [height(suggestion, head_lr) * factor ** i for i in range(start, start + number)]
    return rates_to_try


def equal_distances(suggestion, head_lr, number, shift):
    right = rates()(suggestion, head_lr, number, shift)
    return torch.linspace(right[0], right[-1], number)


def shift_as_a_product(suggestion, head_lr, number, shift):
    right = rates()(suggestion, head_lr, number, 0)
    return [rate * 3 * shift if shift else rate for rate in right]


def only_the_middle(suggestion, head_lr, number, shift):
    return rates()(suggestion, head_lr, 1, shift)[0]


WRONG = {
    "8.1": [drawn_from_all, so_many_altogether, by_class(without_generator), by_class(in_order), by_class(with_putting_back),
            by_class(shuffled, all_are_tested), by_class(shuffled, few_are_tested), only_train],
    "8.2": [same_number, numbers_in_train, with_in, seen(lambda image, other: image.float().mean() == other.float().mean()),
            seen(lambda image, other: (image.float() - other.float()).abs().mean() < 1), all_duplicates, the_images, none_seen],
    "8.3": [measured_error, cut_off, wilson(lambda p, total: 1.96 * p * (1 - p) / total),
            wilson(lambda p, total: 1.96 * (p * (1 - p)).sqrt()), wilson(lambda p, total: (p * (1 - p) / total).sqrt()),
            wilson(lambda p, total: 1.645 * (p * (1 - p) / total).sqrt()), wilson(ends=lambda fits: (fits.max(), fits.min())),
            wilson(ends=lambda fits: (100 * fits.min(), 100 * fits.max())), wilson(ends=lambda fits: fits)],
    "8.4": [confusion(lambda counts: counts.diagonal() / counts.sum(0)),
            confusion(lambda counts: counts.diagonal() / counts.sum()), confusion(lambda counts: counts.diagonal()),
            confusion(pairs=lambda counts: counts), confusion(pairs=lambda counts: counts.fill_diagonal_(-1)),
            only_recalls, one_name],
    "8.5": [rates(height=lambda suggestion, head_lr: suggestion), rates(height=lambda suggestion, head_lr: head_lr),
            rates(height=lambda suggestion, head_lr: head_lr * suggestion), rates(first=lambda number, shift: shift),
            rates(first=lambda number, shift: shift - number + 1), rates(first=lambda number, shift: -(number // 2)),
            rates(first=lambda number, shift: -shift - number // 2), rates(factor=10.0), equal_distances, shift_as_a_product,
            only_the_middle],
}
