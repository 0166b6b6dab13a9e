"""Fine-tune a network on your own images: ``python -m layerlr_helpers.finetune --data DIR --output OUT``.

DIR has one subfolder per class; without --data the network learns the built-in digits. OUT gets report.md (the accuracy on
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
from layerlr_helpers.files import is_utf8, save_whole, shown, write_whole
from layerlr_helpers.finetune import distributed
from layerlr_helpers.finetune.options import PRECISIONS, STRATEGIES, parser, with_defaults
from layerlr_helpers.guards import seeded
from layerlr_helpers.history import DivergedError, History
from layerlr_helpers.images import ImageSet, image_folder
from layerlr_helpers.intervals import accuracy_interval
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18, prepared_model
from layerlr_helpers.param_groups import param_groups
from layerlr_helpers.recipes import fused_adamw
from layerlr_helpers.schedules import one_cycle
from layerlr_helpers.splits import few_shot_split, fraction_split
from layerlr_helpers.training import fit
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
    """All that a run needs. Everything is checked before anything is written."""

    options: argparse.Namespace
    settings: dict
    train: ImageSet
    val: ImageSet
    test: ImageSet
    model: nn.Module
    groups: list[LayerGroup]
    optimizer: Optimizer
    plan: UnfreezePlan | None
    batch_sampler: distributed.DistributedBatchSampler


def main(arguments: Sequence[str] | None = None) -> dict:
    """Run the command; returns what result.json holds: the test's ``accuracy``, ``low`` and ``high``, and ``images``.

    What cannot be used or written ends the process with status 2, training that diverges with 1, both with a message.
    """
    command = parser(__doc__)
    options = command.parse_args(arguments)
    with ExitStack() as stack:
        try:
            context = stack.enter_context(distributed.distributed_context(options.device))
            stack.enter_context(seeded(options.seed + context.rank, context.device))  # for dropout
            options = with_defaults(options)
            job = prepare(options, context)
        except (ValueError, OSError) as error:
            command.error(str(error))
        try:
            return run(job, context)
        except (CheckpointError, OSError) as error:
            command.error(str(error))
        except DivergedError as error:
            command.exit(1, f"{command.prog}: error: {error.what} is {error.value} at step {error.step}, so training has "
                            f"stopped and there is no result; run again with --lr below {options.lr} and another --output. "
                            f"The checkpoint from before stays in {options.output}\n")


def prepare(options: argparse.Namespace, context: distributed.DistributedContext) -> Job:
    """Read the images, make the network and check everything; nothing is written.

    What cannot be used is a ValueError; a missing folder, or weights that cannot be downloaded, are an OSError.
    """
    output = Path(options.output).resolve()
    for folder in filter(None, (options.output, options.data)):
        if not is_utf8(folder):
            raise ValueError(f"the folder's name {shown(folder)} is not UTF-8, so the results could not name it; rename it")
    if options.data is not None and Path(options.data).resolve() in (output, *output.parents):
        raise ValueError(f"--output {output} is within the folder of images, where it would be a class; give a place outside")
    data = (handwritten_digits(image_size=options.image_size) if options.data is None
            else image_folder(options.data, image_size=options.image_size,
                              unreadable="skip" if options.skip_unreadable else "raise"))
    settings = _settings(options, data, context)
    _check_output(output, settings)
    if options.per_class is not None:
        train, val, test = few_shot_split(data, options.per_class, val_per_class=options.per_class, seed=options.seed)
    else:
        train, val, test = fraction_split(data, options.val_fraction, options.test_fraction, options.seed)
    model = _make_model(options, len(data.class_names), context)
    try:
        groups = layer_groups(model, train[0][0][None].to(context.device))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{options.model} cannot take images of {options.image_size} pixels ({error}); most models were made "
                         "for --image-size 224") from error
    batch_sampler = distributed.DistributedBatchSampler(
        len(train), options.batch_size, torch.Generator().manual_seed(options.seed), rank=context.rank,
        world_size=context.world_size)
    _check_batches(batch_sampler, model, options)
    strategy = STRATEGIES[options.strategy]
    optimizer = fused_adamw(param_groups(groups, strategy.rates(options), weight_decay=options.weight_decay))
    plan = strategy.plan(groups, options.epochs * len(batch_sampler)) if strategy.plan is not None else None
    return Job(options, settings, train, val, test, model, groups, optimizer, plan, batch_sampler)


def _settings(options: argparse.Namespace, data: ImageSet, context: distributed.DistributedContext) -> dict:
    """What decides a run's final weights. The images are identified by their content, so the folder may be moved."""
    content = hashlib.sha256(data.images.numpy().tobytes() + bytes(str((data.labels.tolist(), data.class_names)), "utf-8"))
    given = {name: value for name, value in vars(options).items() if value is not None and name not in ("output", "data")}
    return {"data": "digits" if options.data is None else Path(options.data).resolve().name, "images": len(data),
            "content": content.hexdigest()[:16], **given, "device": context.device.type, "processes": context.world_size}


