"""Pretrained networks: ResNet-18 with three kinds of weights, and a new head for any model."""

import hashlib
import warnings
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet, ResNet18_Weights, resnet18

from layerlr_helpers.guards import seeded
from layerlr_helpers.layers import LayerGroup, groups_seen, layer_groups
from layerlr_helpers.naming import check_choice
from layerlr_helpers.tracing import Trace, trace_forward

CHECKPOINT = "resnet18_glyphs.pt"
CHECKPOINT_SHA256 = "919cb7fd089749749fb8633de919563c55709574fccf1556cd16307a6b2d497c"


def load_resnet18(weights: str | None = "glyphs", *, num_classes: int | None = None) -> ResNet:
    """torchvision's ResNet-18 in eval mode.

    Args:
        weights: ``"glyphs"``: the checkpoint that comes with this package, trained on 64 printed letters at 64 pixels.
            ``"imagenet"``: torchvision's ``IMAGENET1K_V1``, downloaded once. None: random, from torch's generator.
        num_classes: replace the head by a random one with that many outputs; None keeps the head of the weights.

    A ConnectionError says that ImageNet's weights could not be downloaded, a ValueError that weights are damaged.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    check_choice("weights", weights, ("glyphs", "imagenet", None))
    if weights == "glyphs":
        state = read_checkpoint(checkpoint_path(), CHECKPOINT_SHA256)
        model = resnet18(num_classes=len(state["fc.weight"]))
        model.load_state_dict(state)  # stored as fp16, it becomes float32 here
    elif weights == "imagenet":
        model = _imagenet()
    else:
        model = resnet18()
    if num_classes is not None:
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model.eval()


def new_head(model: nn.Module, num_classes: int, example_input=None, *, head: str | None = None) -> nn.Module:
    """Put a new, random classifier of ``num_classes`` outputs in place of the model's last one; returns the model.

    It replaces the ``nn.Linear`` or ``nn.Conv2d`` that runs last in the head, found by one forward pass: ``fc`` of a
    ResNet, ``classifier.6`` of a VGG, ``heads.head`` of a ViT. The new one is on the same device and of the same dtype, and
    where the model keeps its number of classes (``num_classes``, ``num_labels``, also of its ``config``), it is set. Where
    one output is made by several classifiers, as the mean of two, all are replaced. ``example_input`` and ``head`` are as in
    ``layer_groups``. A ValueError, before which nothing has changed, says that there is no such layer, that there are several
    outputs to choose from by ``head``, or that the model's output would not become one of ``num_classes``.

    >>> new_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), num_classes=5)[-1]
    Linear(in_features=8, out_features=5, bias=True)
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    trace = trace_forward(model, example_input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a model without a head gets an error below
        heads = [group for group in groups_seen(trace, model, head=head) if group.depth == 0]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no head of its own to replace; add a classifier by hand, or name the "
                         "module that is the head: head=…")
    if len(heads) > 1 and len(trace.outputs) > 1:
        raise ValueError(f"{type(model).__name__} has several outputs, from {', '.join(group.name for group in heads)}; choose "
                         "one by its module's name in the model: head=…")
    replaced = {name: model.get_submodule(name) for name in (_classifier(group, trace) for group in heads)}
    old_counts = {_outputs(old) for old in replaced.values()}
    changed = _set_number_of_classes(model, old_counts, num_classes)  # some models need it in their forward pass
    try:
        for name, old in replaced.items():
            model.set_submodule(name, _like(old, num_classes))
        outputs = trace_forward(model, example_input).outputs
        fits = any(new == num_classes and old in old_counts for before, after in zip(trace.outputs, outputs, strict=True)
                   for old, new in zip(before, after, strict=True))
        problem = None if fits else f"the model's outputs, {trace.outputs} before, would be {outputs}"
    except Exception as error:  # the layers around a classifier can fail in any way
        problem = f"the model would fail: {str(error)[:200]}"
    if problem is not None:
        for name, old in replaced.items():
            model.set_submodule(name, old)
        for owner, name, count in changed:
            setattr(owner, name, count)
        raise ValueError(f"with {num_classes} outputs in place of {', '.join(replaced)}, {problem}; replace the classifier by "
                         "hand")
    return model


