"""LoRA (Hu et al., 2022): small matrices beside frozen ones, in as few lines as show how it works."""

import math
from collections.abc import Sequence

from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus ``scale · B A x``, of which only ``A`` [rank, inputs] and ``B`` [outputs, rank] are trained.

    ``B`` begins at zero, so the layer begins as what it was.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.lora_A.T) @ self.lora_B.T


def add_lora(model: nn.Module, layers: Sequence[str] = ("query", "value"), *, rank: int = 8, alpha: float = 16,
             head: str = "head") -> nn.Module:
    """Freeze a model but for its head, and put a :class:`LoRALinear` in place of each linear layer of these names.

    ``layers`` are the last parts of names, as in ``bert.encoder.layer.0.attention.self.query``. Returns the model. If no
    linear layer has such a name, or no module is the head, that is a ValueError.
    """
    found = [name for name, module in model.named_modules()
             if name.rpartition(".")[2] in layers and isinstance(module, nn.Linear)]
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    if not found:
        raise ValueError(f"no linear layer of {type(model).__name__} is called {' or '.join(layers)}; they are called "
                         f"{', '.join(linear)}")
    if head not in dict(model.named_modules()):
        raise ValueError(f"{type(model).__name__} has no module {head!r}; name the head that is to be trained: head=…")
    model.requires_grad_(False)
    for name in found:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    model.get_submodule(head).requires_grad_(True)
    return model
