import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from layerlr_helpers.minilm import minilm_tokenizer
from layerlr_helpers.splits import few_shot_split
from layerlr_helpers.texts import text_folder, text_set, text_table

TEXTS = ["one", "one two", "one two three", "one two three four"]


@pytest.fixture(scope="module")
def data():
    return text_set(TEXTS, [0, 0, 1, 1], ["short", "long"], factors={"place": torch.arange(4)})


def test_a_batch_is_as_wide_as_its_longest_text_and_says_which_tokens_are_real(data):
    tokens, labels = next(iter(DataLoader(data, 2)))
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (2, 4)  # [CLS] one two [SEP]
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert labels.tolist() == [0, 0]
    alone = minilm_tokenizer()("one two")["input_ids"]
    assert tokens["input_ids"][1].tolist() == alone
    assert len(data[0][0]["input_ids"]) == 6  # one text has the width of the set, so any texts can be put together
    assert repr(data) == "TextSet(4 texts of at most 6 tokens, 2 classes)"


@given(rows=st.lists(st.integers(0, 3), max_size=6))
def test_a_subset_keeps_texts_labels_tokens_and_factors_together(data, rows):
    part = data.subset(rows)
    assert part.texts == tuple(TEXTS[row] for row in rows)
    assert part.labels.tolist() == [int(row > 1) for row in rows]
    assert part.factors["place"].tolist() == rows
    assert torch.equal(part.tokens["input_ids"], data.tokens["input_ids"][rows])
    masked = data.subset(torch.tensor([row in rows for row in range(4)]))
    assert masked.texts == tuple(text for row, text in enumerate(TEXTS) if row in rows)


def test_texts_are_split_as_images_are(data):
    train, val, test = few_shot_split(data, 1, val_per_class=0, seed=0)
    assert (len(train), len(val), len(test)) == (2, 0, 2)
    assert sorted([*train.texts, *test.texts]) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"class 'short' has 2 example\(s\), too few for 2 for training"):
        few_shot_split(data, 2, val_per_class=0)


def test_a_fingerprint_depends_on_texts_labels_and_length(data):
    same = text_set(TEXTS, [0, 0, 1, 1], ["a", "b"])
    assert data.fingerprint() == same.fingerprint()
    others = [text_set(["One!", *TEXTS[1:]], [0, 0, 1, 1], ["a", "b"]), text_set(TEXTS, [0, 1, 1, 1], ["a", "b"]),
              text_set(TEXTS, [0, 0, 1, 1], ["a", "b"], max_tokens=4)]
    assert len({each.fingerprint() for each in [data, *others]}) == 4


@pytest.mark.parametrize(("arguments", "problem"), [
    ((["a", " "], [0, 1], "ab"), "1 of 2 texts are empty or no text, at 1 counted from 0"),
    ((["a", None], [0, 1], "ab"), "empty or no text, at 1"),
    (([], [], "ab"), "there are no texts"),
    ((["a"], [0, 1], "ab"), "each text needs a label, got 1 texts and 2 labels"),
    ((["a", "b"], [0, 0], "a"), "two classes or more, these have 1: a"),
    ((["a", "b"], [0, 2], "ab"), "from 0 to 1; these go from 0 to 2"),
    ((["a", "b\0c"], [0, 1], "ab"), "empty or no text, at 1"),
    ((["a", "\u200b"], [0, 1], "ab"), "empty or no text, at 1"),
    (("ab", [0, 1], "ab"), "a sequence of strings, not a single one"),
    ((["a", "b"], [0.0, 0.5], "ab"), "labels are whole numbers, not torch.float32"),
])
def test_texts_that_cannot_be_learned_from_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        text_set(*arguments)


def test_a_tokenizer_that_pads_on_the_left_and_a_length_that_holds_nothing_are_refused():
    def left(texts, **options):
        return {"input_ids": torch.zeros(2, 2, dtype=torch.long), "attention_mask": torch.tensor([[0, 1], [1, 1]])}

    with pytest.raises(ValueError, match="padding_side = 'right'"):
        text_set(["a", "b"], [0, 1], "ab", tokenizer=left)
    with pytest.raises(ValueError, match="at least 3"):
        text_set(["a", "b"], [0, 1], "ab", max_tokens=2)


