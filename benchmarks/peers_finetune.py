"""The same fine-tune through fastai, timm, Lightning and layerlr_helpers: accuracy over seeds, and seconds beside ours.

    pip install .[compare]
    python benchmarks/peers_finetune.py

All start from the same pretrained ResNet-18 with the same new head and train on the same 100 digits, in float32 and with the
same weight decay. That each sees the same batches in the same order, and so makes the same number of steps, is checked in
every run. What differs is what a library brings along: how it sets each layer's rate, what it freezes, its schedule, its
loop and, in fastai, its own Adam. The others leave the optimizer to their user: here torch's AdamW in its fast, fused form.

Each contender has five tries, judged on the validation images of two seeds; the best one is tested once on every seed. All
take turns in one process, on one thread, and seconds are those of the processor, so that what else the machine does counts
little. Every run is a row of data/results/peers.csv, and the same command goes on where it was stopped. A library that is
not installed is left out.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import process_time

import pandas as pd
import torch
import torch.nn.functional as F
from libraries import OURS, PEERS, installed, optional, silence_lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

import layerlr_helpers as ours
from layerlr_helpers.intervals import paired_intervals
from layerlr_helpers.models import prepared_model
from layerlr_helpers.recipes import fused_adamw, gradual, head_then_all
from layerlr_helpers.studies.results import append_row, chosen_rows, missing, read_rows, winners
from layerlr_helpers.studies.search import SEARCH_SEEDS

timm = optional("timm.optim") and optional("timm.scheduler") and optional("timm")
fastai, lightning = optional("fastai.vision.all"), optional("lightning.pytorch")
INSTALLED = {OURS: ours, "timm": timm, "fastai": fastai, "Lightning": lightning}
RESULTS = Path(__file__).resolve().parent.parent / "data" / "results" / "peers.csv"
BATCH_SIZE, WEIGHT_DECAY = 20, 0.01


# Ways to train a network. Each is a function of the network, the loader, the number of epochs and the numbers to try.


def our_fit(network: nn.Module, loader: DataLoader, epochs: int, lr: float, decay: float = 1.0, plan=None) -> None:
    """Layer decay, which at 1 is a uniform rate; everything trains from the start, or as the plan unfreezes it."""
    groups, steps = ours.layer_groups(network), epochs * len(loader)
    optimizer = fused_adamw(ours.param_groups(groups, ours.layer_decay(lr, decay), weight_decay=WEIGHT_DECAY))
    unfreezing = ours.ProgressiveUnfreezing(groups, plan(groups, steps)) if plan is not None else None
    schedule = ours.one_cycle(optimizer, steps)
    ours.fit(network, optimizer, loader, epochs=epochs, schedule=schedule, unfreezing=unfreezing, progress=False)


def fastai_learner(network: nn.Module, loader: DataLoader):
    """A Learner with our layer groups, which like the other libraries here does not evaluate after each epoch."""
    class NoValidation(fastai.Callback):
        def before_validate(self):
            raise fastai.CancelValidException

    return fastai.Learner(fastai.DataLoaders(loader, loader), network, loss_func=nn.CrossEntropyLoss(), wd=WEIGHT_DECAY,
                          splitter=lambda model: [list(group.params.values()) for group in ours.layer_groups(model)],
                          cbs=NoValidation())


def fastai_one_cycle(network, loader, epochs, lr, decay) -> None:
    """fastai spreads a slice over the groups by equal factors, so these are the rates of ``layer_decay``."""
    learner = fastai_learner(network, loader)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(epochs, slice(lr * decay ** 5, lr))


def fastai_fine_tune(network, loader, epochs, base_lr, lr_mult) -> None:
    """Train the head (and all BatchNorm) for an epoch, then all: the head at ``base_lr / 2``, the stem ``lr_mult`` lower."""
    learner = fastai_learner(network, loader)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs - 1, base_lr, freeze_epochs=1, lr_mult=lr_mult)


def timm_network(model: nn.Module) -> nn.Module:
    """timm's own ResNet-18, whose layers its layer decay knows by name, with the same weights under the same names."""
    network = timm.create_model("resnet18", num_classes=model.fc.out_features)
    network.load_state_dict(model.state_dict())
    return network


