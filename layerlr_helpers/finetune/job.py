"""Fine-tune a network on your own images: ``python -m layerlr_helpers.finetune --data DIR --output OUT``.

DIR has one subfolder a class; without --data the network learns the built-in digits. OUT gets report.md (the accuracy on
images that it was not trained on, the mistakes, what each layer did), model.pt (a state_dict that plain torchvision loads),
classes.json, history.csv, result.json and settings.json. Interrupt it whenever you like: the same command goes on after the
last finished epoch, on a CPU bit for bit, and a run with other settings is refused.

torchrun --nproc-per-node=N -m layerlr_helpers.finetune … shares each batch among N processes, one a GPU or all on the CPU.
They see the images that one process would see, in the same order, and their gradient is the mean over the whole batch. So the
weights are the same up to rounding, but for two things. BatchNorm layers that train normalise, on CPUs, by their own process's
part of the batch (on GPUs SyncBatchNorm puts the parts together); --batch-norm freeze avoids that. And dropout draws
different random numbers in each process. The loss in history.csv is the whole batch's, the accuracy the first process's part's.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm  # the common base of all kinds
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from layerlr_helpers import report
from layerlr_helpers.checkpoints import CheckpointError
from layerlr_helpers.course.data import handwritten_digits
from layerlr_helpers.diagnostics import snapshot
from layerlr_helpers.finetune.distributed import SharedBatches, Team, level, shared_cross_entropy, team
from layerlr_helpers.finetune.options import PRECISIONS, STRATEGIES, parser, resolved
from layerlr_helpers.images import ImageSet, few_shot_split, image_folder
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18, prepared_model
from layerlr_helpers.param_groups import param_groups
from layerlr_helpers.recipes import fused_adamw
from layerlr_helpers.schedules import one_cycle
from layerlr_helpers.training import History, fit
from layerlr_helpers.unfreezing import ProgressiveUnfreezing, UnfreezePlan

RESULTS = ("model.pt", "classes.json", "history.csv", *report.FILES, "result.json")  # in the order in which they are written
USAGE = """## Using it

`model.pt` goes into plain torchvision. It takes images of {image_size} pixels, normalised with ImageNet's mean and standard
deviation; `classes.json` has the names of its outputs.

