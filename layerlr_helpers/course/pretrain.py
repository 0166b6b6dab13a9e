"""Make the course's pretrained ResNet-18 from random weights: ``python -m layerlr_helpers.course.pretrain``.

Trains on rendered glyphs and writes the weights as fp16. Interrupt it whenever you like: the same command goes on
from the last checkpoint. The same seed gives the same data, the same initial weights and the same order of batches.
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import matplotlib
import torch
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from layerlr_helpers.course.data import printed_glyphs
from layerlr_helpers.course.scenes import GLYPHS
from layerlr_helpers.files import write_whole
from layerlr_helpers.guards import seeded
from layerlr_helpers.training import evaluate, fast_autocast, fit

UNSEEN_SEED = 1_000_003  # test glyphs: never a seed to train with


def main(arguments: list[str] | None = None) -> dict:
    """Run the command; returns what it prints at the end."""
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.course.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--glyphs", type=int, default=50_000, help="images to train on (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default %(default)s)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="train nothing; report on the weights in this file")
    parser.add_argument("--output", type=Path, default="data/resnet18_glyphs.pt", help="file to write (default %(default)s)")
    options = parser.parse_args(arguments)
    report = check(options.check) if options.check else make(options.output, options.glyphs, options.epochs, options.seed)
    print(json.dumps(report, indent=2))
    return report


def make(output: Path, glyphs: int, epochs: int, seed: int) -> dict:
    """Train, write the weights as fp16 (whole numbers stay as they are) and report on them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # The checkpoint's name says which run it is of, so that a run with other settings does not go on from it.
    checkpoint = output.with_name(f"{output.stem}-{glyphs}-{epochs}-{seed}.checkpoint")
    model = pretrain(glyphs, epochs, seed, checkpoint=checkpoint)
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    write_whole(output, lambda path: torch.save(state, path))
    checkpoint.unlink(missing_ok=True)
    return {**check(output), "glyphs": glyphs, "epochs": epochs, "seed": seed, "python": platform.python_version(),
            "torch": torch.__version__, "matplotlib": matplotlib.__version__, "autocast": str(fast_autocast())}


def check(path: Path) -> dict:
    """Report on weights that were written."""
    model = resnet18(num_classes=len(GLYPHS))
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    content = path.read_bytes()
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
            "unseen_accuracy": unseen_accuracy(model)}


def pretrain(glyphs: int, epochs: int, seed: int, *, checkpoint: Path) -> torch.nn.Module:
    """Train a ResNet-18 on ``glyphs`` rendered letters of 64 pixels and return it; goes on from ``checkpoint`` if it exists.

    AdamW (weight decay 0.01) with a one-cycle schedule to 2e-3, cross-entropy, batches of 64, no augmentation.
    """
    if glyphs < 64 or epochs < 1:
        raise ValueError(f"pretraining takes at least 64 glyphs (one batch) and one epoch, not {glyphs} and {epochs}")
    if seed == UNSEEN_SEED:
        raise ValueError(f"seed {seed} makes the glyphs that the network is tested on; take another")
    data = printed_glyphs(glyphs, seed=seed)
    loader = DataLoader(data, 64, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    with seeded(seed):
        model = resnet18(num_classes=len(GLYPHS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * len(loader))
    fit(model, optimizer, loader, epochs=epochs, schedule=schedule, checkpoint=checkpoint, checkpoint_every=200,
        autocast=fast_autocast())
    return model


def unseen_accuracy(model: torch.nn.Module, n: int = 2000) -> float:
    """Accuracy on ``n`` glyphs of 64 pixels that no seed to train with makes."""
    return evaluate(model, DataLoader(printed_glyphs(n, seed=UNSEEN_SEED), 256, generator=torch.Generator()))["accuracy"]


if __name__ == "__main__":
    main()