def timm_layer_decay(network, loader, epochs, lr, decay) -> None:
    """timm's decay takes nine steps from head to stem and ours five; the factor is such that both ends have equal rates."""
    optimizer = timm.optim.create_optimizer_v2(network, "adamw", lr=lr, weight_decay=WEIGHT_DECAY, fused=True,
                                               layer_decay=decay ** (5 / 9))
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=epochs // 4,
                                                      step_on_epochs=False, updates_per_epoch=len(loader))
    network.train()
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader) + 1):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            scheduler.step_update(step)


def lightning_finetuning(network, loader, epochs, lr, ratio) -> None:
    """Train the head (and all BatchNorm) for half of the run, then all; the backbone's rate catches up with the head's."""
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Sequential(*list(network.children())[:-1], nn.Flatten()), network.fc

        def training_step(self, batch, index):
            images, labels = batch
            return F.cross_entropy(self.head(self.backbone(images)), labels)

        def configure_optimizers(self):
            trained = [p for p in self.parameters() if p.requires_grad]
            return fused_adamw(trained, lr=lr, weight_decay=WEIGHT_DECAY)

    callback = lightning.callbacks.BackboneFinetuning(epochs // 2, backbone_initial_ratio_lr=ratio)
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[callback], accelerator="cpu", logger=False,
                                enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(Net(), loader)


# The contenders


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune: the library, the function, the numbers to try, and what makes the network that it trains."""

    library: str
    train: Callable[..., None]
    tries: Sequence[tuple[float, ...]]
    network: Callable[[nn.Module], nn.Module] = lambda model: model

    @property
    def tries_by_text(self) -> dict[str, tuple[float, ...]]:
        """The tries under the text by which they are recorded."""
        return {", ".join(f"{number:g}" for number in numbers): numbers for numbers in self.tries}


DECAYS = ((1e-3, 0.5), (1e-3, 0.7), (3e-3, 0.3), (3e-3, 0.5), (1e-2, 0.3))  # highest rate, factor from one stage to the next
CONTENDERS = {  # the first is what the others are compared with
    "ours, layer decay": Contender(OURS, our_fit, DECAYS),
    "ours, uniform": Contender(OURS, our_fit, ((1e-4,), (3e-4,), (1e-3,), (2e-3,), (3e-3,))),
    "ours, gradual": Contender(OURS, functools.partial(our_fit, plan=gradual), DECAYS),
    "ours, head, then all": Contender(OURS, functools.partial(our_fit, plan=head_then_all), DECAYS),
    "fastai fit_one_cycle": Contender("fastai", fastai_one_cycle, DECAYS),
    "fastai fine_tune": Contender("fastai", fastai_fine_tune, (
        (2e-3, 100), (6e-3, 10), (6e-3, 100), (6e-3, 1000), (2e-2, 100))),
    "timm layer_decay": Contender("timm", timm_layer_decay, DECAYS, timm_network),
    "Lightning BackboneFinetuning": Contender("Lightning", lightning_finetuning, (
        (1e-4, 0.1), (3e-4, 0.1), (1e-3, 0.01), (1e-3, 0.1), (3e-3, 0.1))),
}


# One run


class Shuffled(Sampler):
    """A new order for each epoch. torch's RandomSampler would draw another at its end, to which Lightning does not read it."""

    def __init__(self, size: int, seed: int):
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=self.generator).tolist())


def batches(data: ours.ImageSet, seed: int) -> DataLoader:
    return DataLoader(data, BATCH_SIZE, sampler=Shuffled(len(data), seed))


def watch(network: nn.Module) -> list[Tensor]:
    """A list to which each training step will add one row of pixels of each image in its batch."""
    seen: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if layer.training:
            seen.append(inputs[0][:, 0, 32].clone())

    network.conv1.register_forward_pre_hook(look)
    return seen


def check_batches(seen: Sequence[Tensor], data: ours.ImageSet, seed: int, epochs: int, name: str) -> None:
    """Raise an error if a run was not trained on the batches of ``epochs`` epochs in the order that the seed gives."""
    loader = batches(data, seed)
    expected = [images[:, 0, 32] for _ in range(epochs) for images, _ in loader]
    if len(seen) != len(expected) or not all(map(torch.equal, seen, expected)):
        raise RuntimeError(f"{name} made {len(seen)} steps, and not the {len(expected)} on the batches that all others see")


