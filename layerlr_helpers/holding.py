"""Holding layers still: in a frozen group, a layer that keeps a state runs on the state that is stored, which does not move."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # the common base of all kinds, SyncBatchNorm and InstanceNorm too

from layerlr_helpers.layers import LayerGroup


def keeps_state(module: nn.Module) -> bool:
    """Whether a layer keeps something that is no parameter and that training moves.

    BatchNorm and InstanceNorm do, and any module with buffers of its own that are saved with the model and are no whole
    numbers: spectral norm, EvoNorm, a norm of one's own, a codebook. A mask or a table of positions may look the same, and a
    module that only reads it takes no harm if it is held.
    """
    return isinstance(module, _NormBase) or bool(_state(module))


def _state(module: nn.Module) -> list[str]:
    """The names of a module's own buffers that are saved and can move bit by bit."""
    return [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_floating_point()
            and name not in module._non_persistent_buffers_set]


def layers_with_state(groups: Sequence[LayerGroup]) -> dict[nn.Module, set[str]]:
    """The layers of the groups that keep a state, each with the names of the groups that it is in."""
    names: dict[nn.Module, set[str]] = {}
    for group in groups:
        for layer in (part for module in group.modules.values() for part in module.modules() if keeps_state(part)):
            names.setdefault(layer, set()).add(group.name)
    return names


def hold_still(layer: nn.Module, still: bool) -> None:
    """Let a layer's state stay as it is whatever its mode (``still``), or no longer.

    It runs as in eval mode, and on copies of its buffers, which is what holds a layer that moves them in any mode. Only the
    copies hold a module that is made of layers, since there the train mode can mean more: attention that drops weights, or a
    model that returns something else. The hooks' handles are kept on the layer, so that a copy of the model, or a second
    ProgressiveUnfreezing, can remove them.
    """
    if still and not hasattr(layer, "_held_still"):
        made_of_layers = any(True for child in layer.children() for _ in child.parameters())
        # Before all other hooks, because the older form of spectral norm is one, and it looks at the mode.
        handles = [] if made_of_layers else [layer.register_forward_pre_hook(_run_as_eval, prepend=True),
                                             layer.register_forward_hook(_back_to_mode, always_call=True)]
        if not isinstance(layer, _NormBase):
            handles += [layer.register_forward_pre_hook(_work_on_copies, prepend=True),
                        layer.register_forward_hook(_drop_copies, always_call=True)]
        layer._held_still = tuple(handles)
        if hasattr(layer, "reset_running_stats"):  # torch's update_bn would reset statistics that nothing measures anew
            layer.reset_running_stats = _keep_statistics
    elif not still and hasattr(layer, "_held_still"):
        for handle in layer.__dict__.pop("_held_still"):
            handle.remove()
        layer.__dict__.pop("reset_running_stats", None)


# The mode is changed for the forward pass alone, so that model.train() and model.eval() mean what they always do.
def _run_as_eval(layer: nn.Module, args) -> None:
    layer._mode_outside, layer.training = layer.training, False


def _back_to_mode(layer: nn.Module, args, output) -> None:
    layer.training = layer.__dict__.pop("_mode_outside", layer.training)


# Copies in place of writing old values back, since the backward pass may need what the forward pass has read.
def _work_on_copies(layer: nn.Module, args) -> None:
    layer._stored = {name: layer._buffers[name] for name in _state(layer)}
    layer._buffers.update({name: buffer.clone() for name, buffer in layer._stored.items()})


def _drop_copies(layer: nn.Module, args, output) -> None:
    layer._buffers.update(layer.__dict__.pop("_stored", {}))


def _keep_statistics() -> None:
    """Stands in for ``reset_running_stats`` of a layer that is held still."""
