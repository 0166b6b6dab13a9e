"""Real sentences that every learner has already: what the libraries of this course say about their own functions."""

import ast
import hashlib
import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from layerlr_helpers.naming import check_choice
from layerlr_helpers.texts import TextSet, text_set

LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch")
MOST, FEWEST = 1000, 400  # texts of a library
MAX_TOKENS = 32
_NAMES = re.compile(r"\b(matplotlib|mpl|pyplot|plt|networkx|nx|numpy|np|pandas|pd|scipy|scikit[- ]?learn|sklearn|sympy|pytorch|"
                    r"torch)(?=\b|_)", re.IGNORECASE)
_FEWEST_WORDS = 5
_NEIGHBOURS = {"a": "qs", "b": "vn", "c": "xv", "d": "sf", "e": "wr", "f": "dg", "g": "fh", "h": "gj", "i": "uo", "j": "hk",
               "k": "jl", "l": "ko", "m": "nj", "n": "bm", "o": "ip", "p": "ol", "q": "wa", "r": "et", "s": "ad", "t": "ry",
               "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "xa"}  # on a keyboard


def docstring_sentences() -> TextSet:
    """The first paragraphs of public docstrings, up to 1,000 from each of eight libraries, labelled by library.

    They are read from the libraries that are installed, without importing them. The names of the libraries are replaced by
    "library", and texts of fewer than five words and texts that occur twice are left out. The same versions give the same
    texts; ``fingerprint()`` of two sets says whether they are the same. ``factors["words"]`` is the number of words. A library
    that is not installed is a ModuleNotFoundError, one with too few docstrings a ValueError.
    """
    texts, labels = _sentences()
    words = torch.tensor([len(text.split()) for text in texts])
    names = [library.replace("sklearn", "scikit-learn") for library in LIBRARIES]
    return text_set(texts, labels, names, max_tokens=MAX_TOKENS, factors={"words": words})


def shifted_texts(data: TextSet, shift: str | None, *, rate: float = 0.1, seed: int = 0) -> TextSet:
    """The same texts after a shift of their distribution; ``None`` changes nothing.

    At the input: ``"upper case"``, ``"typing errors"`` (each letter is, with probability ``rate``, replaced by a neighbour on
    the keyboard, left out or typed twice), ``"no vowels"``. At the output: ``"permuted"`` (every class gets the number of
    another, always by the same permutation). Texts of :func:`docstring_sentences`, whose tokenizer they are tokenized with.
    """
    check_choice("shift", shift, (None, "upper case", "typing errors", "no vowels", "permuted"))
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is a probability, from 0 to 1, not {rate}")
    if shift is None:
        return data
    if shift == "permuted":
        cycle = torch.randperm(len(data.class_names), generator=torch.Generator().manual_seed(0))
        permutation = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1))  # one cycle: no class keeps its number
        names = tuple(data.class_names[old] for old in permutation.argsort())
        return replace(data, labels=permutation[data.labels], class_names=names)
    generator = torch.Generator().manual_seed(seed)
    change = {"upper case": str.upper,
              "no vowels": lambda text: re.sub(r"(?<=\w)[aeiou]", "", text, flags=re.IGNORECASE),
              "typing errors": lambda text: _mistyped(text, rate, generator)}[shift]
    width = data.tokens["attention_mask"].shape[1]
    changed = [change(text) for text in data.texts]
    return text_set(changed, data.labels, data.class_names, max_tokens=width, factors=data.factors)


def _mistyped(text: str, rate: float, generator: torch.Generator) -> str:
    chances, kinds = torch.rand(len(text), generator=generator), torch.randint(4, (len(text),), generator=generator)
    typed = []
    for letter, chance, kind in zip(text, chances.tolist(), kinds.tolist(), strict=True):
        beside = _NEIGHBOURS.get(letter.lower())
        if beside is None or chance >= rate:
            typed.append(letter)
        else:
            typed.append((beside[0], beside[1], "", 2 * letter)[kind])
    return "".join(typed) if "".join(typed).strip() else text


@cache
def _sentences() -> tuple[list[str], list[int]]:
    of_library = {library: _usable_texts(_folder(library)) for library in LIBRARIES}
    times = Counter(text for texts in of_library.values() for text in texts)
    chosen, labels = [], []
    for label, library in enumerate(LIBRARIES):
        texts = [text for text in of_library[library] if times[text] == 1][:MOST]
        if len(texts) < FEWEST:
            raise ValueError(f"the installed {library} has {len(texts)} usable docstrings, and {FEWEST} are needed; is its "
                             f"source code there (files ending in .py in {_folder(library)})?")
        chosen += texts
        labels += [label] * len(texts)
    return chosen, labels


def _folder(library: str) -> Path:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{library} is not installed, and its docstrings are among the texts; install it with pip")
    return Path(spec.origin).parent


def _usable_texts(folder: Path) -> list[str]:
    """Different texts from a folder's files, which are read in a random order until there are somewhat more than needed."""
    files = [(path.relative_to(folder), path) for path in folder.rglob("*.py")]
    files.sort(key=lambda file: hashlib.sha256(file[0].as_posix().encode()).digest())
    texts: dict[str, None] = {}
    for inside, path in files:
        if len(texts) > 1.2 * MOST:
            break
        if not any(name.startswith("_") or name in ("tests", "testing") for name in inside.parts[:-1]):
            texts |= dict.fromkeys(text for text in map(_cleaned, _docstrings(path)) if len(text.split()) >= _FEWEST_WORDS)
    return list(texts)


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the source of others
        yield from _of_public_names(ast.parse(file.read_bytes()))


def _of_public_names(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from _of_public_names(child)


def _cleaned(docstring: str) -> str:
    return _NAMES.sub("library", " ".join(docstring.partition("\n\n")[0].split()))
