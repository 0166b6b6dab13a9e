"""The README's code works when pasted, and what it points to is there."""

import re
from pathlib import Path

import pytest

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
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_make_target_that_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make (setup|lab|check|test|course|bench|lint)\b", TEXT)) <= targets
