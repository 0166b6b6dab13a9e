import pytest
import torch

from layerlr_helpers.course import docstrings
from layerlr_helpers.course.docstrings import docstring_sentences, shifted_texts
from layerlr_helpers.splits import few_shot_split


@pytest.fixture(scope="module")
def sentences():
    return docstring_sentences()


@pytest.mark.slow
def test_sentences_are_real_different_and_do_not_name_their_library(sentences):
    assert sentences.class_names == ("matplotlib", "networkx", "numpy", "pandas", "scipy", "scikit-learn", "sympy", "torch")
    assert sentences.labels.bincount().min() >= 400
    assert sentences.labels.bincount().max() <= 1000
    assert len(set(sentences.texts)) == len(sentences)
    assert sentences.factors["words"].min() >= 5
    for text in sentences.texts:
        assert not {"numpy", "np", "pandas", "pd", "torch", "pytorch", "sympy", "scipy", "sklearn", "networkx"} \
            & set(text.lower().replace(".", " ").replace("`", " ").split())
    assert any("Return" in text for text in sentences.texts)


@pytest.mark.slow
def test_the_same_versions_give_the_same_sentences(sentences):
    docstrings._sentences.cache_clear()
    assert docstring_sentences().fingerprint() == sentences.fingerprint()
    few_shot_split(sentences, 50, val_per_class=30)  # there are enough of each, or this raises


@pytest.mark.slow
def test_shifts_change_what_they_say_and_nothing_else(sentences):
    part = sentences.subset(range(0, len(sentences), 50))
    assert shifted_texts(part, None) is part
    for shift in ("upper case", "typing errors", "no vowels"):
        changed = shifted_texts(part, shift)
        assert torch.equal(changed.labels, part.labels)
        assert changed.class_names == part.class_names
        assert changed.fingerprint() != part.fingerprint()
    upper = shifted_texts(part, "upper case")
    assert torch.equal(upper.tokens["input_ids"], part.tokens["input_ids"])  # the tokenizer makes everything lower case
    permuted = shifted_texts(part, "permuted")
    assert permuted.texts == part.texts
    assert (permuted.labels != part.labels).all()
    by_name = [[data.class_names[label] for label in data.labels] for data in (part, permuted)]
    assert by_name[0] == by_name[1]


def test_vowels_are_dropped_within_words_and_typing_errors_come_at_the_rate():
    from layerlr_helpers.texts import text_set

    data = text_set(["Evaluate an areal union of angles", "letters " * 500], [0, 1], "ab", max_tokens=32)
    assert shifted_texts(data, "no vowels").texts[0] == "Evlt an arl unn of angls"
    for rate in (0.0, 0.1, 0.5):
        mistyped = shifted_texts(data, "typing errors", rate=rate, seed=1).texts[1]
        assert mistyped == shifted_texts(data, "typing errors", rate=rate, seed=1).texts[1]
        wrong = sum(word != "letters" for word in mistyped.split()) / 500
        assert wrong == pytest.approx(1 - (1 - rate) ** 7, abs=0.06)  # seven letters a word


def test_shifts_that_do_not_exist_are_refused():
    from layerlr_helpers.texts import text_set

    data = text_set(["one", "two"], [0, 1], "ab")
    with pytest.raises(ValueError, match="unknown shift 'blurred'; known are None, 'upper case'"):
        shifted_texts(data, "blurred")
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        shifted_texts(data, "typing errors", rate=2)


def test_docstrings_are_read_from_public_names_and_not_from_tests(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "_private").mkdir()
    (tmp_path / "tests" / "a.py").write_text('def f():\n    """Sentences of tests are not wanted here."""\n')
    (tmp_path / "_private" / "a.py").write_text('def f():\n    """Sentences of private folders are not wanted."""\n')
    (tmp_path / "_base.py").write_text(
        'class A:\n    """A class that numpy has,\n    in two lines.\n\n    More."""\n'
        '    def f(self):\n        """A method of numpy_like and np.array things."""\n'
        '    def _g(self):\n        """A method that nobody is to call."""\n'
        'def short():\n    """Too short."""\n')
    assert docstrings._usable_texts(tmp_path) == ["A class that library has, in two lines.",
                                                  "A method of library_like and library.array things."]


def test_a_library_that_is_not_there_or_has_no_source_is_named(monkeypatch, tmp_path):
    with pytest.raises(ModuleNotFoundError, match="nosuchlib is not installed"):
        docstrings._folder("nosuchlib")
    monkeypatch.setattr(docstrings, "_folder", lambda library: tmp_path)
    docstrings._sentences.cache_clear()
    with pytest.raises(ValueError, match="the installed matplotlib has 0 usable docstrings, and 400 are needed"):
        docstring_sentences()
    docstrings._sentences.cache_clear()
