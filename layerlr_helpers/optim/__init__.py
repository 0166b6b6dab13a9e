"""An optimizer that adapts each layer's learning rate from its gradients."""

from layerlr_helpers.optim.layer_adaptive import DIRECTIONS, POOLS, LayerAdaptiveLR

__all__ = ["DIRECTIONS", "POOLS", "LayerAdaptiveLR"]
