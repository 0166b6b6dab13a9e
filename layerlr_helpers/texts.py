"""Labelled texts in memory, in words and in tokens, read from a folder or a table."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from layerlr_helpers.files import shown
from layerlr_helpers.folders import FileKind, check_labels, read_class_folders
from layerlr_helpers.minilm import minilm_tokenizer
from layerlr_helpers.naming import listed

Tokenizer = Callable[..., Mapping[str, Tensor]]  # called as one of Hugging Face's
TEXTS = FileKind("text", lambda file: file.suffix.lower() == ".txt", ".txt", "save them as .txt in UTF-8")


@dataclass(frozen=True, eq=False, repr=False)
class TextSet(Dataset):
    """Texts in memory with their labels. :func:`text_set` makes one.

    Attributes:
        texts: N strings.
        labels: int64 [N].
        class_names: the name of each label.
        tokens: what the tokenizer made of the texts, each int64 [N, L], with ``attention_mask`` 0 where a text has ended.
        factors: what is known about each text beside its label, each a tensor whose first dimension is N.

    Indexing gives ``(dictionary of tokens, int label)``. A batch of a ``DataLoader`` is as wide as its longest text.
    """

    texts: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    tokens: dict[str, Tensor]
    factors: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        width = self.tokens["attention_mask"].shape[1]
        return f"TextSet({len(self)} texts of at most {width} tokens, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {name: values[index] for name, values in self.tokens.items()}, int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[dict[str, Tensor], int]]:
        """A whole batch at once, which is how ``DataLoader`` asks when it can."""
        rows = torch.as_tensor(indices)
        longest = int(self.tokens["attention_mask"][rows].sum(1).max())
        tokens = {name: values[rows, :longest] for name, values in self.tokens.items()}
        return [({name: values[i] for name, values in tokens.items()}, label)
                for i, label in enumerate(self.labels[rows].tolist())]

    def fingerprint(self) -> str:
        """Twelve characters that are others for other texts, labels or lengths in tokens."""
        lines = (f"{label} {text}" for label, text in zip(self.labels.tolist(), self.texts, strict=True))
        width = self.tokens["attention_mask"].shape[1]
        return hashlib.sha256("\n".join([str(width), *lines]).encode()).hexdigest()[:12]

    def subset(self, indices: Sequence[int] | Tensor) -> "TextSet":
        """The texts at ``indices`` (numbers, or a boolean mask), as another TextSet."""
        rows = torch.arange(len(self))[torch.as_tensor(indices, dtype=None if len(indices) else torch.long)]
        return replace(self, texts=tuple(self.texts[row] for row in rows.tolist()), labels=self.labels[rows],
                       tokens={name: values[rows] for name, values in self.tokens.items()},
                       factors={name: values[rows] for name, values in self.factors.items()})


def text_set(texts: Sequence[str], labels: Sequence[int] | Tensor, class_names: Sequence[str], *,
             tokenizer: Tokenizer | None = None, max_tokens: int = 128, factors: Mapping[str, Tensor] | None = None) -> TextSet:
    """Tokenize texts, and keep them with their labels.

    ``tokenizer`` is one of Hugging Face's (``AutoTokenizer.from_pretrained(…)``), the one that belongs to your model; None
    takes that of :func:`load_minilm`. It has to pad on the right. Texts are cut after ``max_tokens`` tokens, of which two mark
    the beginning and the end. An empty text, fewer than two classes, a label that is not one of them, and other numbers of
    labels than of texts are a ValueError.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a sequence of strings, not a single one")
    texts, labels = tuple(texts), torch.as_tensor(labels)
    if empty := [row for row, text in enumerate(texts) if not _is_text(text)]:
        raise ValueError(f"{len(empty)} of {len(texts)} texts are empty or no text, at "
                         f"{listed(map(str, empty), 6)} counted from 0; leave them out")
    if not texts:
        raise ValueError("there are no texts")
    if len(class_names) < 2:
        raise ValueError(f"a classifier needs texts of two classes or more, these have {len(class_names)}: "
                         f"{listed(class_names)}")
    check_labels(labels, len(texts), class_names, "text")
    if max_tokens < 3:
        raise ValueError(f"max_tokens must be at least 3, since two tokens mark the beginning and the end, not {max_tokens}")
    tokenizer = minilm_tokenizer() if tokenizer is None else tokenizer
    tokens = dict(tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt",
                            return_token_type_ids=False))
    if not bool((tokens["attention_mask"].diff(dim=1) <= 0).all()):
        raise ValueError("this tokenizer pads on the left; set tokenizer.padding_side = 'right'")
    return TextSet(texts, labels.long(), tuple(class_names), tokens, dict(factors or {}))


def text_folder(path: str | Path, *, unreadable: str = "raise", tokenizer: Tokenizer | None = None,
                max_tokens: int = 128) -> TextSet:
    """Read a folder of texts: one subfolder per class, and in it a file (.txt in UTF-8) for each text.

    ``unreadable`` says what to do with a file that is not UTF-8 or has no text: ``"raise"``, or ``"skip"`` with a warning.
    ``tokenizer`` and ``max_tokens`` are those of :func:`text_set`. ``factors["file"]`` is each text's place in the list of all
    files, sorted by class and name. Errors are those of ``image_folder``, and of :func:`text_set`.
    """
    texts, labels, places, names = read_class_folders(path, _read_text, TEXTS, unreadable)
    return text_set(texts, labels, names, tokenizer=tokenizer, max_tokens=max_tokens, factors={"file": torch.tensor(places)})


def text_table(path: str | Path, *, text: str = "text", label: str = "label", tokenizer: Tokenizer | None = None,
               max_tokens: int = 128) -> TextSet:
    """Read a table of texts with a heading, one row per text: a CSV file, or a .tsv with tabs.

    ``text`` and ``label`` are the headings of the two columns; the classes are the different labels, sorted. ``tokenizer`` and
    ``max_tokens`` are those of :func:`text_set`. ``factors["row"]`` is each text's row, counted from 0. A ValueError says what
    is wrong: a column that is not there, a row without text or label, a file that is no table in UTF-8.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {shown(path)}")
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:  # EmptyDataError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{shown(path)} cannot be read as a table in UTF-8: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first field of longer rows for the names of the rows
        raise ValueError(f"the rows of {shown(path)} have more fields than its heading; put texts with a comma or tab in "
                         "double quotes")
    table = table.fillna("")  # where a row is too short
    for column in (text, label):
        if column not in table:
            raise ValueError(f"{shown(path)} has no column {column!r}; its columns are {listed(map(str, table))}. Say which to "
                             "read: text_table(…, text=…, label=…)")
    for column in (text, label):
        if empty := [str(row) for row in table.index[table[column].str.strip() == ""]]:
            raise ValueError(f"{len(empty)} rows of {shown(path)} have nothing in {column!r}: {listed(empty, 6)}, counted from "
                             "0 after the heading; fill them or delete them")
    names = sorted(table[label].str.strip().unique())
    labels = table[label].str.strip().map(names.index)
    return text_set(table[text], labels.tolist(), names, tokenizer=tokenizer, max_tokens=max_tokens,
                    factors={"row": torch.arange(len(table))})


def _read_text(file: Path) -> str:
    text = file.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise ValueError("it has zero bytes, so it is damaged or not UTF-8")
    if not _is_text(text):
        raise ValueError("it has no text")
    return text


def _is_text(text: object) -> bool:
    """Whether it is a string with something to read, and without zeros, which only a damaged text has."""
    return isinstance(text, str) and "\0" not in text and any(c.isprintable() and not c.isspace() for c in text)