def _classifier(head: LayerGroup, trace: Trace) -> str:
    """The name of the linear or convolutional layer of a head that runs last."""
    layers = {name: module for prefix, part in head.modules.items() for name, module in part.named_modules(prefix=prefix)
              if isinstance(module, nn.Linear | nn.Conv2d) and name in trace.first_calls}
    if not layers:
        raise ValueError(f"the last layer group {head.name!r} has neither an nn.Linear nor an nn.Conv2d to replace, only "
                         f"{', '.join(head.modules) or 'parameters'}; replace the model's classifier by hand")
    return max(layers, key=trace.first_calls.get)


def _like(old: nn.Linear | nn.Conv2d, outputs: int) -> nn.Module:
    like = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, outputs, **like)
    return nn.Conv2d(old.in_channels, outputs, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
                     padding_mode=old.padding_mode, **like)


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _set_number_of_classes(model: nn.Module, old: set[int], new: int) -> list[tuple]:
    """Several libraries' models keep the number in these attributes. Returns what was there before, to put it back."""
    changed = []
    for owner in [*model.modules(), getattr(model, "config", None)]:
        for name in ("num_classes", "num_labels"):
            count = getattr(owner, name, None)
            if isinstance(count, int) and count in old:
                changed.append((owner, name, count))
                setattr(owner, name, new)
    return changed


def checkpoint_path() -> Path:
    """Where the checkpoint is: in the installed package, or in ``data/`` beside it in a checkout."""
    installed, checkout = (folder / "data" for folder in Path(__file__).resolve().parents[:2])
    for folder in (installed, checkout):
        if (folder / CHECKPOINT).is_file():
            return folder / CHECKPOINT
    raise FileNotFoundError(f"no {CHECKPOINT} in {installed} or {checkout}; restore it with git checkout data/{CHECKPOINT}, "
                            "or install the package again")


def read_checkpoint(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """Read a state_dict as it was stored; a ValueError if the file is not, byte for byte, the one with that SHA-256."""
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} is damaged or not the checkpoint of this version: {len(data):,} bytes with SHA-256 "
                         f"{digest[:12]}…, expected {sha256[:12]}…; restore it with git checkout, or install the package "
                         "again (if you pretrained anew on purpose, put its SHA-256 into models.py)")
    return torch.load(path, map_location="cpu", weights_only=True)


def _imagenet() -> ResNet:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    try:
        return resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)
    except (OSError, HTTPException) as error:  # URLError and the time-outs are OSErrors
        raise ConnectionError(f"ImageNet's weights are not on this machine and could not be downloaded ({error}). With a "
                              f"network, call this again; without one, copy {file.name} from a machine that has it "
                              f"to {file.parent}, or use weights='glyphs', which needs no network.") from error
    except Exception as error:  # a damaged file raises a different error for each way of being damaged
        raise ValueError(f"the ImageNet weights {file} are damaged ({str(error)[:200]}); delete this file, and it is "
                         "downloaded again") from error


def prepared_model(weights: str | None, num_classes: int | None, seed: int, *, keep: int | None = None,
                   load: Callable[[str | None], nn.Module] = load_resnet18) -> nn.Module:
    """A network whose random parts depend on ``seed`` alone; torch's own generator is left as it was.

    ``load(weights)`` makes the network, and ``load(None)`` one with random weights. ``num_classes`` gives it a new head, the
    same one for all ``weights``; None keeps the head. With ``keep``, the first ``keep`` layer groups and the head keep their
    weights, and the groups between get random ones.
    """
    with seeded(seed):
        model = load(weights)
    if keep is not None:
        with seeded(seed):
            random_model = load(None)
            for group in (group for group in layer_groups(model)[keep:] if group.depth > 0):
                for name, module in group.modules.items():
                    module.load_state_dict(random_model.get_submodule(name).state_dict())
    if num_classes is not None:
        with seeded(seed):  # again: random weights took more numbers than pretrained ones
            new_head(model, num_classes)
    return model
