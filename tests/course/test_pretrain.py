import hashlib
import json
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from layerlr_helpers import training
from layerlr_helpers.course import pretrain
from layerlr_helpers.course.scenes import GLYPHS


class SmallNet(nn.Module):
    """Stands in for ResNet-18: a first layer, BatchNorm and a head of the same names."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.fc(self.bn1(self.conv1(images)).relu().mean((2, 3)))


@contextmanager
def small(network=SmallNet):
    """Train this network, and test it on few glyphs: rendering 2,000 takes longer than the training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "unseen_accuracy", lambda model, accuracy=pretrain.unseen_accuracy: accuracy(model, 50))
        patch.setattr(pretrain, "resnet18", network)
        yield


def command(folder, *more, network=SmallNet):
    folder.mkdir(exist_ok=True)
    with small(network):
        return pretrain.main(["--glyphs", "128", "--epochs", "2", "--output", str(folder / "w.pt"), *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, command(folder)


@pytest.mark.slow
def test_the_network_is_a_resnet18_of_the_glyphs(tmp_path):
    report = command(tmp_path, network=pretrain.resnet18)
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert state["fc.weight"].shape == (len(GLYPHS), 512)
    pretrain.resnet18(num_classes=len(GLYPHS)).load_state_dict(state)
    with small(pretrain.resnet18):
        assert pretrain.check(tmp_path / "w.pt")["sha256"] == report["sha256"]


def test_the_command_writes_the_weights_in_half_precision_and_reports_on_them(made):
    folder, report = made
    assert [entry.name for entry in folder.iterdir()] == ["w.pt"]  # no checkpoint of 130 MB is left behind
    state = torch.load(folder / "w.pt", weights_only=True)
    assert state["conv1.weight"].dtype == torch.float16
    assert state["bn1.num_batches_tracked"] == 4
    assert state["fc.weight"].shape == (len(GLYPHS), 8)
    assert report["sha256"] == hashlib.sha256((folder / "w.pt").read_bytes()).hexdigest()
    assert report["bytes"] == (folder / "w.pt").stat().st_size
    assert report["torch"] == torch.__version__
    assert 0 <= report["unseen_accuracy"] <= 1


def test_what_it_prints_is_the_report_and_check_gives_the_same(made, capsys):
    folder, report = made
    with small():
        checked = pretrain.main(["--check", str(folder / "w.pt")])
    assert json.loads(capsys.readouterr().out) == checked
    # Half precision and the precision of the forward pass may turn a guess or two of an untrained net.
    assert checked == {name: report[name] for name in ("file", "sha256", "bytes")} | {
        "unseen_accuracy": pytest.approx(report["unseen_accuracy"], abs=0.05)}


def test_the_same_seed_gives_the_same_bytes_also_after_an_interruption(made, tmp_path, monkeypatch):
    steps = []

    def train_step(*args, step=training.train_step):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            command(tmp_path)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".checkpoint"]
    torch.rand(1)  # the global generator has no part in it
    assert command(tmp_path)["sha256"] == made[1]["sha256"]


def test_another_seed_is_another_run_even_beside_an_interrupted_one(made, tmp_path):
    theirs = tmp_path / "w-128-2-0.checkpoint"
    theirs.write_text("of a run with seed 0: whoever takes it for his own cannot read it")
    assert command(tmp_path, "--seed", "1")["sha256"] != made[1]["sha256"]
    assert theirs.exists()
    with pytest.raises(ValueError, match=r"cannot read .*w-128-2-0\.checkpoint"):
        command(tmp_path)


@pytest.mark.parametrize(("arguments", "problem"), [
    (["--glyphs", "63"], "at least 64 glyphs"),
    (["--epochs", "0"], "one epoch"),
    (["--seed", str(pretrain.UNSEEN_SEED)], "makes the glyphs that the network is tested on"),
])
def test_what_cannot_be_trained_is_refused(tmp_path, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        command(tmp_path, *arguments)
    assert not list(tmp_path.iterdir())
