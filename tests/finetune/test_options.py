import pytest

from layerlr_helpers.finetune.options import parser, with_defaults


def options_of(*more):
    return with_defaults(parser("").parse_args(["--output", "x", *more]))


def test_defaults_depend_on_the_data_and_on_the_weights():
    digits, folder = options_of(), options_of("--data", "photos")
    assert (digits.weights, digits.image_size, digits.per_class, digits.lr) == ("glyphs", 64, 10, 3e-3)
    assert (folder.weights, folder.image_size, folder.per_class, folder.lr) == ("imagenet", 128, None, pytest.approx(3e-4))
    assert (digits.val_fraction, folder.val_fraction, folder.test_fraction) == (None, 0.2, 0.2)
    assert options_of("--val-fraction", "0.3").per_class is None


def test_each_strategy_has_the_options_that_it_needs_and_no_other():
    two_rates = options_of("--strategy", "two-rates", "--lr", "0.5")
    assert (two_rates.lr, two_rates.backbone_lr, two_rates.decay) == (0.5, 0.05, None)
    layer_decay = options_of("--lr", "0.5")
    assert (layer_decay.lr, layer_decay.backbone_lr, layer_decay.decay) == (0.5, None, 0.5)
    with pytest.raises(ValueError, match="--decay is for layer-decay, not for uniform"):
        options_of("--strategy", "uniform", "--decay", "0.5")
