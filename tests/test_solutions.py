"""Solutions of exercises that are code: each runs at the end of its notebook, in the smallest size."""

import os
import re
import subprocess
import sys
from textwrap import dedent

import nbformat
import pytest

import my_utils as utils

PATHS = sorted((utils.ROOT / "notebooks").glob("0[23]*.ipynb"))  # those of notebook 01: test_baseline.py


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_solutions_run(path, tmp_path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    [text] = [cell.source for cell in cells if "<summary>Solutions</summary>" in cell.source]
    text = text.split("<summary>Solutions</summary>")[1].split("</details>")[0]
    solutions = [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)]
    assert solutions
    script = tmp_path / "script.py"
    script.write_text("\n\n".join([*code, *solutions]), encoding="utf-8")
    settings = {"RUN_SIZE": "smoke", "RUNS_DIR": str(tmp_path / "runs"), "PYTHONPATH": str(utils.ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
