"""A plan of unfreezing in the ``Trainer`` of Lightning, and random numbers that go on where a checkpoint left them."""

from torch.nn.parallel import DistributedDataParallel

from layerlr_helpers.guards import random_state, set_random_state
from layerlr_helpers.integrations.checks import check_distributed, check_in_optimizer, check_installed, check_is_plan
from layerlr_helpers.param_groups import current_rates
from layerlr_helpers.unfreezing import ProgressiveUnfreezing

try:
    from lightning.pytorch import Callback
except ImportError:  # the module can be read without the library, and a callback cannot be made
    Callback = object


class UnfreezingCallback(Callback):
    """Carries out a plan of unfreezing in a Lightning ``Trainer`` and logs the rate of each group, as ``lr/NAME``.

    ::

        unfreezing = ProgressiveUnfreezing(module.groups, UnfreezePlan.top_down(module.groups, every=100))
        trainer = Trainer(callbacks=[UnfreezingCallback(unfreezing)])

    where the module's ``configure_optimizers`` returns an optimizer of ``param_groups(self.groups, …)``, all groups from the
    start. The plan's steps are the optimizer's, ``trainer.global_step`` (with several optimizers, the steps of all together),
    so a run that is resumed from a checkpoint goes on with the layers that would train. Parameters that the model's author
    or an adapter method such as LoRA has fixed stay fixed. The rates are those that the step of the batch will use.

    Args:
        unfreezing: a ``ProgressiveUnfreezing``; one that decides by metrics is a ValueError.

    When training begins, optimizers without all of the plan's groups are a ValueError; in several processes so are parameters
    frozen before, and any strategy but ``"ddp_find_unused_parameters_true"`` and its like. Without lightning, making a
    callback is an ImportError.
    """

    def __init__(self, unfreezing: ProgressiveUnfreezing):
        check_installed(Callback, type(self).__name__, "lightning")
        check_is_plan(unfreezing)
        self.unfreezing = unfreezing

    def on_train_start(self, trainer, pl_module) -> None:
        """Check that the plan can be carried out."""
        check_in_optimizer(self.unfreezing, _param_groups(trainer))
        if trainer.world_size > 1:
            model = trainer.strategy.model
            finds_unused = isinstance(model, DistributedDataParallel) and model.find_unused_parameters
            check_distributed(self.unfreezing, finds_unused, 'pass Trainer(strategy="ddp_find_unused_parameters_true")')

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Freeze and unfreeze for the step that this batch is of, and log its rates."""
        self.unfreezing.apply(trainer.global_step)
        pl_module.log_dict({f"lr/{name}": rate for name, rate in current_rates(_param_groups(trainer)).items()})


class RandomStateCallback(Callback):
    """Keeps the state of torch's random numbers in checkpoints, which Lightning itself does not.

    With it, a run in one process that is resumed from the checkpoint of an epoch's end has the order of batches and the
    dropout that it would have had. In several processes it does nothing, since a checkpoint holds the state of the first
    alone. Without lightning, making a callback is an ImportError.
    """

    def __init__(self):
        check_installed(Callback, type(self).__name__, "lightning")
        self.saved: dict | None = None

    def state_dict(self) -> dict:
        """The state of the random numbers at this moment."""
        return random_state(())

    def load_state_dict(self, state_dict: dict) -> None:
        """Take note of the state to begin with."""
        self.saved = state_dict

    def on_fit_start(self, trainer, pl_module) -> None:
        """Go on from the checkpoint's state, before the first batches are drawn."""
        if self.saved is not None and trainer.world_size == 1:
            set_random_state(self.saved, ())
            self.saved = None


def _param_groups(trainer) -> list[dict]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