def run(name: str, numbers: Sequence[float], data: ours.ImageSet, seed: int, epochs: int, split: str) -> dict[str, float]:
    """Train once and evaluate on the split."""
    contender = CONTENDERS[name]
    train, val, test = ours.few_shot_split(data, 10, seed=seed)
    network = contender.network(prepared_model("glyphs", len(data.class_names), seed))
    network.train()  # Lightning would train in eval mode what comes in eval mode
    seen, loader = watch(network), batches(train, seed)
    start = process_time()
    contender.train(network, loader, epochs, *numbers)
    seconds = process_time() - start
    check_batches(seen, train, seed, epochs, name)
    scores = ours.evaluate(network, DataLoader(val if split == "validation" else test, 256))
    return {"accuracy": round(scores["accuracy"], 4), "loss": round(scores["loss"], 4), "steps": len(seen),
            "images": sum(map(len, seen)), "seconds": round(seconds, 2)}


@functools.cache
def warm_up(name: str, data: ours.ImageSet) -> None:
    """Train once without counting it, since a library does some work in its first run only."""
    run(name, CONTENDERS[name].tries[0], data, seed=0, epochs=2, split="validation")


# All runs


def turns(names: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Every contender on every seed; with each seed the next contender goes first."""
    for turn, seed in enumerate(seeds):
        first = turn % len(names)
        yield from ((name, seed) for name in [*names[first:], *names[:first]])


def run_missing(wanted: Sequence[tuple], data: ours.ImageSet, epochs: int, path: Path) -> pd.DataFrame:
    """Make and record the wanted runs that the file does not have yet; returns all of its rows."""
    for split, task, name, rates, seed in missing(read_rows(path), wanted):
        warm_up(name, data)
        measured = run(name, CONTENDERS[name].tries_by_text[rates], data, seed, epochs, split)
        package = PEERS.get(CONTENDERS[name].library, "layerlr-helpers")
        append_row(path, {"split": split, "task": task, "strategy": name, "rates": rates, "seed": seed, **measured,
                          "precision": "float32", "torch": torch.__version__.partition("+")[0],
                          "threads": torch.get_num_threads(), "device": "cpu", "library": f"{package} {version(package)}"})
        print(f"{split}, {name}, {rates}, seed {seed}: {measured['accuracy']:.1%}, {measured['seconds']:.1f} s", flush=True)
    return read_rows(path)


def compare(contenders: dict[str, Contender], seeds: Sequence[int], epochs: int, path: Path) -> tuple[pd.DataFrame, dict]:
    """Choose each contender's rates on the validation images, then test them; the rows of the tests and the chosen rates."""
    data, task, names = ours.handwritten_digits(), f"digits, {epochs} epochs", list(contenders)
    tries = {name: list(contender.tries_by_text) for name, contender in contenders.items()}
    searched = [("validation", task, name, tries[name][i], seed)
                for i in range(len(tries[names[0]])) for name, seed in turns(names, SEARCH_SEEDS)]
    rows = run_missing(searched, data, epochs, path)
    chosen = winners(chosen_rows(rows, searched))
    tested = [("test", task, name, chosen[name], seed) for name, seed in turns(names, seeds)]
    return chosen_rows(run_missing(tested, data, epochs, path), tested), chosen


def table(rows: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    """A row for each contender; differences and ratios are to the first one on the same seeds."""
    baseline = next(iter(chosen))
    intervals, by_name = paired_intervals(rows, baseline), rows.groupby("strategy")
    seconds = rows.pivot(index="seed", columns="strategy", values="seconds")
    ratios = seconds.div(seconds[baseline], axis=0)
    columns = {"rates": pd.Series(chosen), "accuracy (%)": intervals["mean"], "sd": 100 * by_name["accuracy"].std(),
               "difference": intervals["difference"], "low": intervals["low"], "high": intervals["high"],
               "seconds": seconds.median(), "ratio": ratios.median(), "lowest": ratios.min(), "highest": ratios.max()}
    return pd.DataFrame(columns).loc[list(chosen)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="test on seeds 0 to N - 1 (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of 5 steps each (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to record in (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    silence_lightning()
    libraries = installed(INSTALLED)
    contenders = {name: contender for name, contender in CONTENDERS.items() if contender.library in libraries}
    rows, chosen = compare(contenders, range(options.seeds), options.epochs, options.results)
    comparison, digits = table(rows, chosen), {"ratio": 2, "lowest": 2, "highest": 2}
    print(f"\n{options.epochs} epochs of 5 steps, {options.seeds} seeds; with 95 % intervals, and the ratios' range over seeds")
    print(comparison.round({name: digits.get(name, 1) for name in comparison}).to_string())


if __name__ == "__main__":
    main()
