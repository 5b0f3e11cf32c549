"""The main job on toy notebooks: pages, progress, the table of accuracies, failures and Ctrl-C."""

import functools
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
RECORD = """
import json, pathlib
seed = {"seed": 0, "fingerprint": "f", "val_top1": 0.7, "test_top1_interval": [0.59, 0.61]}
record = {"name": "toy", "data": "synthetic", "run_size": "smoke", "epochs": 2}
folder = pathlib.Path("../build/results")
folder.mkdir(parents=True)
for name, accuracies in {"one": [0.6], "two": [0.6, 0.8]}.items():
    seeds = [seed | {"test_top1": top1} for top1 in accuracies]
    (folder / f"{name}.json").write_text(json.dumps(record | {"name": name, "seeds": seeds}))
"""
SLOW = """
import time
from IPython.display import display
time.sleep(1.3)
handle = display({"text/plain": "epoch 1/2"}, raw=True, display_id=True)
time.sleep(0.7)
handle.update({"text/plain": "epoch 2/2"}, raw=True)
time.sleep(0.7)
"""
INTERRUPT = """
import os, signal, time
os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the main job in a folder of its own; returns a function that adds a notebook with the given cells."""
    shutil.copytree(ROOT / "report", tmp_path / "report", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "notebooks").mkdir()

    def add(name, *sources):
        cells = [new_markdown_cell("Text.\n\n## A heading")]
        for source in sources:  # with an output that another run left
            cells.append(new_code_cell(source, execution_count=9, outputs=[new_output("stream", text="of old")]))
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")

    add.root = tmp_path
    return add


@pytest.fixture
def build(project, monkeypatch):
    """The copied main job as a module, with a short heartbeat."""
    spec = importlib.util.spec_from_file_location("build", project.root / "report" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HEARTBEAT, module.FILE_PAUSE = 1.0, 0.2
    return module


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_build(project, build, capsys, monkeypatch, tmp_path_factory):
    project("01_bad", "print('before')", "# one\n# two\n# three\nx = 0\n1 / x\n# six", "print('after')")
    project("02_good", "import sys; print('python', sys.executable)", "", RECORD)
    project("03_slow", SLOW)
    before = files(project.root)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    assert build.main([]) == 1
    printed = capsys.readouterr().out

    # Every cell is reported with its place, and a slow one while it runs.
    assert "[02_good] cell 2/2 (A heading) ... " in printed
    for said in ("[03_slow] cell 1/1 (A heading) ... still running, 1.", " s: epoch 1/2\n", " s: epoch 2/2\n"):
        assert said in printed

    # The failure is told without colours, and did not stop the others.
    assert "[01_bad] FAILED in cell 2:\n\n    # one\n    # two\n    # three\n    x = 0\n    ...\n" in printed
    assert "    ZeroDivisionError: division by zero\n" in printed and "----> 5 1 / x" in printed
    assert "\x1b" not in printed and printed.endswith("FAILED: 01_bad\n")

    table = re.sub(" +", " ", printed)
    assert " one synthetic smoke 2 1 70.00% 60.00% [59.00%, 61.00%]\n" in table
    assert " two synthetic smoke 2 2 70.00% 70.00% ± 14.14%\n" in table
    assert "say nothing about CIFAR-10" in printed

    # Pages hold this run alone, of the failed notebook up to the error, and nothing else is written.
    after = files(project.root)
    assert {path: after[path] for path in before} == before
    assert {str(path.parent) for path in after.keys() - before.keys()} <= {"build", str(Path("build/results"))}
    index = (build.BUILD / "index.html").read_text(encoding="utf-8")
    for name in ("01_bad", "02_good", "03_slow"):
        assert f'<a href="{name}.html">' in index
        page = (build.BUILD / f"{name}.html").read_text(encoding="utf-8")
        assert f"<title>{name}</title>" in page and "of old" not in page
    bad = nbformat.read(build.BUILD / "01_bad.ipynb", as_version=4)
    assert [[output.output_type for output in cell.outputs] for cell in bad.cells[1:]] == [["stream"], ["error"], []]
    good = nbformat.read(build.BUILD / "02_good.ipynb", as_version=4)
    assert good.cells[1].outputs[0].text == f"python {sys.executable}\n"


@pytest.mark.parametrize(("reached", "status"), [((0.9, 0.9003), 0), ((0.9, 0.8996), 1)])
def test_shipped_networks_must_reach_their_records(project, build, capsys, reached, status):
    """Up to 3 of 10,000 images may differ, as on another processor."""
    entry = {"seed": 1, "val_top1": None, "test_top1": 0.9, "test_top1_interval": [0.8, 1], "weights": "toy"}
    seeds = [entry | {"fingerprint": letter} for letter in "ab"]
    record = {"name": "toy", "data": "cifar10", "run_size": "full", "epochs": 2, "seeds": seeds}
    (project.root / "report" / "results" / "toy.json").write_text(json.dumps(record))
    new = [entry | {"test_top1": top1} for entry, top1 in zip(seeds, reached, strict=True)]
    path, content = "../build/results/toy.json", json.dumps(record | {"seeds": new})
    project("01_toy", f"import pathlib; pathlib.Path({path!r}).write_text({content!r})")
    (project.root / "build" / "results").mkdir(parents=True)
    assert build.main([]) == status
    lines = re.findall(r"toy +1 +(\S+) +90.00% +(\w+)", capsys.readouterr().out)
    assert lines == [("90.00%", "yes"), (f"{reached[1]:.2%}", "NO" if status else "yes")]


def test_chosen_notebooks(project, build, capsys):
    project("01_one", "1")
    project("02_two", "import os; os._exit(1)")
    assert build.main(["01"]) == 0
    printed = capsys.readouterr().out
    one, two = ((build.BUILD / f"{name}.html").read_text(encoding="utf-8") for name in ("01_one", "02_two"))
    assert "of old" not in one and "of old" in two and "02_two" not in printed
    assert build.main(["02"]) == 1
    assert "Kernel died" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_interrupt(project):
    project("01_long", "print('before')", INTERRUPT)
    project("02_next", "1")
    command = [sys.executable, project.root / "report" / "build.py"]
    # A shell starts its background jobs with SIGINT ignored, and whatever they start inherits that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, preexec_fn=heed)
    assert result.returncode == 130 and "Interrupted." in result.stdout
    assert "[02_next]" not in result.stdout and "Traceback" not in result.stderr
    assert "before" in (project.root / "build" / "01_long.html").read_text(encoding="utf-8")
