"""The link check must find what is broken, and nothing else."""

import nbformat
import pytest
from check_links import broken_links
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


@pytest.fixture
def project(tmp_path):
    """A small project whose links are all sound; returns a function that adds a line to one of its pages."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "picture.png").touch()
    pages = {"README.md": "# It's `here`, twice\n## It's here, twice\n", "notebooks/01.ipynb": "# The First Step\n"}

    def check(page: str = "README.md", line: str = "") -> list[str]:
        pages[page] += f"\n{line}\n"
        (tmp_path / "README.md").write_text(pages["README.md"], encoding="utf-8")
        cells = [new_code_cell("[not](a-link.md)"), new_markdown_cell(pages["notebooks/01.ipynb"])]
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks/01.ipynb")
        return broken_links(tmp_path)

    return check


@pytest.mark.parametrize(
    ("page", "line"),
    [
        ("README.md", "[a file](picture.png), [a folder](notebooks) and [a site](https://example.org/missing#x)"),
        ("README.md", "![a picture](picture.png) <img src='picture.png' alt='the same'>"),
        ("README.md", "[one](#its-here-twice), [two](#its-here-twice-1)"),
        ("README.md", "[a notebook's heading](notebooks/01.ipynb#The-First-Step)"),
        ("README.md", "<a id='mark'></a> [by id](#mark)"),
        ("README.md", "`[code](missing.md)` and a formula $w[k](x)$"),
        ("README.md", "[by reference][ref]\n\n[ref]: picture.png"),
        ("notebooks/01.ipynb", "[up](../README.md#its-here-twice) and [here](#The-First-Step)"),
    ],
)
def test_sound_links_pass(project, page, line):
    assert project(page, line) == []


@pytest.mark.parametrize(
    ("page", "line", "problem"),
    [
        ("README.md", "[gone](missing.md)", "README.md: no such file: missing.md"),
        ("README.md", "[nothing]()", "README.md: no such file: "),
        ("README.md", "[outside](../)", "README.md: no such file: ../"),
        ("README.md", "| a |\n|---|\n| [gone](missing.md) |", "README.md: no such file: missing.md"),
        ("README.md", "[by reference][ref]\n\n[ref]: missing.md", "README.md: no such file: missing.md"),
        ("README.md", "![a picture](missing.png)", "README.md: no such file: missing.png"),
        ("README.md", "<img src='missing.png' alt='gone'>", "README.md: no such file: missing.png"),
        ("README.md", "![](picture.png)", "README.md: no alternative text: picture.png"),
        ("README.md", "<p><img src='picture.png'></p>", "README.md: no alternative text: picture.png"),
        ("README.md", "[case](#Its-here-twice)", "README.md: no such heading: #Its-here-twice"),
        ("notebooks/01.ipynb", "[case](#the-first-step)", "01.ipynb, cell 2: no such heading: #the-first-step"),
        ("notebooks/01.ipynb", "[not up](README.md)", "01.ipynb, cell 2: no such file: README.md"),
    ],
)
def test_broken_links_are_named(project, page, line, problem):
    assert project(page, line) == [problem]