def _check_output(output: Path, settings: dict) -> None:
    """Refuse a folder that holds another run, or files that this run would overwrite."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    file = output / "settings.json"
    if not file.exists():
        if existing := [name for name in RESULTS if (output / name).exists()]:
            raise ValueError(f"{output} has {', '.join(existing)} of something else, which this would overwrite; give another "
                             "--output")
        return
    try:
        saved = {} | json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # it is not text, not JSON, or no dictionary
        raise ValueError(f"{file} does not hold a run's settings ({error}); move it away, or give another --output") from error
    different = [name for name in saved | settings if name != "data" and saved.get(name) != settings.get(name)]
    if different:
        raise ValueError(f"{output} holds a run with other settings: " + "; ".join(
            f"{name} is {saved.get(name, 'not set')} there and {settings.get(name, 'not set')} here" for name in different)
            + ". Give the settings of that run to go on with it, or another --output")


def _make_model(options: argparse.Namespace, classes: int, context: distributed.DistributedContext) -> nn.Module:
    """Make the network with a new head. The first process goes ahead of the others, so that weights are downloaded once."""
    if context.rank > 0:
        context.barrier()
    model = prepared_model(options.weights, classes, options.seed, load=lambda weights: _load(options.model, weights))
    if context.rank == 0:
        context.barrier()
    model = model.to(context.device)
    if options.batch_norm != "freeze" and context.world_size > 1 and context.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def _load(name: str, weights: str) -> nn.Module:
    if name == "resnet18":
        return load_resnet18(None if weights == "none" else weights)
    try:
        return torchvision.models.get_model(name, weights="DEFAULT" if weights == "imagenet" else None)
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"the weights of {name} are not on this machine and could not be downloaded ({error}); with a "
                              "network, try again; without one, take --model resnet18 --weights glyphs") from error


def _check_batches(batch_sampler: distributed.DistributedBatchSampler, model: nn.Module, options: argparse.Namespace) -> None:
    """Refuse batches of which a process would get no image, or a single one where BatchNorm normalises by the batch."""
    uses_batch_statistics = options.batch_norm == "train" and any(isinstance(module, _BatchNorm) for module in model.modules())
    if batch_sampler.smallest_part < (2 if uses_batch_statistics else 1):
        raise ValueError(f"{batch_sampler.images} training images in batches of at most {options.batch_size} give each of "
                         f"{batch_sampler.world_size} process(es) {batch_sampler.smallest_part} at a time, and it takes "
                         + ("2 to normalise by; raise --batch-size or pass --batch-norm freeze" if uses_batch_statistics
                            else "1; raise --batch-size or start fewer processes"))


def run(job: Job, context: distributed.DistributedContext) -> dict:
    """Train, or go on training, and write the results, which only the first process does; a finished run is left as it is."""
    output = Path(job.options.output)
    result_file = output / "result.json"
    checkpoints = [output / f"checkpoint-{rank}.pt" for rank in range(context.world_size)]
    if not result_file.exists():
        if context.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            _write_json(output / "settings.json", job.settings)
            distributed.synchronise_checkpoints(checkpoints)
        context.barrier()
        start_weights = snapshot(job.groups)
        history = _train(job, context, checkpoints[context.rank])
        if context.rank == 0:
            _write_results(job, history, start_weights)
        context.barrier()
    checkpoints[context.rank].unlink(missing_ok=True)
    result = json.loads(result_file.read_text(encoding="utf-8"))
    if context.rank == 0:
        print(f"{result['accuracy']:.1%} of {result['images']} test images right (95 % interval {result['low']:.1%} to "
              f"{result['high']:.1%}); more in {output / 'report.md'}")
    return result


def _train(job: Job, context: distributed.DistributedContext, checkpoint: Path) -> History:
    options = job.options
    # Holding BatchNorm is an unfreezing too, one in which everything trains from the start.
    plan = UnfreezePlan({"*": 0}) if job.plan is None and options.batch_norm == "freeze" else job.plan
    # The model is wrapped before a plan freezes it, as fit demands.
    model = context.wrap(job.model, find_unused_parameters=plan is not None)
    batch_norm = "hold" if options.batch_norm == "freeze" else "freeze"
    unfreezing = ProgressiveUnfreezing(job.groups, plan, batch_norm=batch_norm) if plan is not None else None
    train_loader = DataLoader(job.train, batch_sampler=job.batch_sampler, generator=job.batch_sampler.generator)
    val_loader = DataLoader(job.val, 256, generator=torch.Generator())
    schedule = one_cycle(job.optimizer, options.epochs * len(job.batch_sampler))
    return fit(model, job.optimizer, train_loader, epochs=options.epochs, schedule=schedule, unfreezing=unfreezing,
               val_loader=val_loader, checkpoint=checkpoint, autocast=PRECISIONS[options.precision], progress=context.rank == 0,
               loss_fn=distributed.distributed_cross_entropy if context.world_size > 1 else cross_entropy)


def _write_results(job: Job, history: History, start_weights: dict[str, Tensor]) -> None:
    output, class_names = Path(job.options.output), job.test.class_names
    state = {name: value.cpu() for name, value in job.model.state_dict().items()}
    save_whole(output / "model.pt", state)
    _write_json(output / "classes.json", class_names)
    write_whole(output / "history.csv", lambda path: history.to_frame().to_csv(path, index=False))

    labels, predicted, confidence = report.predictions(job.model, job.test, autocast=PRECISIONS[job.options.precision])
    rates = STRATEGIES[job.options.strategy].rates(job.options)(job.groups)
    first_steps = job.plan.resolved(list(rates)).first_steps if job.plan is not None else None
    report.write_report(output, job.test, labels, predicted, confidence,
                        layers=report.layer_report(job.groups, start_weights, rates, first_steps),
                        settings=job.settings, notes=USAGE.format(**vars(job.options), classes=len(class_names)))
    correct, total = int((labels == predicted).sum()), len(job.test)
    low, high = accuracy_interval(correct, total)
    _write_json(output / "result.json", {"accuracy": correct / total, "low": low, "high": high, "images": total})


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
