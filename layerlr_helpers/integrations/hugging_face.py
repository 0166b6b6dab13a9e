"""A plan of unfreezing in the ``Trainer`` of Hugging Face's transformers."""

from layerlr_helpers.integrations.checks import check_distributed, check_in_optimizer, check_installed, check_is_plan
from layerlr_helpers.param_groups import current_rates
from layerlr_helpers.unfreezing import ProgressiveUnfreezing

try:
    from transformers import TrainerCallback
except ImportError:  # the module can be read without the library, and a callback cannot be made
    TrainerCallback = object


class UnfreezingTrainerCallback(TrainerCallback):
    """Carries out a plan of unfreezing in a ``Trainer`` and logs the rate of each group, as ``lr/NAME``.

    ::

        groups = layer_groups(model, inputs)
        optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(1e-4, 0.9)))
        unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=100))
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None),
                          callbacks=[UnfreezingTrainerCallback(unfreezing)])

    The plan's steps are the optimizer's, ``state.global_step``, so a run that is resumed from a checkpoint goes on as it would
    have. Parameters that the model's author or an adapter method such as LoRA has fixed stay fixed. The rates logged with a
    loss are those of the last step; the Trainer's own ``learning_rate`` is that of the first group alone. Reporters that the
    Trainer adds itself (``report_to``) are called before all callbacks that it is given, and so miss the rates; given after
    this one, ``callbacks=[UnfreezingTrainerCallback(…), TensorBoardCallback()]``, a reporter has them.

    Args:
        unfreezing: a ``ProgressiveUnfreezing``; one that decides by metrics is a ValueError.

    When training begins, an optimizer without all of the plan's groups is a ValueError; in several processes so are
    parameters frozen before, and training arguments without ``ddp_find_unused_parameters=True``. Without transformers,
    making a callback is an ImportError.
    """

    def __init__(self, unfreezing: ProgressiveUnfreezing):
        check_installed(TrainerCallback, type(self).__name__, "transformers")
        check_is_plan(unfreezing)
        self.unfreezing = unfreezing
        self.rates: dict[str, float] = {}

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Check that the plan can be carried out."""
        check_in_optimizer(self.unfreezing, optimizer.param_groups)
        if args.world_size > 1:
            check_distributed(self.unfreezing, args.ddp_find_unused_parameters is True,
                              "pass TrainingArguments(ddp_find_unused_parameters=True)")

    def on_step_begin(self, args, state, control, **kwargs):
        """Freeze and unfreeze for the step that begins."""
        self.unfreezing.apply(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Take note of the rates that the step will use."""
        self.rates = {f"lr/{name}": rate for name, rate in current_rates(optimizer).items()}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the rates to what is logged with a training loss, and to the Trainer's history."""
        if "loss" in (logs or {}):
            logs |= self.rates
            state.log_history[-1] |= self.rates
