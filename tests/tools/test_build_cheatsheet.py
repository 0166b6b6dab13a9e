"""The cheat sheet has two pages that can be read, and its code runs."""

import io
import re

import pytest
import torch
from pypdf import PdfReader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerlr_helpers as ll
from tools.build_cheatsheet import SOURCE, cheatsheet

TEXT = SOURCE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pages():
    return PdfReader(io.BytesIO(cheatsheet(TEXT))).pages


def test_it_has_two_pages_of_a4(pages):
    assert [[round(float(side) / 72 * 25.4) for side in page.mediabox[2:]] for page in pages] == [[210, 297], [210, 297]]


def test_every_heading_and_every_line_of_code_is_on_the_pages(pages):
    printed = " ".join(" ".join(page.extract_text() for page in pages).split())
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    assert len(headings) > 5
    lines = [" ".join(line.split()) for block in BLOCKS for line in block.splitlines()]
    assert [text for text in headings + lines if text not in printed] == []


def test_no_letter_is_smaller_than_8_5_points(pages):
    sizes = []
    for page in pages:
        page.extract_text(visitor_text=lambda text, _, __, font, size: sizes.append(size) if text.strip() else None)
    assert min(sizes) >= 8.5


def test_no_piece_of_code_is_long():
    assert max(len(block.splitlines()) for block in BLOCKS) <= 5


class TinyNetwork(nn.Module):
    """A convolutional network with the layers of a ResNet-18, but hardly any weights."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        maps = self.bn1(self.conv1(images))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = layer(maps)
        return self.fc(maps.mean((2, 3)))


class TinyEncoder(nn.Module):
    """A transformer that reads eight different tokens."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(8, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embeddings(tokens)).mean(1))


@pytest.fixture
def names():
    """What the text of the sheet says is there: a network, its data in batches, a task, and an encoder with texts."""
    torch.manual_seed(0)
    labels = torch.arange(36) % 3
    pixels = torch.randint(0, 100, (36, 3, 16, 16)) + 150 * nn.functional.one_hot(labels, 3)[:, :, None, None]
    images = ll.ImageSet(pixels.to(torch.uint8), labels, ("red", "green", "blue"))
    texts = DataLoader(TensorDataset(torch.randint(8, (12, 5)), labels[:12]), 6)
    task = ll.Task(images, per_class=4, val_per_class=4, steps=2, load=lambda weights: TinyNetwork())
    return {"torch": torch, "ll": ll, "model": TinyNetwork(), "data": images, "images": images, "task": task,
            "loader": DataLoader(images, 12), "encoder": TinyEncoder(), "texts": texts}


@pytest.mark.slow
def test_its_code_runs_from_top_to_bottom(names):
    """The pieces of code, and the calls within the text that are whole."""
    ran = 0
    for block, call in re.findall(r"^```python\n(.*?)^```$|`((?:ll|plan)\.\w+\([^`]+\))`", TEXT, re.MULTILINE | re.DOTALL):
        exec(block or call, names)
        ran += 1
    assert ran > len(BLOCKS) > 10
    assert [group.name for group in names["groups"]] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert names["h"] > 0  # and so the range test has found a rate
    assert len(names["rows"]) == 2 * 10  # two ways on ten seeds
    assert names["head"] is names["model"].fc


def test_what_it_names_of_the_helpers_is_there():
    named = set(re.findall(r"\bll\.(\w+)", TEXT))
    assert len(named) > 20
    assert [name for name in named if not hasattr(ll, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("more", "message"), [
    ("```python\n" + "x" * 60 + "\n```\n", "wider than a column"),
    ("## " + "x" * 60 + "\n", "wider than a column"),
    ("`" + "x" * 60 + "`\n", "wider than its place"),
    ("> said\n", "no block_quote"),
    ("- one\n\n  two\n", "text alone"),
    ("| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n", "two columns"),
    ("Not in DejaVu: 漢\n", "the fonts lack 漢"),
    ("A word. \n\n" * 40, "3 pages and not 2"),
])
def test_what_cannot_be_set_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        cheatsheet(f"{TEXT}\n{more}")
