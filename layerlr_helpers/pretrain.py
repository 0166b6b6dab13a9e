"""Make the course's pretrained ResNet-18 from nothing: ``python -m layerlr_helpers.pretrain``.

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

from layerlr_helpers.datasets import printed_glyphs
from layerlr_helpers.scenes import GLYPHS
from layerlr_helpers.training import evaluate, fast_autocast, fit

UNSEEN_SEED = 1_000_003  # test glyphs: never a seed to train with


def main(arguments: list[str] | None = None) -> dict:
    """Run the command; returns what it prints at the end."""
    options = _parser().parse_args(arguments)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model, accuracy = pretrain(options.glyphs, options.epochs, options.seed, checkpoint=output.with_suffix(".checkpoint"))
    digest = write_weights(model, output)
    report = {"file": output.name, "sha256": digest, "bytes": output.stat().st_size, "unseen_accuracy": accuracy,
              "glyphs": options.glyphs, "epochs": options.epochs, "seed": options.seed,
              "python": platform.python_version(), "torch": torch.__version__, "matplotlib": matplotlib.__version__,
              "autocast": str(fast_autocast())}
    print(json.dumps(report, indent=2))
    return report


def pretrain(glyphs: int, epochs: int, seed: int, *, checkpoint: Path, batch_size: int = 64,
             image_size: int = 64) -> tuple[torch.nn.Module, float]:
    """Train a ResNet-18 on ``glyphs`` rendered letters and return it with its accuracy on 2,000 unseen ones.

    AdamW (weight decay 0.01) with a one-cycle schedule to 2e-3, cross-entropy, no augmentation but the rendering.
    """
    data = printed_glyphs(glyphs, image_size=image_size, seed=seed)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet18(num_classes=len(GLYPHS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * len(loader))
    fit(model, optimizer, loader, epochs=epochs, schedule=schedule, checkpoint=checkpoint, checkpoint_every=200,
        autocast=fast_autocast())
    unseen = printed_glyphs(2000, image_size=image_size, seed=UNSEEN_SEED)
    return model, evaluate(model, DataLoader(unseen, 256))["accuracy"]


def write_weights(model: torch.nn.Module, path: Path) -> str:
    """Write the model's state as fp16 (whole numbers stay as they are), atomically; returns the file's sha256."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m layerlr_helpers.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--glyphs", type=int, default=50_000, help="images to train on (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default %(default)s)")
    parser.add_argument("--output", default="data/resnet18_glyphs.pt", help="file to write (default %(default)s)")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
