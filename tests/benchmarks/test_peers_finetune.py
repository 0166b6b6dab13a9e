"""The comparison with other libraries, without them: fair runs only, resumable, and those that are missing are named."""

import importlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from layerlr_helpers import handwritten_digits
from layerlr_helpers.studies.results import read_rows

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def small_network(weights: str, num_classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv, head = nn.Conv2d(3, 4, kernel_size=8, stride=8), nn.Linear(4, num_classes)
    return nn.Sequential(OrderedDict(conv1=conv, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=head))


@pytest.fixture
def script(monkeypatch):
    """The script, with a small network and three contenders that only look at their batches and change the head's bias."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("peers_finetune")

    def look(network, loader, epochs, lr):
        with torch.no_grad():
            network.fc.bias[0] += lr
            for _ in range(epochs):
                for images, _ in loader:
                    network.conv1(images)

    contenders = {"a": script.Contender(script.OURS, look, ((0.0,), (1e-3,), (100.0,))),
                  "b": script.Contender(script.OURS, look, ((100.0,), (0.0,), (1e-3,))),
                  "absent": script.Contender("timm", look, ((0.0,), (1e-3,), (1e-2,)))}
    monkeypatch.setattr(script, "CONTENDERS", contenders)
    monkeypatch.setattr(script, "INSTALLED", {script.OURS: script, "timm": None, "fastai": script, "Lightning": script})
    monkeypatch.setattr(script, "prepared_model", small_network)
    monkeypatch.setattr(script.ours, "handwritten_digits", lambda: handwritten_digits(image_size=64).subset(range(400)))
    threads = torch.get_num_threads()
    yield script
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_each_is_tried_alike_and_tested_on_every_seed_and_the_same_command_goes_on(script, tmp_path, capsys):
    path = tmp_path / "peers.csv"
    command = ["--epochs", "1", "--seeds", "2", "--results", str(path)]
    script.main(command)
    first = capsys.readouterr().out
    assert "timm is left out: the package timm is not installed; pip install .[compare] installs it" in first
    rows = read_rows(path)
    assert rows.groupby(["strategy", "split"]).size().to_dict() == {
        ("a", "test"): 2, ("a", "validation"): 6, ("b", "test"): 2, ("b", "validation"): 6}
    assert set(rows["steps"]) == {5}
    assert set(rows["images"]) == {100}
    assert "100" not in set(rows[rows["split"] == "test"]["rates"])  # always the same class: never the better of the three
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    script.main(command)
    second = capsys.readouterr().out
    assert second.count("test, ") == 3
    assert "validation, " not in second
    columns = ["split", "strategy", "rates", "seed", "accuracy"]
    assert sorted(map(tuple, rows[columns].to_numpy())) == sorted(map(tuple, read_rows(path)[columns].to_numpy()))


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_run_on_other_batches_is_refused(script, epochs):
    data = handwritten_digits().subset(range(100))
    loader = script.batches(data, seed=0)
    seen = [images[:, 0, 32] for _ in range(epochs) for images, _ in loader]
    script.check_batches(seen, data, seed=0, epochs=epochs, name="right")
    with pytest.raises(RuntimeError, match=f"wrong made {epochs * 5} steps, and not the 10"):
        script.check_batches(seen, data, seed=0, epochs=2, name="wrong")
    if epochs:
        with pytest.raises(RuntimeError, match="wrong made"):
            script.check_batches(seen, data, seed=1, epochs=epochs, name="wrong")


def test_every_contender_has_as_many_tries_and_what_is_ours_comes_first(script):
    importlib.reload(script)
    assert {len(each.tries) for each in script.CONTENDERS.values()} == {5}
    assert next(iter(script.CONTENDERS.values())).library == script.OURS
    assert {each.library for each in script.CONTENDERS.values()} == {script.OURS, *script.PEERS}
