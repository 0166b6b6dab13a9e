"""Layer-wise learning rates for fine-tuning in PyTorch: groups, rates, schedules, unfreezing, measurements.

    groups = layer_groups(model)
    optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(head_lr=1e-3, decay=0.7)))
    history = fit(model, optimizer, loader, epochs=5, schedule=one_cycle(optimizer, 5 * len(loader)))
"""

from layerlr_helpers.course.data import handwritten_digits, printed_glyphs, shifted
from layerlr_helpers.diagnostics import layer_statistics, probe_layers, relative_gradient_rates, snapshot
from layerlr_helpers.features import cache_features, head_module, layer_features
from layerlr_helpers.history import DivergedError, History
from layerlr_helpers.images import ImageSet, image_folder
from layerlr_helpers.layers import LayerGroup, layer_groups
from layerlr_helpers.models import load_resnet18, new_head
from layerlr_helpers.optim import CombinedOptimizer, LayerAdaptiveLR
from layerlr_helpers.param_groups import (
    current_rates,
    describe,
    head_and_backbone,
    layer_decay,
    param_groups,
    per_group,
    uniform,
)
from layerlr_helpers.range_test import lr_range_test
from layerlr_helpers.schedules import one_cycle, preview, slanted_triangular, warmup_cosine
from layerlr_helpers.splits import few_shot_split
from layerlr_helpers.studies.compare import Strategy, Task, compare
from layerlr_helpers.training import evaluate, fit, train_step
from layerlr_helpers.unfreezing import PlateauUnfreezing, ProgressiveUnfreezing, UnfreezePlan, freeze, unfreeze

__all__ = [
    "CombinedOptimizer", "DivergedError", "History", "ImageSet", "LayerAdaptiveLR", "LayerGroup", "PlateauUnfreezing",
    "ProgressiveUnfreezing", "Strategy", "Task", "UnfreezePlan", "cache_features", "compare", "current_rates", "describe",
    "evaluate", "few_shot_split", "fit", "freeze", "handwritten_digits", "head_and_backbone", "head_module", "image_folder",
    "layer_decay", "layer_features", "layer_groups", "layer_statistics", "load_resnet18", "lr_range_test", "new_head",
    "one_cycle", "param_groups", "per_group", "preview", "printed_glyphs", "probe_layers", "relative_gradient_rates",
    "shifted", "slanted_triangular", "snapshot", "train_step", "unfreeze", "uniform", "warmup_cosine",
]