```python
model = torchvision.models.{model}(num_classes={classes}).eval()
model.load_state_dict(torch.load("model.pt", weights_only=True))
```"""


@dataclass(frozen=True)
class Job:
    """All that a run needs, checked before anything is written."""

    options: argparse.Namespace
    settings: dict
    train: ImageSet
    val: ImageSet
    test: ImageSet
    model: nn.Module
    groups: list[LayerGroup]
    optimizer: Optimizer
    plan: UnfreezePlan | None
    batches: SharedBatches


def main(arguments: Sequence[str] | None = None) -> dict:
    """Run the command; returns what result.json holds: ``accuracy``, ``low`` and ``high``, ``images``, all of the test."""
    command = parser(__doc__)
    options = command.parse_args(arguments)
    with ExitStack() as stack:
        try:
            us = stack.enter_context(team(options.device))
            stack.enter_context(torch.random.fork_rng(devices=[us.device] if us.device.type == "cuda" else []))
            job = prepare(resolved(options), us)
        except (ValueError, OSError) as error:
            command.error(str(error))
        try:
            return carry_out(job, us)
        except CheckpointError as error:
            command.error(str(error))


def prepare(options: argparse.Namespace, us: Team) -> Job:
    """Read the images, make the network and check everything; nothing is written.

    Raises:
        FileNotFoundError: no such folder of images.
        ValueError: images, classes, sizes or rates that cannot be used, or an output folder of another run.
        ConnectionError: weights that are neither on this machine nor to be downloaded.
    """
    output = Path(options.output).resolve()
    if options.data is not None and Path(options.data).resolve() in (output, *output.parents):
        raise ValueError(f"--output {output} is within the folder of images, where it would be a class; give a place outside")
    data = (handwritten_digits(image_size=options.image_size) if options.data is None
            else image_folder(options.data, image_size=options.image_size,
                              unreadable="skip" if options.skip_unreadable else "raise"))
    settings = settings_of(options, data, us)
    check_output(output, settings)
    train, val, test = split(data, options)
    model = _model(options, len(data.class_names), us)
    groups = _groups(model, options, train[0][0][None].to(us.device))
    batches = SharedBatches(len(train), options.batch_size, torch.Generator().manual_seed(options.seed), rank=us.rank,
                            processes=us.size)
    _check_batches(batches, model, options)
    recipe = STRATEGIES[options.strategy]
    optimizer = fused_adamw(param_groups(groups, recipe.rates(options), weight_decay=options.weight_decay))
    plan = recipe.plan(groups, options.epochs * len(batches)) if recipe.plan is not None else None
    return Job(options, settings, train, val, test, model, groups, optimizer, plan, batches)


def _groups(model: nn.Module, options: argparse.Namespace, example: Tensor) -> list[LayerGroup]:
    try:
        return layer_groups(model, example)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{options.model} cannot take images of {options.image_size} pixels ({error}); most models were made "
                         "for --image-size 224") from error


def _check_batches(batches: SharedBatches, model: nn.Module, options: argparse.Namespace) -> None:
    by_batch = options.batch_norm == "train" and any(isinstance(module, _BatchNorm) for module in model.modules())
    if batches.smallest < (2 if by_batch else 1):
        raise ValueError(f"{batches.images} training images in batches of at most {options.batch_size} give each of "
                         f"{batches.processes} process(es) {batches.smallest} at a time, and it takes "
                         + ("2 to normalise by; raise --batch-size or pass --batch-norm freeze" if by_batch
                            else "1; raise --batch-size or start fewer processes"))


def settings_of(options: argparse.Namespace, data: ImageSet, us: Team) -> dict:
    """What decides the weights that a run ends with. The images are known by their content, wherever the folder is."""
    content = hashlib.sha256(data.images.numpy().tobytes() + bytes(str((data.labels.tolist(), data.class_names)), "utf-8"))
    chosen = {name: value for name, value in vars(options).items() if value is not None and name not in ("output", "data")}
    return {"data": "digits" if options.data is None else Path(options.data).resolve().name, "images": len(data),
            "content": content.hexdigest()[:16], **chosen, "device": us.device.type, "processes": us.size}


def check_output(output: Path, settings: dict) -> None:
    """Refuse a folder that holds another run, or files that this one would overwrite.

    Raises:
        ValueError: says which settings differ, which files are in the way, or that settings.json is of something else.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if not (output / "settings.json").exists():
        if taken := [name for name in RESULTS if (output / name).exists()]:
            raise ValueError(f"{output} has {', '.join(taken)} of something else, which this would overwrite; give another "
                             "--output")
        return
    there = _settings_in(output / "settings.json")
    differ = [name for name in there | settings if name != "data" and there.get(name) != settings.get(name)]
    if differ:
        raise ValueError(f"{output} holds a run with other settings: " + "; ".join(
            f"{name} is {there.get(name, 'not set')} there and {settings.get(name, 'not set')} here" for name in differ)
            + ". Give the settings of that run to go on with it, or another --output")


def _settings_in(file: Path) -> dict:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"cannot read {file} ({error}); move it away, or give another --output") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} does not hold the settings of a run; move it away, or give another --output")
    return settings


