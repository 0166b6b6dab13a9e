import json

import pytest
import torch

from layerlr_helpers import training
from layerlr_helpers.course import pretrain
from layerlr_helpers.course.scenes import GLYPHS
from layerlr_helpers.models import read_checkpoint


@pytest.fixture(autouse=True)
def small_test(monkeypatch):
    """Test on few unseen glyphs: rendering and reading 2,000 takes longer than the training here."""
    monkeypatch.setattr(pretrain, "unseen_accuracy", lambda model, accuracy=pretrain.unseen_accuracy: accuracy(model, 50))


def command(folder, *more):
    folder.mkdir(exist_ok=True)
    return pretrain.main(["--glyphs", "128", "--epochs", "2", "--output", str(folder / "w.pt"), *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, command(folder)


def test_the_command_writes_the_weights_in_half_precision_and_reports_on_them(made):
    folder, report = made
    assert [entry.name for entry in folder.iterdir()] == ["w.pt"]  # no checkpoint of 130 MB is left behind
    state = torch.load(folder / "w.pt", weights_only=True)
    assert state["conv1.weight"].dtype == torch.float16
    assert state["bn1.num_batches_tracked"] == 4
    assert state["fc.weight"].shape == (len(GLYPHS), 512)
    assert read_checkpoint(folder / "w.pt", report["sha256"])["conv1.weight"].dtype == torch.float32
    assert report["bytes"] == (folder / "w.pt").stat().st_size
    assert report["torch"] == torch.__version__
    assert 0 <= report["unseen_accuracy"] <= 1


def test_what_it_prints_is_the_report_and_check_gives_the_same(made, capsys):
    folder, report = made
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
