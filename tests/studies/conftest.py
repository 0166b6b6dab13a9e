import pytest

from layerlr_helpers.studies import compare


@pytest.fixture
def made(monkeypatch):
    """The runs that are made, without training: (task, rates, seed, split). At 1e-4 and 1e-2 the accuracy is better."""
    runs = []

    def run(strategy, task, seed, *, split):
        runs.append((task.name, strategy.name, seed, split))
        return {"accuracy": 0.5 + (strategy.name in ("0.0001", "0.01")) / 4 + seed / 100, "loss": 1.0}

    monkeypatch.setattr(compare, "run", run)
    return runs