# --- folders and tables -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, texts in {"bad": ["awful", "dull"], "good": ["fine", "großartig"]}.items():
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "readme.md").write_text("about")
    return tmp_path


def test_a_folder_of_texts_has_a_class_for_each_subfolder(folder):
    (folder / "good" / "0.txt").write_bytes(b"\xef\xbb\xbffine")  # as some editors on Windows write it
    data = text_folder(folder)
    assert data.texts == ("awful", "dull", "fine", "großartig")
    assert data.class_names == ("bad", "good")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.factors["file"].tolist() == [0, 1, 2, 3]


def test_an_unreadable_text_is_refused_or_skipped(folder):
    (folder / "good" / "1.txt").write_bytes("größer".encode("latin-1"))
    (folder / "bad" / "1.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"2 unreadable file\(s\), the first is .*1.txt \(it has no text\)"):
        text_folder(folder)
    with pytest.warns(UserWarning, match=r"skipped 2 unreadable file\(s\)"):
        data = text_folder(folder, unreadable="skip")
    assert data.texts == ("awful", "fine")


def test_a_folder_without_texts_or_classes_is_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="has no subfolders; put the texts of each class into a subfolder"):
        text_folder(folder / "good")
    for file in (folder / "good").iterdir():
        file.rename(file.with_suffix(".docx"))
    with (pytest.warns(UserWarning, match=r"left out 2 file\(s\) that do not end like texts .* save them as .txt in UTF-8"),
          pytest.raises(ValueError, match=r"class folder\(s\) \['good'\] .* contain no text that can be read \(.txt\)")):
        text_folder(folder)
    one = tmp_path_factory.mktemp("one")
    (one / "good").mkdir()
    (one / "good" / "0.txt").write_text("fine")
    with pytest.raises(ValueError, match="two classes or more, these have 1: good"):
        text_folder(one)


@pytest.mark.parametrize(("name", "content"), [
    ("t.csv", 'text,label\nfine,good\n"awful, really",bad\n'), ("t.tsv", "text\tlabel\nfine\tgood\nawful, really\tbad\n"),
    ("t.csv", 'id,label,text\n1, good ,fine\n2,bad,"awful, really"\n')])
def test_a_table_has_a_class_for_each_label(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    data = text_table(tmp_path / name)
    assert data.texts == ("fine", "awful, really")
    assert data.class_names == ("bad", "good")
    assert data.labels.tolist() == [1, 0]


def test_words_that_pandas_reads_as_missing_are_texts_and_labels(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nNA,nan\nnull,1\n")
    data = text_table(tmp_path / "t.csv")
    assert data.texts == ("NA", "null")
    assert data.class_names == ("1", "nan")


@pytest.mark.parametrize(("content", "problem"), [
    (b"review,label\nfine,good\n", "has no column 'text'; its columns are review, label"),
    (b"text,stars\nfine,5\n", "has no column 'label'"),
    (b"text,label\nfine,good\n,bad\n", "1 rows of .* have nothing in 'text': 1, counted from 0 after the heading"),
    (b"text,label\nfine,\nawful,bad\n", "have nothing in 'label': 0"),
    (b"text,label\nfine,good\n", "two classes or more, these have 1: good"),
    (b"text,label\nHello, world,good\nBad, day,bad\n", "rows of .* have more fields than its heading; put texts"),
    (b"text,label\nHello, world,good\nfine,bad\n", "rows of .* have more fields than its heading; put texts"),
    (b"text,label\nfine,good\nBad, day,bad\n", "cannot be read as a table in UTF-8: .* line 3"),
    (b"text,label\nfine\nawful,bad\n", "have nothing in 'label': 0"),
    (b"", "cannot be read as a table in UTF-8"),
    ("text,label\ngr\u00f6\u00dfer,good\n".encode("latin-1"), "cannot be read as a table in UTF-8"),
])
def test_a_table_that_cannot_be_learned_from_is_refused(tmp_path, content, problem):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        text_table(tmp_path / "t.csv")


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv"):
        text_table(tmp_path / "none.csv")
