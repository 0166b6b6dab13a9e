"""An optimizer that adapts each layer's learning rate from its gradients, and one made of several."""

from layerlr_helpers.optim.combined import CombinedOptimizer
from layerlr_helpers.optim.layer_adaptive import DIRECTIONS, POOLS, LayerAdaptiveLR

__all__ = ["DIRECTIONS", "POOLS", "CombinedOptimizer", "LayerAdaptiveLR"]
