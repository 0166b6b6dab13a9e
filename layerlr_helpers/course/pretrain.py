"""Make the course's pretrained ResNet-18 from nothing: ``python -m layerlr_helpers.course.pretrain``.

Trains on rendered glyphs and writes the weights as fp16. Interrupt it whenever you like: the same command goes on
from the last checkpoint. The same seed gives the same data, the same initial weights and the same order of batches.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import matplotlib
import torch
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from layerlr_helpers.course.data import printed_glyphs
from layerlr_helpers.course.scenes import GLYPHS
from layerlr_helpers.models import read_checkpoint
from layerlr_helpers.training import evaluate, fast_autocast, fit

UNSEEN_SEED = 1_000_003  # test glyphs: never a seed to train with


def main(arguments: list[str] | None = None) -> dict:
    """Run the command; returns what it prints at the end."""
    options = _parser().parse_args(arguments)
    report = check(Path(options.check)) if options.check else make(options)
    print(json.dumps(report, indent=2))
    return report


def make(options: argparse.Namespace) -> dict:
    """Train, write the weights and report on both."""
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # The name says which run it is of, so that a run with other settings does not take it for its own.
    checkpoint = output.with_name(f"{output.stem}-{options.glyphs}-{options.epochs}-{options.seed}.checkpoint")
    model = pretrain(options.glyphs, options.epochs, options.seed, checkpoint=checkpoint)
    digest = write_weights(model, output)
    checkpoint.unlink(missing_ok=True)
    return {"file": output.name, "sha256": digest, "bytes": output.stat().st_size, "unseen_accuracy": unseen_accuracy(model),
            "glyphs": options.glyphs, "epochs": options.epochs, "seed": options.seed,
            "python": platform.python_version(), "torch": torch.__version__, "matplotlib": matplotlib.__version__,
            "autocast": str(fast_autocast())}


def check(path: Path) -> dict:
    """Report on weights that were written before."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = resnet18(num_classes=len(GLYPHS))
    model.load_state_dict(read_checkpoint(path, digest))
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size, "unseen_accuracy": unseen_accuracy(model)}


def pretrain(glyphs: int, epochs: int, seed: int, *, checkpoint: Path, batch_size: int = 64,
             image_size: int = 64) -> torch.nn.Module:
    """Train a ResNet-18 on ``glyphs`` rendered letters and return it; goes on from ``checkpoint`` if it exists.

    AdamW (weight decay 0.01) with a one-cycle schedule to 2e-3, cross-entropy, no augmentation but the rendering.

    Raises:
        ValueError: less than one batch or one epoch, or the seed of the unseen glyphs.
    """
    if glyphs < batch_size or epochs < 1:
        raise ValueError(f"pretraining takes at least {batch_size} glyphs (one batch) and one epoch, not {glyphs} and {epochs}")
    if seed == UNSEEN_SEED:
        raise ValueError(f"seed {seed} makes the glyphs that the network is tested on; take another")
    data = printed_glyphs(glyphs, image_size=image_size, seed=seed)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = resnet18(num_classes=len(GLYPHS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * len(loader))
    fit(model, optimizer, loader, epochs=epochs, schedule=schedule, checkpoint=checkpoint, checkpoint_every=200,
        autocast=fast_autocast())
    return model


def unseen_accuracy(model: torch.nn.Module, n: int = 2000) -> float:
    """Accuracy on ``n`` glyphs of 64 pixels that no seed to train with makes."""
    return evaluate(model, DataLoader(printed_glyphs(n, seed=UNSEEN_SEED), 256, generator=torch.Generator()))["accuracy"]


def write_weights(model: torch.nn.Module, path: Path) -> str:
    """Write the model's state as fp16 (whole numbers stay as they are), atomically; returns the file's sha256."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.course.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--glyphs", type=int, default=50_000, help="images to train on (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default %(default)s)")
    parser.add_argument("--check", metavar="FILE", help="train nothing; report on the weights in this file")
    parser.add_argument("--output", default="data/resnet18_glyphs.pt", help="file to write (default %(default)s)")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
