"""The README's code works when pasted, and what it points to is there."""

import re
from pathlib import Path

import pytest

from tests.pages import anchors, broken

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_ten_lines_work_when_pasted_and_learn_something(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    pasted = {}
    exec(compile(block, "README.md", "exec"), pasted)
    assert len(pasted["history"].rows) == 8 * len(pasted["loader"])
    accuracy = float(re.search(r"'accuracy': ([0-9.]+)", capsys.readouterr().out)[1])
    assert accuracy > 0.5  # chance is 0.1


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "data/README.md",
                                  *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))])
def test_every_file_and_heading_that_a_page_links_to_exists(page):
    assert broken((ROOT / page).read_text(encoding="utf-8"), ROOT / page) == []


def test_a_link_to_no_file_or_to_no_heading_is_found(tmp_path):
    (tmp_path / "page.md").write_text("# What `this` is, and why\n", encoding="utf-8")
    text = "[a](page.md#what-this-is-and-why) [b](page.md#else) [c](nothing.md) [d](https://example.org/e#f)"
    assert broken(text, tmp_path / "notebook.ipynb") == ["page.md#else", "nothing.md"]


def test_every_make_target_that_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make (setup|lab|check|test|course|bench|lint)\b", TEXT)) <= targets


def test_each_term_of_the_glossary_is_linked_where_it_is_explained_first_or_before():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    notebooks = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    entries = re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", glossary, re.MULTILINE | re.DOTALL)
    assert len(entries) > 50
    for term, text in entries:
        explained = re.search(r"\]\(\.\./notebooks/(\w+\.ipynb)\)", text)[1]
        (anchor,) = anchors(f"## {term}")
        linking = [name for name, content in notebooks.items() if f"(../docs/glossary.md#{anchor})" in content]
        assert linking, f"no notebook links {term}"
        assert min(linking) <= explained
