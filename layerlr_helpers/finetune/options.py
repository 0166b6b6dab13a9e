"""The options of the fine-tuning command, and the strategies among which ``--strategy`` chooses."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from os.path import expanduser

import torch
import torchvision

from layerlr_helpers import recipes
from layerlr_helpers.naming import matching
from layerlr_helpers.param_groups import Rates, head_and_backbone, layer_decay, uniform

# The two models that are left out train with a second classifier, which would need a second new head.
MODELS = sorted(set(torchvision.models.list_models(module=torchvision.models)) - {"googlenet", "inception_v3"})
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Strategy:
    """A named way to fine-tune: how fast each layer learns, and from when."""

    default_lr: float  # the head's, for glyph or random weights; ImageNet's weights get a tenth of it
    rates: Callable[[argparse.Namespace], Rates]
    plan: recipes.Plan | None = None  # None trains all layers from the start
    rate_options: tuple[str, ...] = ()  # what ``rates`` reads beside ``lr``, and other strategies refuse


def _two_rates(options: argparse.Namespace) -> Rates:
    return head_and_backbone(backbone_lr=options.backbone_lr, head_lr=options.lr)


STRATEGIES = {
    "uniform": Strategy(1e-3, lambda options: uniform(options.lr)),
    "two-rates": Strategy(3e-3, _two_rates, rate_options=("backbone_lr",)),
    "layer-decay": Strategy(3e-3, lambda options: layer_decay(options.lr, options.decay), rate_options=("decay",)),
    "head-only": Strategy(1e-2, lambda options: uniform(options.lr), recipes.head_only),
    "gradual": Strategy(3e-3, _two_rates, recipes.gradual, rate_options=("backbone_lr",)),
    "head-then-all": Strategy(3e-3, _two_rates, recipes.head_then_all, rate_options=("backbone_lr",)),
}


def _positive_integer(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or above, not {number}")
    return number


def parser(description: str) -> argparse.ArgumentParser:
    """Make the command's parser."""
    result = argparse.ArgumentParser(prog="python -m layerlr_helpers.finetune", description=description,
                                     usage="%(prog)s --output OUT [--data DIR] [--strategy NAME] [more options: see --help]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--output", metavar="OUT", required=True, type=expanduser, help="folder for the results; it is made if it is not there")
    add("--data", metavar="DIR", type=expanduser,
        help="folder of images, one subfolder per class (default: the built-in digits)")
    # The default None leaves the option out of settings.json.
    add("--skip-unreadable", action="store_true", default=None, help="leave out images that cannot be read, with a warning")
    add("--strategy", choices=STRATEGIES, default="layer-decay",
        help="which layers learn, how fast, and from when (default %(default)s)")
    add("--lr", type=float, help="peak rate of the head (default: by strategy, a tenth of it for ImageNet's weights)")
    add("--decay", type=float, help="of layer-decay: each layer's rate over that of the next one (default 0.5)")
    add("--backbone-lr", type=float, help="of two-rates, gradual, head-then-all: the other layers' rate (default: lr / 10)")
    add("--epochs", type=_positive_integer, default=20, help="passes over the training images (default %(default)s)")
    add("--batch-size", type=_positive_integer, default=20,
        help="most images a step, of all processes together (default %(default)s)")
    add("--image-size", type=_positive_integer, help="pixels of a side (default 128, of the digits 64)")
    add("--per-class", type=_positive_integer,
        help="train on so many images a class, validate on as many, test on the rest (digits: 10)")
    add("--val-fraction", type=float, help="part of each class to validate on after each epoch (default 0.2)")
    add("--test-fraction", type=float, help="part of each class for the report (default 0.2)")
    add("--seed", type=int, default=0, help="of the split, the new head and the order of batches (default %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (default %(default)s)")
    add("--model", default="resnet18", help="torchvision's name of a classification model (default %(default)s)")
    add("--weights", choices=("glyphs", "imagenet", "none"),
        help="to start from: printed letters (resnet18 only; default for the digits), ImageNet (downloaded once), or random")
    add("--batch-norm", choices=("train", "freeze"), default="train",
        help="freeze: BatchNorm layers normalise by their stored statistics while weights train (default %(default)s)")
    add("--precision", choices=PRECISIONS, default="float32", help="of the forward pass (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is a GPU")
    return result


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other options; options that do not go together are a ValueError."""
    strategy, digits = STRATEGIES[options.strategy], options.data is None
    if matching(options.model, MODELS, what="model") != [options.model]:
        raise ValueError(f"--model takes one name and no pattern, not {options.model!r}")
    for option in ("decay", "backbone_lr"):
        if getattr(options, option) is not None and option not in strategy.rate_options:
            users = [name for name, other in STRATEGIES.items() if option in other.rate_options]
            raise ValueError(f"--{option.replace('_', '-')} is for {', '.join(users)}, not for {options.strategy}")
    by_fractions = options.val_fraction is not None or options.test_fraction is not None
    if options.per_class is not None and by_fractions:
        raise ValueError("give either --per-class, or --val-fraction and --test-fraction")
    weights = options.weights or ("glyphs" if digits and options.model == "resnet18" else "imagenet")
    if weights == "glyphs" and options.model != "resnet18":
        raise ValueError(f"the weights 'glyphs' are of resnet18, not of {options.model}; there are 'imagenet' and 'none'")

    lr = options.lr if options.lr is not None else strategy.default_lr / (10 if weights == "imagenet" else 1)
    defaults = {"weights": weights, "lr": lr, "image_size": 64 if digits else 128}
    defaults |= {option: {"decay": 0.5, "backbone_lr": lr / 10}[option] for option in strategy.rate_options}
    if options.per_class is not None or (digits and not by_fractions):
        defaults["per_class"] = 10
    else:
        defaults |= {"val_fraction": 0.2, "test_fraction": 0.2}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**vars(options), **defaults, **given})
