"""The tasks and the candidates of the studies of a transformer, on sentences from docstrings."""

from collections.abc import Sequence
from functools import cache, partial

import torch

from layerlr_helpers import recipes
from layerlr_helpers.course.docstrings import docstring_sentences, shifted_texts
from layerlr_helpers.course.lora import add_lora
from layerlr_helpers.minilm import TextClassifier, load_minilm
from layerlr_helpers.param_groups import Rates, layer_decay, per_group
from layerlr_helpers.schedules import warmup_cosine
from layerlr_helpers.studies.candidates import (
    at,
    backbone_and_head,
    between,
    candidate,
    line,
    on_grid,
    warmup_and_cosine,
)
from layerlr_helpers.studies.compare import Candidates, Strategy, Task, trained
from layerlr_helpers.texts import TextSet

LAYERS = ("bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(6)), "head")
OPTIONS = {"weights": "minilm", "schedule": warmup_and_cosine}
BEFORE_THE_SHIFT = 400  # sentences of each library that the network of the surgery knows; the shifted ones are others
SEED_BEFORE_THE_SHIFT = 100  # none that a study is searched or tested on

sentences = cache(docstring_sentences)


def sentence_task(**options) -> Task:
    """Ten sentences of each library to train on, in 40 steps of 16; 64 of each to test on."""
    return Task(**{"data": sentences(), "name": "sentences", "per_class": 10, "val_per_class": 30, "test_per_class": 64,
                   "batch_size": 16, "steps": 40, "autocast": False, "load": partial(load_minilm, num_classes=2)} | options)


def strategies(task: Task) -> Candidates:
    """Fourteen ways to fine-tune, with four rates each to begin with; where the layers' rates differ, it is the highest."""
    def tenth(lr: float) -> Rates:
        return backbone_and_head(lr / 10, lr)

    def faster_b(lr: float) -> Rates:  # Hayou et al. (2024) want B faster than A; how much depends on model and task
        return per_group({"*": lr, "*.lora_B": 16 * lr})

    return {"head only": line(3e-3, 1e-1, plan=recipes.head_only, **OPTIONS),
            "one rate": line(3e-5, 1e-3, **OPTIONS),
            "one rate, no warm-up": line(3e-5, 1e-3, **OPTIONS | {"schedule": partial(warmup_cosine, warmup_steps=0)}),
            "two rates": line(3e-4, 1e-2, tenth, **OPTIONS),
            **{f"decay {decay}": line(*ends, partial(layer_decay, decay=decay), **OPTIONS)
               for decay, ends in ((0.95, (3e-5, 1e-3)), (0.8, (1e-4, 3e-3)), (0.65, (1e-4, 3e-3)))},
            "reversed decay 0.8": line(3e-5, 1e-3, partial(recipes.reversed_decay, decay=0.8), **OPTIONS),
            "gradual": line(1e-4, 3e-3, plan=recipes.gradual, **OPTIONS),
            "head, then all": line(3e-4, 1e-2, tenth, plan=recipes.head_then_all, **OPTIONS),
            "frozen embeddings": line(3e-5, 1e-3, plan=recipes.all_but_first(1), **OPTIONS),
            "new top layer": line(3e-5, 1e-3, keep=len(LAYERS) - 2, **OPTIONS),
            "LoRA": line(3e-4, 1e-2, change=add_lora, **OPTIONS),
            "LoRA+": line(1e-4, 3e-3, faster_b, change=add_lora, granularity="tensor", **OPTIONS)}


def robustness(task: Task) -> Candidates:
    """One rate for all and three decays, over a grid of the head's rate."""
    grid = between(3e-5, 1e-2)
    return {"one rate": at(grid, **OPTIONS)} | {
        f"decay {decay}": at(grid, partial(layer_decay, decay=decay), **OPTIONS) for decay in (0.95, 0.8, 0.65)}


def labels(task: Task) -> Candidates:
    """The head alone, one rate, and layer decay."""
    chosen = strategies(task)
    return {name: chosen[name] for name in ("head only", "one rate", "decay 0.8")}


def label_tasks() -> list[Task]:
    """From 2 to 50 sentences of each library, in the same number of steps."""
    return [sentence_task(per_class=n, name=f"{n} a class") for n in (2, 5, 10, 50)]


def surgery(task: Task) -> Candidates:
    """One layer alone, all at one rate, all at graded rates, or none, from a network that knows the task without the shift."""
    options = OPTIONS | {"weights": "tuned"}
    return {layer: line(1e-4, 3e-3, plan=recipes.only(layer), **options) for layer in LAYERS[:-1]} | {
        "head": line(1e-3, 3e-2, plan=recipes.head_only, **options),
        "all": line(3e-5, 1e-3, **options),
        "decay 0.8": line(1e-4, 3e-3, partial(layer_decay, decay=0.8), **options),
        "reversed decay 0.8": line(3e-5, 1e-3, partial(recipes.reversed_decay, decay=0.8), **options),
        "no training": on_grid(partial(candidate, plan=recipes.head_only, **options), [(0.0,)], [0.0])}


@cache
def surgery_tasks() -> tuple[Task, ...]:
    """The same libraries in worse sentences, or under other names; the head keeps its classes."""
    _, unseen = _two_parts(sentences())
    return tuple(sentence_task(data=shifted_texts(unseen, shift, seed=4242), name=shift, new_head=False, load=load_tuned)
                 for shift in ("typing errors", "no vowels", "permuted"))


def load_tuned(weights: str | None) -> TextClassifier:
    """Return MiniLM as it was after fine-tuning on sentences without a shift, or random weights with None."""
    model = load_minilm(None, num_classes=len(sentences().class_names))
    if weights is not None:
        model.load_state_dict(_tuned_state())
    return model


@cache
def _tuned_state() -> dict[str, torch.Tensor]:
    known, _ = _two_parts(sentences())
    task = sentence_task(data=known, per_class=200, val_per_class=30, steps=300, new_head=True)
    strategy = Strategy("decay 0.8", layer_decay(1e-3, 0.8), **OPTIONS)
    model, _ = trained(strategy, task, SEED_BEFORE_THE_SHIFT)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _two_parts(data: TextSet) -> tuple[TextSet, TextSet]:
    """Return the first ``BEFORE_THE_SHIFT`` sentences of each library, and the others."""
    first: Sequence[int] = [row for label in range(len(data.class_names))
                            for row in torch.nonzero(data.labels == label).flatten()[:BEFORE_THE_SHIFT].tolist()]
    known = torch.zeros(len(data), dtype=torch.bool)
    known[first] = True
    return data.subset(known), data.subset(~known)
