"""Check, offline, that no link inside this project is broken: `python tests/check_links.py`.

Looks at the Markdown files of the top folder and at the text cells of the notebooks. A relative link or picture must
lead to a file of the project, an #anchor to a heading, and a picture must have an alternative text. Links to other
sites are not followed. The exit status is 1 if anything is broken.
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mistune
import nbformat
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
PAGES = {".md", ".ipynb"}  # the kinds of files that have headings to link to


class Text:
    """What matters here of one Markdown text: its links, pictures, headings and the ids given in HTML."""

    to_html = staticmethod(mistune.create_markdown(escape=False, plugins=["math", "table"]))

    def __init__(self, markdown: str):
        soup = BeautifulSoup(self.to_html(markdown), "html.parser")
        self.links = [link["href"] for link in soup.select("a[href]")]
        self.pictures = soup.select("img")
        self.headings = [heading.get_text() for heading in soup.select("h1, h2, h3, h4, h5, h6")]
        self.ids = [tag.get("id") or tag["name"] for tag in soup.select("[id], [name]")]


def texts(path: Path) -> dict[str, Text]:
    """The Markdown texts of a file, with where each stands: the file itself, or the text cells of a notebook."""
    if path.suffix != ".ipynb":
        return {path.name: Text(path.read_text(encoding="utf-8"))}
    cells = enumerate(nbformat.read(path, as_version=4).cells, start=1)
    return {f"{path.name}, cell {n}": Text(cell.source) for n, cell in cells if cell.cell_type == "markdown"}


def anchors(path: Path) -> set[str]:
    """The anchors that a link to the file can name: ids, and headings as Jupyter (notebooks) or GitHub spells them."""
    found: set[str] = set()
    for text in texts(path).values():
        found.update(text.ids)
        for heading in map(str.strip, text.headings):
            slug = heading if path.suffix == ".ipynb" else re.sub(r"[^\w\- ]", "", heading.lower())
            slug, repeats = slug.replace(" ", "-"), 0
            while (unique := f"{slug}-{repeats}" if repeats else slug) in found:
                repeats += 1
            found.add(unique)
    return found


def broken_links(root: Path) -> list[str]:
    """What is wrong with the links below the folder `root`, one line each. No line, no broken link."""
    problems = []
    for path in [*sorted(root.glob("*.md")), *sorted(root.glob("notebooks/*.ipynb"))]:
        for place, text in texts(path).items():
            for picture in text.pictures:
                if not picture.get("alt", "").strip():
                    problems.append(f"{place}: no alternative text: {picture.get('src')}")
            for link in text.links + [picture.get("src", "") for picture in text.pictures]:
                url = urlsplit(link)
                if url.scheme or url.netloc:  # another site
                    continue
                target = (path.parent / unquote(url.path)).resolve() if url.path else path
                if not link or not target.exists() or not target.is_relative_to(root.resolve()):
                    problems.append(f"{place}: no such file: {link}")
                elif url.fragment and target.suffix in PAGES and unquote(url.fragment) not in anchors(target):
                    problems.append(f"{place}: no such heading: {link}")
    return problems


if __name__ == "__main__":
    problems = broken_links(ROOT)
    print("\n".join(problems) or "No broken links.")
    sys.exit(1 if problems else 0)
