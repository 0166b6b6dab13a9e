"""The head alone on photographs: what more training images, or larger ones, are worth to it.

    python benchmarks/photograph_heads.py --train hymenoptera/train --test hymenoptera/val --name "ants and bees"

The backbone is torchvision's ResNet-18 with ImageNet's weights, and stays as it is, so its features are computed once for each
size of the images. On them a new head is trained in 40 steps of 20, with AdamW at the rate that the study ``photographs`` chose
for the head alone, warm-up and cosine, on ten seeds. A seed draws the training images, unless all are taken, and the head.
Every run is a row of data/results/photographs-heads.csv, and the same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import layerlr_helpers as ll
from layerlr_helpers.models import prepared_model
from layerlr_helpers.recipes import fused_adamw
from layerlr_helpers.studies.results import append_row, missing, read_rows

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results" / "photographs-heads.csv"
SIZES, PER_CLASS, SEEDS, STEPS, LR = (128, 224), (20, 50, None), range(10), 40, 3e-3  # None: all images of the folder


def features_of(folder: str, image_size: int) -> tuple[TensorDataset, int]:
    """What the backbone makes of the images of a folder, and the number of its classes."""
    data = ll.image_folder(folder, image_size=image_size)
    model = ll.load_resnet18("imagenet")
    groups = ll.layer_groups(model)
    ll.freeze(groups, "*")
    return ll.cache_features(model, data, groups), len(data.class_names)


def drawn(features: TensorDataset, per_class: int | None, seed: int) -> TensorDataset:
    """Some examples of each class, drawn by the seed, or all."""
    labels, generator = features.tensors[1], torch.Generator().manual_seed(seed)
    rows = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    chosen = torch.cat([each[torch.randperm(len(each), generator=generator)][:per_class] for each in rows])
    return TensorDataset(*(tensor[chosen] for tensor in features.tensors))


def trained_head(features: TensorDataset, classes: int, seed: int) -> torch.nn.Module:
    """A head of that many classes, trained on the features."""
    head = ll.head_module(ll.layer_groups(prepared_model(None, classes, seed)))
    optimizer = fused_adamw(head.parameters(), LR, weight_decay=0.01)
    loader = DataLoader(features, 20, shuffle=True, generator=torch.Generator().manual_seed(seed))
    ll.fit(head, optimizer, loader, steps=STEPS, progress=False,
           schedule=ll.warmup_cosine(optimizer, STEPS, warmup_steps=STEPS // 10))
    return head


def main() -> None:
    """Make and record the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="the folder to train on, one subfolder per class")
    parser.add_argument("--test", required=True, help="the folder to test on, with the same classes")
    parser.add_argument("--name", required=True, help="what the photographs are called in the record")
    options = parser.parse_args()
    for size in SIZES:
        train, classes = features_of(options.train, size)
        test, _ = features_of(options.test, size)
        for per_class in PER_CLASS:
            way = f"{size} pixels, {per_class if per_class else 'all images'}{' a class' if per_class else ''}"
            for seed in SEEDS:
                key = {"split": "test", "task": options.name, "strategy": way, "rates": f"{LR:g}", "seed": seed}
                if missing(read_rows(RESULTS), [tuple(key.values())]):
                    images = drawn(train, per_class, seed)
                    scores = ll.evaluate(trained_head(images, classes, seed), DataLoader(test, 256))
                    append_row(RESULTS, {**key, "accuracy": round(scores["accuracy"], 4), "loss": round(scores["loss"], 4),
                                         "steps": STEPS, "training images": len(images), "precision": "float32",
                                         "torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads(),
                                         "device": "cpu"})
            print(way, flush=True)


if __name__ == "__main__":
    main()
