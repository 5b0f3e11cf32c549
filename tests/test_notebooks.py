"""The notebooks as files, their first cell as Colab runs it, and the models of notebook 01."""

import ast
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import colab_machine
import nbformat
import numpy as np
import pytest
import torch
from check_links import texts
from nbconvert import ScriptExporter
from PIL import Image

import my_utils as utils

ROOT = utils.ROOT
NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
BASELINE = NOTEBOOKS / "01_baseline.ipynb"


@functools.cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(path) for output in cell.outputs]


def setup_source(path: Path) -> str:
    """The source of the one cell tagged `setup`."""
    (cell,) = [cell for cell in read(path).cells if "setup" in cell.metadata.get("tags", [])]
    return cell.source


# The notebooks as files


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_format(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nbformat repairs a missing cell id, with a warning
        nbformat.validate(json.loads(path.read_text(encoding="utf-8")))
    assert path.stat().st_size < 3_000_000
    metadata = read(path).metadata
    assert (metadata.kernelspec.name, metadata.accelerator, metadata.colab.gpuType) == ("python3", "GPU", "T4")


def test_executed_in_one_go(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [output for output in outputs(path) if output.output_type == "error"] == []
    for cell in cells:
        # The tag nbval-ignore-output is the only marker: others would leave cells out, or hide code behind a comment.
        assert "NBVAL" not in cell.source
        assert not [tag for tag in cell.metadata.get("tags", []) if "nbval" in tag and tag != "nbval-ignore-output"]


# A folder on somebody's machine, as in /home/me/, C:\Users or file:///, but not https://example.org/home/.
MACHINE_PATH = re.compile(r"(?<![\w.:/}])/\w[\w.-]*/|\b[A-Z]:\\|file:/")


def strings(node) -> Iterator[str]:
    """Every text in the parsed JSON of a notebook; pictures are left out, they are base64."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if not (key.startswith("image/") and isinstance(value, str)):
                yield from strings(value)


def test_no_path_of_a_machine(path):
    setup = setup_source(path)  # which looks for /notebooks/ in an address
    said = (text for text in strings(read(path)) if text != setup and not text.startswith("iVBORw0KGgo"))  # no picture
    lines = [line for text in said for line in text.splitlines()]
    assert [line for line in lines if MACHINE_PATH.search(line)] == []


def test_rhythm(path):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lengths) <= 40
    assert median(lengths) <= 16  # lines of 88 columns
    assert max(len(line) for cell in code_cells(path) for line in cell.source.splitlines()) <= 88
    assert "CCC" not in "".join("C" if cell.cell_type == "code" else "-" for cell in read(path).cells)


def test_folded_cells_leave_a_short_lesson(path):
    folded = [cell for cell in code_cells(path) if cell.metadata.get("jupyter") == {"source_hidden": True}]
    assert folded == [cell for cell in code_cells(path) if cell.metadata.get("cellView") == "form"] != []  # on Colab
    story = list(itertools.takewhile(lambda cell: not cell.source.startswith("## Appendix"), read(path).cells))
    lesson = [cell.source for cell in story if cell.cell_type == "code" and cell not in folded]
    cells, lines = (45, 450) if "02_" in path.name else (50, 520)
    assert len(lesson) <= cells
    assert sum(bool(line.strip()) for source in lesson for line in source.splitlines()) <= lines


def test_pictures_have_alternative_texts(path):
    pictures = [picture for text in texts(path).values() for picture in text.pictures]
    assert [picture for picture in pictures if not picture.get("alt", "").strip()] == []
    drawn = [(output, kind) for output in outputs(path) for kind in output.get("data", {}) if kind.startswith("image/")]
    assert {kind for _, kind in drawn} <= {"image/png"}
    alts = [output.metadata.get(kind, {}).get("alt", "") for output, kind in drawn]
    assert all(alt.strip() for alt in alts), alts


def test_the_exported_script_is_the_notebook_and_plain_python(path):
    script, _ = ScriptExporter().from_filename(path)
    source = "\n".join(cell.source for cell in code_cells(path))
    assert "get_ipython" not in script and ast.dump(ast.parse(script)) == ast.dump(ast.parse(source))


RESULT = re.compile(r"(\d+\.\d+) ?(?:%|PFLOP)")
DIFFERENCE = re.compile(r"(?<!± )\b(\d+\.\d+)(?: to \d+\.\d+)?\s(?:points?|better|ahead|behind)")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


@pytest.fixture(scope="module")
def recorded() -> list[float]:
    """Every accuracy and cost that a record or a publication states, in per cent and PFLOP."""
    published = numbers((ROOT / "report" / "published.json").read_text(encoding="utf-8"))
    found = [100 * number for number in published if number < 1] + published
    for path in (ROOT / "report" / "results").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.append(record["train_flops"] / 1e15)
        for seed in record["seeds"]:
            values = [seed["test_top1"], *seed["test_top1_interval"], *seed.get("test_top1_tta_interval", [])]
            found += [100 * value for value in values]
    return found


def test_results_in_the_text_stand_in_an_output_or_a_record(path, recorded):
    """A claim in points may also be the difference of two numbers that stand in one output."""
    found, differences, wrong = list(recorded), [], []
    for cell in read(path).cells:
        if cell.cell_type == "code":
            said = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
            found += [number * scale for text in said for number in numbers(text) for scale in (1, 100)]
            differences += [abs(a - b) for text in said for a, b in itertools.combinations(numbers(text), 2)]
        elif "## Exercises" not in cell.source:
            shown = {f"{number:.{digits}f}" for number in found for digits in (1, 2, 3)}
            wrong += [claim for claim in RESULT.findall(cell.source) if claim not in shown]
            shown |= {f"{number:.{digits}f}" for number in differences for digits in (1, 2)}
            wrong += [claim for claim in DIFFERENCE.findall(cell.source) if claim not in shown]
    assert wrong == []


def test_ending(path):
    text = "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    _, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    story = [part.split("\n", 1) for part in parts if not part.startswith("Appendix ")]
    titles, bodies = zip(*story, strict=True)
    assert titles[-3:] == ("What we learned", "Exercises", "References")
    exercises, solutions = bodies[-2].split("<details><summary>Solutions</summary>")
    solutions, _ = solutions.split("</details>")
    numbers = re.findall(r"^(\d+)\. ", exercises, flags=re.MULTILINE)
    assert 3 <= len(numbers) <= 5
    assert re.findall(r"^(\d+)\. ", solutions, flags=re.MULTILINE) == numbers


# The models of notebook 01


@pytest.fixture(scope="module")
def models():
    return utils.models_of("01_baseline")


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts(models):
    # gate: one weight per channel and one bias, for each convolution: L (C + 1)
    assert count(gate := models.BasicGate(channels=5, num_convs=4)) == 4 * (5 + 1)
    assert (gate.linear.weight == 0).all() and (gate.linear.bias == 1).all()  # it starts as a plain sum
    # block: L convolutions of C' (9 C + 1) each, and the gate
    assert count(models.IntermediateBlock(in_channels=5, out_channels=7, num_convs=4)) == 4 * 7 * (9 * 5 + 1) + 24
    # network: blocks 3 -> 32 -> 64 -> 128 of 3 convolutions, and a layer from 128 channels to 10 classes
    blocks = [3 * 32 * 28 + 3 * 4, 3 * 64 * 289 + 3 * 33, 3 * 128 * 577 + 3 * 65]
    assert count(models.BasicNet()) == sum(blocks) + 10 * 129 == 281_340


def test_block_is_the_formula(models):
    """x'[n] = sum_k a_k (K_k * x[n] + bias_k), where a = W m + b and m are the channel means of image n."""
    block, x = models.IntermediateBlock(3, 2, num_convs=4).double(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.nn.init.normal_(block.gate.linear.weight)
    torch.nn.init.normal_(block.gate.linear.bias)
    for image, found in zip(x, block(x), strict=True):
        a = block.gate.linear.weight @ image.mean((1, 2)) + block.gate.linear.bias
        windows = torch.nn.functional.pad(image, (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
        by_hand = [torch.einsum("ocuv,cijuv->oij", c.weight, windows) + c.bias[:, None, None] for c in block.convs]
        torch.testing.assert_close(found, torch.einsum("k,koij->oij", a, torch.stack(by_hand)))


def test_network(models):
    network = models.BasicNet()
    logits = network(torch.randn(6, 3, 32, 32))
    assert logits.shape == (6, 10)
    torch.nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    assert [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()] == []


# Notebook 03: your own picture


@pytest.fixture(scope="module")
def pictures():
    """A function that shows the files in PICTURES, as the cells of notebook 03 do, and returns the images taken."""
    sources = [cell.source for cell in code_cells(NOTEBOOKS / "03_advanced_training.ipynb")]
    reader, chooser = (next(s for s in sources if text in s) for text in ("def read_picture", "PICTURES = []"))
    chooser = chooser.split("chosen =")[0]

    def take(pictures):
        names = {"np": np, "os": os, "torch": torch}
        exec(reader, names)
        exec(chooser.replace("PICTURES = []", f"PICTURES = {pictures!r}"), names)
        return names["images"]

    return take


def test_sound_pictures_are_shown_and_damaged_ones_named(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 50), "red").save("cat.jpg")
    for name in ("cut.avif", "cut.png"):
        Image.effect_noise((64, 64), 50).save(name)
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) * 9 // 10])
    assert len(pictures(["cut.avif", "cat.jpg", "none.png", "cut.png", "cat.jpg"])) == 1
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"{name} cannot be read as a picture" for name in ("cut.avif", "none.png", "cut.png")]


def test_a_picture_stored_lying_on_its_side_is_turned_upright(pictures, tmp_path):
    picture = Image.new("RGB", (64, 48), "blue")
    picture.paste("red", (0, 0, 64, 24))  # red above blue
    exif = picture.getexif()
    exif[0x0112] = 6  # turn me by 90 degrees clockwise: red to the right
    picture.save(tmp_path / "phone.png", exif=exif)
    [image] = pictures(str(tmp_path / "phone.png"))
    assert image[0, :, 16, 28].tolist() == [255, 0, 0] and image[0, :, 16, 3].tolist() == [0, 0, 255]


GREYS = [(128, "uint8", [128]), (65535, "uint16", [255]), (70000, "int32", None), (0.5, "float32", None)]


@pytest.mark.parametrize(("value", "dtype", "grey"), GREYS)
def test_grey_levels_are_scaled_and_more_than_16_bits_refused(pictures, tmp_path, capsys, value, dtype, grey):
    Image.fromarray(np.full((40, 40), value, dtype)).save(tmp_path / "grey.tif")
    images = pictures(str(tmp_path / "grey.tif"))
    assert [image.unique().tolist() for image in images] == [grey] * (grey is not None)
    assert ("grey.tif" in capsys.readouterr().out) == (grey is None)


# The set-up cell, on Colab and elsewhere

STAND_IN = '"""Stands in for my_utils.py."""\n\n\ndef fit(): pass\n'
OPENED = ("my_utils.py", "notebooks/02_b.ipynb", "report/results/02_b.json", "report/runs/01_a-seed0.safetensors")
NOT_OPENED = ("README.md", "tests/my_utils.py", "report/report.pdf", "report/runs/02_b-seed0.safetensors")
AFTER = "\nprint('FOUND', pathlib.Path(utils.__file__).resolve())\n"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Colab is a Linux machine")


def test_setup_cell_is_short_and_everywhere_the_same():
    lines = setup_source(BASELINE).splitlines()
    assert len(lines) <= 21 and max(map(len, lines)) <= 88
    for path in PATHS:
        expected = setup_source(BASELINE).replace("runs/01*", f"runs/{path.name[:2]}*")
        assert setup_source(path) == code_cells(path)[0].source == expected


@pytest.fixture
def public(tmp_path) -> Path:
    """A repository that stands for the one on GitHub, with a stand-in for my_utils.py."""
    folder = tmp_path / "public"
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run(["git", "init", "--quiet", "-b", colab_machine.BRANCH, folder], check=True)
    subprocess.run([*git, "config", "uploadpack.allowFilter", "true"], check=True)  # as GitHub does
    for name in (*OPENED, *NOT_OPENED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{STAND_IN}\n# {name}\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)
    return folder


@pytest.fixture
def run(tmp_path, public):
    """A function that runs the set-up cell in a folder, like a kernel, and returns what it printed."""

    def run_cell(folder: Path, colab: bool = True, repository: str = "", uploads: dict | None = None, **variables):
        source = setup_source(BASELINE).replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
        folder.mkdir(parents=True, exist_ok=True)
        chosen = None
        if uploads:
            chosen = tmp_path / "uploads"
            chosen.mkdir(exist_ok=True)
            for name, content in uploads.items():
                (chosen / name).write_text(content)
        environment = colab_machine.variables(sys.executable, public, chosen) | variables
        if not colab:
            del environment["COLAB_RELEASE_TAG"]
        # -P: without the current folder on sys.path, which the cell has to see to itself
        command = [sys.executable, "-P", "-c", source + AFTER]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    return run_cell


def found(folder: Path) -> str:
    return f"FOUND {(folder / 'my_utils.py').resolve()}\n"


@on_linux
def test_colab_fetches_what_the_notebook_opens_from_where_it_was_opened(run, tmp_path):
    content = tmp_path / "content"
    with colab_machine.listing(colab_machine.session("02_intermediate_blocks")):
        result = run(content, repository="https://github.com/not/asked")
    assert "objects: 100%" in result.stdout
    assert result.stderr == "" and result.stdout.endswith(f": {'done':79}\n" + found(content))
    files = [path.relative_to(content) for path in content.rglob("*") if path.is_file()]
    assert {str(path) for path in files if path.parts[0] not in (".git", "__pycache__")} == set(OPENED)
    command = ["git", "-C", content, "rev-list", "--objects", "--missing=print", "HEAD"]
    objects = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert sum(line.startswith("?") for line in objects) == len(NOT_OPENED)  # not even downloaded


ANSWERS = {"missing": ("not found", 404, 0), "page": ("<html>//github.com/a/b/notebooks</html>", 200, 0)}
ANSWERS |= {"Drive": ('[{"path": "fileId=1AbC"}]', 200, 0), "late": (colab_machine.session("01_baseline"), 200, 8)}


@on_linux
@pytest.mark.parametrize(("answer", "status", "wait"), ANSWERS.values(), ids=ANSWERS)
def test_every_other_answer_leads_on_to_the_constant(run, tmp_path, answer, status, wait):
    start = time.monotonic()
    with colab_machine.listing(answer, status, wait):
        result = run(tmp_path / "content", repository=colab_machine.REPOSITORY)
        assert time.monotonic() - start < 8
    assert result.stderr == "" and result.stdout.endswith(f": {'done':79}\n" + found(tmp_path / "content"))


@on_linux
@pytest.mark.parametrize("name", ["my_utils (1).py", "Copy of my_utils.txt"])
def test_an_upload_is_taken_by_its_content(run, tmp_path, name):
    here = tmp_path / "content"
    uploads = {"a.ipynb": '{"source": "def fit(): pass"}', name: STAND_IN, "z.py": "print()"}
    result = run(here, repository=f"{colab_machine.REPOSITORY}/blob/missing", uploads=uploads)
    assert result.stderr == "" and result.stdout.endswith(found(here))
    assert ": fatal: couldn't find remote ref missing" in result.stdout
    assert (here / "my_utils.py").read_text() == STAND_IN
    assert (here / "a.ipynb").read_text() == uploads["a.ipynb"]


# Kaggle's kernels can import google.colab, too.
MISSES = {"cancelled": (True, None), "wrong file": (True, {"a.ipynb": "{}"}), "elsewhere": (False, {"a.py": STAND_IN})}


@on_linux
@pytest.mark.parametrize(("colab", "uploads"), MISSES.values(), ids=MISSES)
def test_without_the_file_one_sentence_says_what_to_do(run, tmp_path, colab, uploads):
    result = run(tmp_path / "content", colab, "" if colab else colab_machine.REPOSITORY, uploads)
    assert result.stderr.splitlines()[-1].startswith("AssertionError: Choose my_utils.py")
    assert colab or result.stdout == ""  # nobody was asked


@pytest.mark.parametrize(("below", "colab"), [(".", False), ("notebooks/deeper", False), ("notebooks", True)])
def test_file_beside_or_above_is_found(run, tmp_path, colab, below):
    project = tmp_path / "project"
    project.mkdir()
    (project / "my_utils.py").write_text(STAND_IN)
    result = run(project / below, colab=colab, repository=colab_machine.REPOSITORY, uploads={"a.py": STAND_IN})
    assert (result.stdout, result.stderr) == (found(project), "")
    assert not list(tmp_path.glob("project/**/.git"))


def test_colab_has_every_package():
    imports = ast.parse((ROOT / "my_utils.py").read_text(encoding="utf-8")).body
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    versions = (colab_machine.STAND_INS / "versions.txt").read_text(encoding="utf-8")
    assert packages - set(re.findall(r"^(\w+)==", versions, re.MULTILINE)) == set()


def test_my_utils_is_short_enough_to_be_read():
    source = (ROOT / "my_utils.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno - node.lineno < (45 if isinstance(node, ast.FunctionDef) else 90), node.name
    assert len(source.splitlines()) <= 1200
