"""The studies of a transformer: their candidates can be carried out, and a run of each kind works."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from layerlr_helpers import layer_groups
from layerlr_helpers.minilm import load_minilm
from layerlr_helpers.models import prepared_model
from layerlr_helpers.studies import text_catalogue
from layerlr_helpers.studies.catalogue import STUDIES, Study, run_again
from layerlr_helpers.studies.compare import RecordError, compare, trained
from layerlr_helpers.studies.results import read_rows
from layerlr_helpers.studies.search import check_fair, every_candidate
from layerlr_helpers.studies.text_catalogue import LAYERS, sentence_task, strategies
from layerlr_helpers.texts import text_set

RESULTS = Path(__file__).parents[2] / "data" / "results"
TINY = text_set([f"{word} {i}" for word in ("sort", "plot", "graph") for i in range(6)],
                [label for label in range(3) for _ in range(6)], ("sort", "plot", "graph"), max_tokens=8)


@pytest.fixture
def task():
    return sentence_task(data=TINY, per_class=2, val_per_class=2, test_per_class=2, batch_size=3, steps=2)


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith("text-")])
def test_the_strategies_of_a_study_have_as_many_candidates_with_rates_for_every_group(name, task):
    candidates = STUDIES[name].candidates(task)
    check_fair(candidates)
    for given in candidates.values():
        model = load_minilm(None, num_classes=3)
        model = model if given[0].change is None else given[0].change(model)
        groups = layer_groups(model, granularity=given[0].granularity)
        for strategy in every_candidate(given):
            rates = strategy.rates(groups)
            assert list(rates) == [group.name for group in groups]
            assert float(strategy.name) in [pytest.approx(lr) for lr in rates.values()]
            if strategy.plan is not None:
                assert strategy.plan(groups, 40).resolved([g.name for g in groups]).trainable_at(40)


def test_the_layers_are_those_of_the_network():
    assert [group.name for group in layer_groups(load_minilm(None, num_classes=3))] == list(LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in strategies(None) if name != "one rate, no warm-up"])
def test_each_way_trains_what_it_says(task, name):
    strategy = strategies(task)[name][1]
    model, _ = trained(strategy, task, seed=0)
    before = prepared_model("minilm", 3, 0, keep=strategy.keep, load=task.load)
    if strategy.change is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            before = strategy.change(before)
    after = dict(model.named_parameters())
    moved = {p_name for p_name, p in before.named_parameters() if not torch.equal(p, after[p_name])}
    parts = {layer for layer in LAYERS if any(p_name.startswith(layer + ".") for p_name in moved)}
    assert "head" in parts
    assert ("bert.embeddings" in parts) == (name not in {"head only", "frozen embeddings", "LoRA", "LoRA+"})
    assert (len(parts) == 1) == (name == "head only")


@pytest.mark.slow
def test_a_record_of_other_sentences_is_not_gone_on_with(task, tmp_path):
    strategy = [replace(strategies(task)["one rate"][0], name="s")]
    first = compare(strategy, task, seeds=[0], results=tmp_path / "r.csv", progress=False)
    assert first["texts"].tolist() == [TINY.fingerprint()]
    other = replace(task, data=text_set([text.upper() for text in TINY.texts], TINY.labels, TINY.class_names, max_tokens=8))
    assert len(compare(strategy, other, seeds=[0], results=tmp_path / "r.csv", progress=False)) == 1  # nothing is lacking
    with pytest.raises(RecordError, match=rf"with texts {TINY.fingerprint()}, and this one has"):
        compare(strategy, other, seeds=[1], results=tmp_path / "r.csv", progress=False)


@pytest.mark.slow
def test_a_record_of_other_sentences_is_not_taken_for_a_pair(task, tmp_path, monkeypatch):
    strategy = strategies(task)["one rate"][0]
    compare({"one rate": [strategy]}, task, seeds=[0], results=tmp_path / "s.csv", progress=False)
    tasks = [task]
    monkeypatch.setitem(STUDIES, "s", Study("which?", lambda: tasks, strategies))
    again = partial(run_again, "s", ["one rate"], rates=strategy.name, seeds=[0], folder=tmp_path, progress=False)
    with warnings.catch_warnings(action="error"):
        assert again()["recorded"].tolist() == again()["accuracy"].tolist()
    upper = text_set([text.upper() for text in TINY.texts], TINY.labels, TINY.class_names, max_tokens=8)
    tasks[:] = [replace(task, data=upper)]
    with pytest.warns(UserWarning, match=rf"the record of s is of other sentences \({TINY.fingerprint()}\) than these runs"):
        again()


@pytest.mark.slow
def test_the_record_is_of_the_sentences_of_the_versions_in_the_requirements():
    """If it fails, compare the installed versions of the eight libraries with requirements.txt."""
    for name in (name for name in STUDIES if name.startswith("text-")):
        rows = read_rows(RESULTS / f"{name}.csv")
        recorded_texts = set(zip(rows["task"], rows["texts"], strict=True))
        assert recorded_texts == {(task.name, task.data.fingerprint()) for task in STUDIES[name].tasks()}


@pytest.mark.slow
def test_the_network_of_the_surgery_knows_the_task_and_has_not_seen_the_sentences_of_the_shifts():
    known, unseen = text_catalogue._two_parts(text_catalogue.sentences())
    assert not set(known.texts) & set(unseen.texts)
    assert known.labels.bincount().tolist() == [text_catalogue.BEFORE_THE_SHIFT] * 8
    assert {task.name for task in text_catalogue.surgery_tasks()} == {"typing errors", "no vowels", "permuted"}
    assert all(set(task.data.labels.tolist()) == set(range(8)) for task in text_catalogue.surgery_tasks())
