"""Where the series lies on GitHub: its address in the notebooks, their Colab badges, and the README's.

The set-up cell of the first notebook holds the address, as REPOSITORY; while that is empty there is no badge.
"""

import json
import re
import subprocess
from pathlib import Path

BADGE = "[![Open {name} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
SETTING = r'^REPOSITORY = "(.*?)"'


def github_address(root: Path, text: str = "") -> str:
    """Return the address https://github.com/owner/repository that `text` means; without a text, the remote `origin`.

    Raises:
        ValueError: it is no address of a repository on GitHub, or there is no such remote.
    """
    if not text:
        command = ["git", "-C", str(root), "remote", "get-url", "origin"]
        text = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    form = r"(?:https://github\.com/|(?:ssh://)?git@github\.com[:/])([\w.-]+/[\w.-]+?)(?:\.git)?/?"
    if not (found := re.fullmatch(form, text)):
        raise ValueError(f"{text or 'nothing'!r} is no repository on GitHub: name one as https://github.com/owner/name")
    return f"https://github.com/{found[1]}"


def notebooks(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("*.ipynb"))


def read_address(root: Path) -> str:
    """Return the address in the first notebook, or "" if there is none."""
    for path in notebooks(root)[:1]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if found := re.search(SETTING, "".join(cell["source"]), re.MULTILINE):
                return found[1]
    return ""


def badge(address: str, notebook: str) -> str:
    """Return the Markdown of a badge that opens a notebook in Colab."""
    repository = address.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{notebook}.ipynb"
    return BADGE.format(name=notebook, link=link)


def fill_notebook(path: Path, address: str) -> dict:
    """Return the content of a notebook with this address, and with its badge above the title."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(content["cells"]):
        source = "".join(cell["source"])
        if number == 0:
            source = re.sub(r"\A\[!\[Open .* in Colab\].*\n\n", "", source)
            source = f"{badge(address, path.stem)}\n\n{source}" if address else source
        elif "setup" in cell["metadata"].get("tags", []):
            source = re.sub(SETTING, f'REPOSITORY = "{address}"', source, flags=re.MULTILINE)
        else:
            continue
        cell["source"] = source.splitlines(keepends=True)
    return content


def colab_markdown(root: Path, address: str) -> str:
    """Return the README's badges, or how to get them and how to do without."""
    if not address:
        return (
            "You can also choose File > Upload notebook; the set-up cell then asks for `my_utils.py` and the earlier\n"
            "notebooks, all at once. The finished runs are missing then, so it trains as with `TRAIN = True`.\n"
            "\n"
            "To add badges that open the notebooks, run `python report/build.py --address` in a clone from GitHub."
        )
    return "\n".join(badge(address, path.stem) for path in notebooks(root))


def citation_markdown(address: str) -> str:
    """Return how to cite the series, in BibTeX."""
    url = f",\n  url = {{{address}}}" if address else ""
    title = "Experts on CIFAR-10: parallel convolutions, mixed image by image"
    return f"```bibtex\n@misc{{experts_on_cifar10,\n  title = {{{title}}},\n  year = {{2026}}{url}\n}}\n```"


def write_notebooks(root: Path, address: str) -> list[Path]:
    """Write the address and the badges into the notebooks, and return their paths."""
    for path in notebooks(root):
        text = json.dumps(fill_notebook(path, address), indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
    return notebooks(root)
