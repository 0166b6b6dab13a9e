"""What the pages and notebooks link to."""

import re
from pathlib import Path


def links(text: str) -> list[str]:
    """Return the targets of a text's links, but for those that begin with a scheme, such as https."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def broken(text: str, page: Path) -> list[str]:
    """Return the links of a page's text that lead to no file, or to no heading of a Markdown file."""
    return [target for target in links(text) if not _leads_somewhere(page, *target.partition("#")[::2])]


def _leads_somewhere(page: Path, name: str, anchor: str) -> bool:
    target = page.parent / name if name else page
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in anchors(target.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Return the anchors of a Markdown page's headings, as code-hosting pages make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