def split(data: ImageSet, options: argparse.Namespace) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, validation and test images: by number a class, or by fractions of each class.

    The fractions' test images are the same for every seed, so that rates which were chosen on the validation images of one
    seed can be tested on another.

    Raises:
        ValueError: a class too small for all three (says which), or fractions that leave nothing to train on.
    """
    if options.per_class is not None:
        return few_shot_split(data, options.per_class, val_per_class=options.per_class, seed=options.seed)
    if not (options.val_fraction > 0 and options.test_fraction > 0 and options.val_fraction + options.test_fraction < 1):
        raise ValueError(f"--val-fraction and --test-fraction must be above 0 and below 1 together, not {options.val_fraction} "
                         f"and {options.test_fraction}")
    always, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(options.seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label, name in enumerate(data.class_names):
        rows = torch.nonzero(data.labels == label).flatten()
        of_test, of_val = (max(round(part * len(rows)), 1) for part in (options.test_fraction, options.val_fraction))
        if of_test + of_val >= len(rows):
            raise ValueError(f"class {name!r} has {len(rows)} image(s), too few for {of_val} for validation, {of_test} to test "
                             "on and one to train on; add images, or leave the class out")
        test, rest = rows[torch.randperm(len(rows), generator=always)].tensor_split((of_test,))
        val, train = rest[torch.randperm(len(rest), generator=drawn)].tensor_split((of_val,))
        for part, chosen in zip(parts, (train, val, test), strict=True):
            part.append(chosen)
    return tuple(data.subset(torch.cat(part)) for part in parts)


def _model(options: argparse.Namespace, classes: int, us: Team) -> nn.Module:
    """The network with a new head; with several processes the first one goes ahead, so that weights are downloaded once."""
    if us.rank > 0:
        us.wait()
    model = prepared_model(options.weights, classes, options.seed, load=lambda weights: _load(options.model, weights))
    if us.rank == 0:
        us.wait()
    model = model.to(us.device)
    if options.batch_norm == "freeze":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_to_eval_mode)
    elif us.size > 1 and us.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def _to_eval_mode(norm: nn.Module, args) -> None:
    norm.eval()  # at each forward pass, since model.train() sets the mode anew


def _load(name: str, weights: str) -> nn.Module:
    if name == "resnet18":
        return load_resnet18(None if weights == "none" else weights)
    try:
        return torchvision.models.get_model(name, weights="DEFAULT" if weights == "imagenet" else None)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"the weights of {name} are not on this machine and could not be downloaded ({error}); with a "
                              "network, try again; without one, take --model resnet18 --weights glyphs") from error


def carry_out(job: Job, us: Team) -> dict:
    """Train, or go on training, and write the results; what is finished is not done again. Only the first process writes."""
    output, result = Path(job.options.output), Path(job.options.output) / "result.json"
    checkpoints = [output / f"checkpoint-{rank}.pt" for rank in range(us.size)]
    if not result.exists():
        if us.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            _write_json(output / "settings.json", job.settings)
            level(checkpoints)
        us.wait()
        before = snapshot(job.groups)
        history = _train(job, us, checkpoints[us.rank])
        if us.rank == 0:
            _write_results(job, history, before)
        us.wait()
    checkpoints[us.rank].unlink(missing_ok=True)
    found = json.loads(result.read_text(encoding="utf-8"))
    if us.rank == 0:
        print(f"{found['accuracy']:.1%} of {found['images']} test images right (95 % interval {found['low']:.1%} to "
              f"{found['high']:.1%}); more in {output / 'report.md'}")
    return found


def _train(job: Job, us: Team, checkpoint: Path) -> History:
    options = job.options
    model = us.wrapped(job.model, unused=job.plan is not None)  # before it is frozen, as fit demands
    unfreezing = ProgressiveUnfreezing(job.groups, job.plan) if job.plan is not None else None
    torch.default_generator.manual_seed(options.seed + us.rank)  # for dropout
    if us.device.type == "cuda":
        torch.cuda.manual_seed(options.seed + us.rank)
    return fit(model, job.optimizer, DataLoader(job.train, batch_sampler=job.batches, generator=job.batches.generator),
               epochs=options.epochs, schedule=one_cycle(job.optimizer, options.epochs * len(job.batches)),
               unfreezing=unfreezing, val_loader=DataLoader(job.val, 256, generator=torch.Generator()), checkpoint=checkpoint,
               autocast=PRECISIONS[options.precision], progress=us.rank == 0,
               loss_fn=shared_cross_entropy if us.size > 1 else cross_entropy)


def _write_results(job: Job, history: History, before: dict[str, Tensor]) -> None:
    output, names = Path(job.options.output), job.test.class_names
    state = {name: value.cpu() for name, value in job.model.state_dict().items()}
    report.write_whole(output / "model.pt", lambda path: torch.save(state, path))
    _write_json(output / "classes.json", names)
    report.write_whole(output / "history.csv", lambda path: history.to_frame().to_csv(path, index=False))
    found = report.predictions(job.model, job.test, autocast=PRECISIONS[job.options.precision])
    rates = STRATEGIES[job.options.strategy].rates(job.options)(job.groups)
    first_steps = job.plan.of(list(rates)).first_steps if job.plan is not None else None
    report.write_report(output, job.test, *found, layers=report.layer_report(job.groups, before, rates, first_steps),
                        settings=job.settings, notes=USAGE.format(**vars(job.options), classes=len(names)))
    correct, total = int((found[0] == found[1]).sum()), len(job.test)
    low, high = report.accuracy_interval(correct, total)
    _write_json(output / "result.json", {"accuracy": correct / total, "low": low, "high": high, "images": total})


def _write_json(path: Path, value: object) -> None:
    report.write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n",
                                                                    encoding="utf-8"))
