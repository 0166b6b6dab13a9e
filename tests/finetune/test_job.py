"""The fine-tuning command, on a tiny folder of photographs (here scans of handwriting, which are real as well)."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from layerlr_helpers import evaluate, load_resnet18
from layerlr_helpers.finetune import job as finetune
from layerlr_helpers.finetune.distributed import DistributedContext
from layerlr_helpers.finetune.options import STRATEGIES, parser, with_defaults
from layerlr_helpers.intervals import accuracy_interval
from tests.finetune.in_processes import in_double_precision

SINGLE_PROCESS = DistributedContext(0, 1, torch.device("cpu"))
RESULTS = {*finetune.RESULTS, "settings.json"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory, small_digits):
    """Three classes of 13 images."""
    folder = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("none", "one", "two")):
        (folder / name).mkdir()
        for i in torch.nonzero(small_digits.labels == label).flatten()[:13].tolist():
            Image.fromarray(small_digits.images[i].permute(1, 2, 0).numpy()).save(folder / name / f"{i}.png")
    return folder


def arguments(photos, output, *more):
    return ["--data", str(photos), "--output", str(output), "--image-size", "32", "--weights", "glyphs", "--device", "cpu",
            "--epochs", "2", "--batch-size", "5", *more]


def options_of(*args):
    return with_defaults(parser("").parse_args([*args]))


@pytest.fixture(scope="module")
def done(photos, tmp_path_factory):
    """A finished run, and what main returned."""
    output = tmp_path_factory.mktemp("runs") / "new" / "run"
    return output, finetune.main(arguments(photos, output))


def weights(output):
    return torch.load(output / "model.pt", weights_only=True)


def contents(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()} if folder.exists() else None


def test_the_run_leaves_its_results_and_nothing_else(done):
    output, _ = done
    assert {entry.name for entry in output.iterdir()} == RESULTS
    assert json.loads((output / "classes.json").read_text()) == ["none", "one", "two"]


def test_the_weights_load_in_plain_torchvision_and_have_the_reported_accuracy(done, photos):
    output, result = done
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(weights(output))
    test = finetune.prepare(options_of(*arguments(photos, "elsewhere")), SINGLE_PROCESS).test
    accuracy = evaluate(model, DataLoader(test, 2))["accuracy"]
    right = round(accuracy * len(test))
    low, high = accuracy_interval(right, len(test))
    assert result == json.loads((output / "result.json").read_text()) == {
        "accuracy": pytest.approx(accuracy), "low": low, "high": high, "images": len(test)}
    assert f"({right} of {len(test)} right" in (output / "report.md").read_text(encoding="utf-8")


def test_the_history_and_the_layers_are_those_of_the_strategy(done):
    output, result = done
    history = pd.read_csv(output / "history.csv")
    assert list(history["epoch"]) == [epoch for epoch in range(2) for _ in range(5)]  # 3 · 7 images in 5 batches
    assert list(history["val_accuracy"].notna()) == ([False] * 4 + [True]) * 2
    assert result["accuracy"] > 1 / 3  # chance
    text = (output / "report.md").read_text(encoding="utf-8")
    for depth, name in enumerate(("stem", "layer1", "layer2", "layer3", "layer4", "head")):
        assert f"| {name} | {3e-3 * 0.5 ** (5 - depth):.3g} |" in text
    for name, value in (("strategy", "layer-decay"), ("decay", 0.5), ("processes", 1), ("torch", torch.__version__)):
        assert f"| {name} | {value} |" in text


def test_the_same_command_again_does_nothing_again_wherever_the_images_are(done, photos, tmp_path, monkeypatch, capsys):
    output, result = done
    before = contents(output)
    monkeypatch.setattr(finetune, "fit", None)  # nobody can train now
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    assert finetune.main(arguments(moved, output)) == result
    assert contents(output) == before
    assert f"{result['accuracy']:.1%} of {result['images']} test images right" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_random_numbers_are_left_as_they_were(done, photos, tmp_path):
    before = torch.get_rng_state()
    finetune.main(arguments(photos, tmp_path, "--strategy", "head-only", "--epochs", "1", "--model", "shufflenet_v2_x0_5",
                            "--weights", "none"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_vision_transformer_is_fine_tuned_at_the_size_that_it_is_made_for(photos, tmp_path):
    result = finetune.main(arguments(photos, tmp_path, "--model", "vit_b_32", "--weights", "none", "--image-size", "224",
                                     "--decay", "0.75", "--epochs", "1", "--per-class", "2", "--batch-size", "6"))
    assert 0 <= result["accuracy"] <= 1
    state = weights(tmp_path)
    torchvision.models.vit_b_32(num_classes=3).load_state_dict(state)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| encoder.layers.encoder_layer_11 | {3e-3 * 0.75:.3g} |" in text
    assert f"| stem | {3e-3 * 0.75 ** 13:.3g} |" in text


# --- runs in other processes ------------------------------------------------------------------------------------------

def in_another_process(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=Path(__file__).resolve().parents[2], check=False, **options)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(photos, tmp_path):
    # Dropout, BatchNorm that trains and a layer that unfreezes in the middle: all that has to be remembered or known.
    more = ("--model", "mobilenet_v3_small", "--weights", "none", "--strategy", "head-then-all", "--lr", "0.01")
    # With the same number of threads, because sums in another order are other sums.
    killed = in_another_process("-m", "tests.finetune.in_processes", "killed", str(torch.get_num_threads()),
                                *arguments(photos, tmp_path / "killed", *more))
    assert killed.returncode == -signal.SIGKILL
    left = {entry.name for entry in (tmp_path / "killed").iterdir()}
    assert left == {"settings.json", "checkpoint-0.pt", "checkpoint-0.pt.tmp"}
    assert finetune.main(arguments(photos, tmp_path / "killed", *more)) == finetune.main(
        arguments(photos, tmp_path / "whole", *more))
    resumed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert (tmp_path / "killed" / "history.csv").read_text() == (tmp_path / "whole" / "history.csv").read_text()
    assert {entry.name for entry in (tmp_path / "killed").iterdir()} == RESULTS


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_also_after_an_interruption(photos, tmp_path, monkeypatch):
    # Batches of 5 and 4 images, shared as 3 + 2 and 2 + 2, and layers that unfreeze on the way. Two processes add up the same
    # numbers in another order, and Adam turns the rounding errors of tiny gradients into steps: weights differ by 1e-5 in
    # single precision. So everything is computed in double precision, in which they differ by 2e-14. Had every image of
    # the smaller part the weight of one in the larger, they would differ by 3e-3, in either precision.
    monkeypatch.setattr(finetune, "prepared_model", in_double_precision(finetune.prepared_model))
    more = ("--strategy", "gradual", "--batch-norm", "freeze")
    result = finetune.main(arguments(photos, tmp_path / "single", *more))
    both = in_another_process("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
                              "tests.finetune.in_processes", "whole_and_interrupted", str(tmp_path / "whole"),
                              str(tmp_path / "interrupted"), *arguments(photos, "replaced", *more),
                              capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("test images right") == 2  # the first process alone reports each run
    single, whole, interrupted = (weights(tmp_path / name) for name in ("single", "whole", "interrupted"))
    start = load_resnet18("glyphs").state_dict()
    assert float((single["conv1.weight"] - start["conv1.weight"]).abs().max()) > 1e-4  # there is something to compare
    for name, value in single.items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-10, msg=name)
        assert torch.equal(interrupted[name], whole[name]), name
    for name in ("whole", "interrupted"):
        assert {entry.name for entry in (tmp_path / name).iterdir()} == RESULTS
        assert json.loads((tmp_path / name / "result.json").read_text()) == result
    losses = [pd.read_csv(tmp_path / name / "history.csv")["loss"] for name in ("single", "whole")]
    assert list(losses[1]) == pytest.approx(list(losses[0]), abs=1e-10)  # of the whole batch, not of a part


# --- strategies -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_has_its_rates_and_its_plan(photos, tmp_path, strategy):
    options = options_of(*arguments(photos, tmp_path / "run", "--strategy", strategy, "--epochs", "8"))
    job = finetune.prepare(options, SINGLE_PROCESS)
    rates = [group["lr"] for group in job.optimizer.param_groups]
    expected = {"uniform": [1e-3] * 6, "head-only": [1e-2] * 6, "layer-decay": [3e-3 * 0.5 ** i for i in (5, 4, 3, 2, 1, 0)]}
    assert rates == pytest.approx(expected.get(strategy, [3e-4] * 5 + [3e-3]))
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    plans = {"head-only": {"head": 0}, "gradual": dict(zip(reversed(names), range(0, 30, 5), strict=True)),
             "head-then-all": dict.fromkeys(names, 20) | {"head": 0}}  # of 40 steps
    assert (job.plan.resolved(names).first_steps if job.plan else None) == plans.get(strategy)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_with_the_head_only_the_backbone_is_afterwards_what_it_was_bit_for_bit(photos, tmp_path):
    finetune.main(arguments(photos, tmp_path, "--strategy", "head-only", "--epochs", "1"))
    start = load_resnet18("glyphs", num_classes=3).state_dict()
    changed = {name for name, value in weights(tmp_path).items() if not torch.equal(value, start[name])}
    assert changed == {"fc.weight", "fc.bias"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| layer4 | 0 | never |" in text
    assert "| head | 0.01 | 0 |" in text


@pytest.mark.slow
def test_batch_norm_can_be_held_while_its_weights_train(photos, tmp_path):
    # With a plan too, which lets the norms of frozen groups go when they unfreeze.
    finetune.main(arguments(photos, tmp_path, "--batch-norm", "freeze", "--strategy", "head-then-all", "--epochs", "1"))
    start, end = load_resnet18("glyphs").state_dict(), weights(tmp_path)
    assert all(torch.equal(start[name], end[name]) for name in start if "running" in name or "tracked" in name)
    assert not torch.equal(start["layer4.1.bn2.weight"], end["layer4.1.bn2.weight"])


def test_the_split_is_by_number_or_by_fractions_of_each_class(photos):
    for more, sizes in (((), (7, 3, 3)), (("--val-fraction", "0.4"), (5, 5, 3)), (("--per-class", "4"), (4, 4, 5))):
        job = finetune.prepare(options_of(*arguments(photos, "elsewhere", *more)), SINGLE_PROCESS)
        for part, size in zip((job.train, job.val, job.test), sizes, strict=True):
            assert torch.bincount(part.labels).tolist() == [size] * 3


# --- what is refused --------------------------------------------------------------------------------------------------

def refused(capsys, *args, status=2):
    """What the command says when it refuses, or ends with another status."""
    with pytest.raises(SystemExit) as refusal:
        finetune.main([*args])
    assert refusal.value.code == status
    return capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize(("more", "problem"), [
    (["--lr", "0.001"], "lr is 0.003 there and 0.001 here."),
    (["--strategy", "uniform", "--seed", "1"], "decay is 0.5 there and not set here"),
    (["--strategy", "uniform", "--seed", "1"], "seed is 0 there and 1 here"),
])
def test_a_folder_with_a_run_of_other_settings_is_refused_and_left_alone(done, photos, capsys, more, problem):
    output, _ = done
    before = contents(output)
    said = refused(capsys, *arguments(photos, output, *more))
    assert problem in said
    assert "another --output" in said
    assert contents(output) == before


def test_a_run_does_not_go_on_with_other_images(done, photos, tmp_path, capsys):
    output, _ = done
    before = contents(output)
    more = shutil.copytree(photos, tmp_path / "photos")
    file = next((more / "one").iterdir())
    Image.open(file).rotate(180).save(file)
    assert "content is " in refused(capsys, *arguments(more, output))
    assert contents(output) == before


@pytest.mark.parametrize("content", [b"{half", b"[1, 2]", b'"text"', b"\xff\xfe"])
def test_a_settings_file_that_holds_no_settings_is_named_and_left_alone(photos, tmp_path, capsys, content):
    (tmp_path / "settings.json").write_bytes(content)
    said = refused(capsys, *arguments(photos, tmp_path))
    assert str(tmp_path / "settings.json") in said
    assert "move it away, or give another --output" in said
    assert contents(tmp_path) == {"settings.json": content}


@pytest.mark.parametrize("content", [b"", b"PK half of it"])
def test_a_damaged_checkpoint_is_named_and_left_alone(photos, tmp_path, capsys, monkeypatch, content):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(arguments(photos, tmp_path))
    (tmp_path / "checkpoint-0.pt").write_bytes(content)
    before = contents(tmp_path)
    said = refused(capsys, *arguments(photos, tmp_path))
    assert f"cannot read {tmp_path / 'checkpoint-0.pt'}" in said
    assert "move it away to start anew" in said
    assert contents(tmp_path) == before


def test_unreadable_images_are_left_out_if_that_is_wished_and_the_settings_tell(photos, tmp_path, capsys):
    more = shutil.copytree(photos, tmp_path / "photos")
    (more / "one" / "broken.jpg").write_bytes(b"nothing")
    assert "--skip-unreadable" in refused(capsys, *arguments(more, tmp_path / "run"))
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable .*broken\.jpg"):
        job = finetune.prepare(options_of(*arguments(more, tmp_path / "run", "--skip-unreadable")), SINGLE_PROCESS)
    assert (job.settings["images"], job.settings["skip_unreadable"]) == (39, True)
    assert "skip_unreadable" not in finetune.prepare(options_of(*arguments(photos, tmp_path / "run")), SINGLE_PROCESS).settings


def test_a_tilde_is_the_home_folder(photos, tmp_path, capsys, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(photos.parent))
    options = options_of("--output", "~/run", "--data", f"~/{photos.name}")
    assert (options.output, options.data) == (str(photos.parent / "run"), str(photos))
    monkeypatch.chdir(tmp_path)
    assert "is within the folder of images" in refused(capsys, *arguments(f"~/{photos.name}", f"~/{photos.name}/run"))
    assert "is within the folder of images" in refused(capsys, *arguments(f"~/{photos.name}", photos / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "problem"), [
    (["--data", "nowhere"], "no folder nowhere"),
    (["--strategy", "unknown"], "invalid choice: 'unknown'"),
    (["--strategy", "uniform", "--decay", "0.5"], "--decay is for layer-decay, not for uniform"),
    (["--backbone-lr", "0.1"], "--backbone-lr is for two-rates, gradual, head-then-all, not for layer-decay"),
    (["--decay", "1.5"], "at most 1, not 1.5"),
    (["--lr", "-1"], "0 or above, not -1.0"),
    (["--weight-decay", "nan"], "weight_decay must be a finite number"),
    (["--epochs", "0"], "must be 1 or above, not 0"),
    (["--model", "resnet19"], "no model matches 'resnet19' (did you mean 'resnet1"),
    (["--model", "resnet*"], "one name and no pattern, not 'resnet*'"),
    (["--model", "vit_b_16"], "the weights 'glyphs' are of resnet18, not of vit_b_16"),
    (["--model", "vit_b_32", "--weights", "none"], "vit_b_32 cannot take images of 32 pixels"),
    (["--per-class", "3", "--test-fraction", "0.1"], "either --per-class, or"),
    (["--per-class", "7"], "class 'none' has 13 example(s), too few for 7 for training"),
    (["--val-fraction", "0.5", "--test-fraction", "0.5"], "below 1 together, not 0.5 and 0.5"),
    (["--val-fraction", "0.6", "--test-fraction", "0.39"], "class 'none' has 13 example(s), too few for 8"),
    (["--batch-size", "1"], "give each of 1 process(es) 1 at a time, and it takes 2"),
])
def test_what_cannot_work_is_refused_before_anything_is_written(photos, tmp_path, capsys, more, problem):
    assert problem in refused(capsys, *arguments(photos, tmp_path / "run", *more))
    assert not list(tmp_path.iterdir())


def test_no_files_of_others_are_overwritten(photos, tmp_path, capsys):
    (tmp_path / "report.md").write_text("of somebody else")
    assert "has report.md of something else" in refused(capsys, *arguments(photos, tmp_path))
    assert "is a file; name a folder" in refused(capsys, *arguments(photos, tmp_path / "report.md"))
    assert "is within the folder of images" in refused(capsys, *arguments(photos, photos / "run"))
    assert contents(tmp_path) == {"report.md": b"of somebody else"}
    assert len(list(photos.iterdir())) == 3


def test_weights_that_cannot_be_had_are_refused_with_a_way_out(photos, tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    said = refused(capsys, *arguments(photos, tmp_path / "run", "--model", "resnet34", "--weights", "imagenet"))
    assert "no route to host" in said
    assert "--model resnet18 --weights glyphs" in said


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_a_run_that_diverges_ends_with_what_to_try_and_without_a_result(photos, tmp_path, capsys):
    said = refused(capsys, *arguments(photos, tmp_path, "--lr", "1e20"), status=1)
    assert re.search(r" is (nan|inf) at step \d+, so training has stopped .*; run again with --lr below 1e\+20 ", said)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left <= {"settings.json", "checkpoint-0.pt"}
    for checkpoint in tmp_path.glob("*.pt"):
        assert all(value.isfinite().all() for value in torch.load(checkpoint)["parts"]["model"].values())


@pytest.mark.slow
def test_several_processes_that_diverge_all_end(photos, tmp_path):
    both = in_another_process("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                              "-m", "layerlr_helpers.finetune",
                              *arguments(photos, tmp_path, "--lr", "1e20", "--batch-norm", "freeze"),
                              capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert both.returncode != 0
    assert "so training has stopped and there is no result" in both.stderr
    assert not {entry.name for entry in tmp_path.iterdir()} & {*finetune.RESULTS}


@pytest.mark.parametrize("name", ["model.pt", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "settings.json", "checkpoint-0.pt", "history.csv", "report.md", "result.json"))])
def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on_later(photos, tmp_path, capsys, monkeypatch, name):
    replace = os.replace

    def full(temporary, path):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        said = refused(capsys, *arguments(photos, tmp_path / "run", "--epochs", "1"))
    assert f"cannot write {tmp_path / 'run' / name}: No space left on device" in said
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert finetune.main(arguments(photos, tmp_path / "run", "--epochs", "1"))["images"] == 9
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == RESULTS


def test_a_place_where_nothing_can_be_written_is_named_before_training(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "fit", None)  # nobody can train now
    (tmp_path / "file").write_text("")
    assert f"'{tmp_path / 'file' / 'run'}'" in refused(capsys, *arguments(photos, tmp_path / "file" / "run"))


def test_names_that_are_not_utf8_are_refused_before_anything_is_written(photos, tmp_path, capsys):
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    assert r"caf\xe9' is not UTF-8" in refused(capsys, *arguments(photos, bad))
    shutil.copytree(photos, bad)
    assert r"caf\xe9' is not UTF-8" in refused(capsys, *arguments(bad, tmp_path / "run"))
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "one").rename(os.fsdecode(os.fsencode(tmp_path) + b"/photos/\xff"))
    assert r"the class folders b'\xff' in" in refused(capsys, *arguments(tmp_path / "photos", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
