"""The link check finds what is broken, and nothing else."""

import nbformat
from check_links import broken_links
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

README = """# It's `here`, twice
## It's here, twice
[a file](picture.png), [a folder](notebooks), [a site](https://example.org/missing#x), `[code](missing.md)`, $w[k](x)$
![a picture](picture.png) <img src='picture.png' alt='the same'> <a id='mark'></a> [by id](#mark), [by reference][1],
[one](#its-here-twice), [two](#its-here-twice-1), [a notebook's heading](notebooks/01.ipynb#The-First-Step)

[1]: picture.png
"""
LESSON = "# The First Step\n[up](../README.md#its-here-twice) and [here](#The-First-Step)\n"
BROKEN = {
    "[gone](missing.md)": "no such file: missing.md",
    "[nothing]()": "no such file: ",
    "[outside](../)": "no such file: ../",
    "| a |\n|---|\n| [gone](in-table.md) |": "no such file: in-table.md",
    "[by reference][2]\n\n[2]: referred.md": "no such file: referred.md",
    "![a picture](a.png)": "no such file: a.png",
    "![](picture.png)": "no alternative text: picture.png",
    "<p><img src='notebooks'></p>": "no alternative text: notebooks",
    "[case](#Its-here-twice)": "no such heading: #Its-here-twice",
}


def check(folder, readme, lesson):
    """Write a small project with these texts and check it."""
    (folder / "notebooks").mkdir(exist_ok=True)
    (folder / "picture.png").touch()
    (folder / "README.md").write_text(readme, encoding="utf-8")
    cells = [new_code_cell("[not](a-link.md)"), new_markdown_cell(lesson)]
    nbformat.write(new_notebook(cells=cells), folder / "notebooks/01.ipynb")
    return sorted(broken_links(folder))


def test_broken_links_are_named_and_sound_ones_pass(tmp_path):
    assert check(tmp_path, README, LESSON) == []
    lesson = LESSON + "[case](#the-first-step), [not up](README.md)"
    expected = [f"01.ipynb, cell 2: no such {what}" for what in ("file: README.md", "heading: #the-first-step")]
    expected += sorted(f"README.md: {problem}" for problem in BROKEN.values())
    assert check(tmp_path, "\n\n".join([README, *BROKEN]), lesson) == expected
