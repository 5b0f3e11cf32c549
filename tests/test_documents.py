"""The report, its figures and the README's tables: made of the records alone, the same twice, and checked."""

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import address
import documents
import pytest
from pages import build_site
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pypdf import PdfReader

from build import main
from my_utils import load_run, percent

ROOT = Path(__file__).parents[1]
RESULT = "report/results/01_baseline.json"
BASELINE = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
PUBLISHED = json.loads((ROOT / "report" / "published.json").read_text(encoding="utf-8"))


def made_up(name, top1, *, seeds=1, epochs=10, val=True, published=(None, None)):
    """A sound record with accuracies near `top1`; the numbers mean nothing."""
    content = copy.deepcopy(BASELINE) | {"name": name, "epochs": epochs, "system": None}
    content |= {"published_top1": published[0], "published_epochs": published[1]}
    [first, *_] = content.pop("seeds")
    content["seeds"] = []
    for seed in range(seeds):
        entry = copy.deepcopy(first) | {"seed": seed, "test_top1": top1 + 0.0013 * seed}
        entry["val_top1"] = round(top1 - 0.0021 * seed, 4) if val else None
        curve = [top1 * (epoch + 1) / epochs for epoch in range(epochs)]
        entry["history"] |= {"train_top1": curve, "val_top1": curve if val else [], "test_top1": []}
        entry["history"] |= {name: [1.0] * epochs for name in ("train_loss", "seconds")}
        entry["history"] |= {"val_loss": [1.0] * epochs if val else [], "probe": [{"block 1": 0.9}] * epochs}
        content["seeds"].append(entry)
    return content


def complete():
    """Made-up records of everything that the series will train."""
    stated = {system["id"]: (system["top1"], system["epochs"]) for system in PUBLISHED["systems"]}
    records = [made_up("01_baseline", 0.71, seeds=3), made_up("02_basic", 0.781)]
    for number in range(5):
        records.append(made_up(f"02_s{number}", 0.85 + 0.0171 * number, published=stated[f"S{number}"]))
    records += [made_up("02_s4_published", 0.75, epochs=20), made_up("02_s0_long", 0.93, epochs=30)]
    arms = ("per_channel", "static", "signed", "basic", "softmax", "uniform")
    arms += ("plain_parameters", "plain_time", "plain_flops")
    records += [made_up(f"02_ablation_{arm}", 0.82 + 0.003 * i, seeds=3, epochs=4) for i, arm in enumerate(arms)]
    records += [made_up(f"02_long_{arm}", 0.88 + 0.001 * len(arm), seeds=3, epochs=40) for arm in ("basic", *arms[-4:])]
    records += [made_up(f"03_{name}", 0.9, epochs=13) for name in ("s0", "s1", "s4")]
    records += [made_up("03_fast", 0.9312, seeds=3), made_up("03_fast_plain", 0.9312, seeds=3)]
    records += [made_up("03_fast_experts", 0.9295, seeds=3)]
    records += [made_up("03_strong", 0.9555, val=False)]
    for entry in (entry for content in records[-4:] for entry in content["seeds"]):
        entry |= {"tta": "flip+translate", "test_top1_tta": entry["test_top1"] + 0.01}
    records += [made_up(f"03_ladder_{i:02}", 0.84 + 0.005 * (i % 8), seeds=3) for i in range(12)]
    records += [made_up("03_fast_twin", 0.93), made_up("03_fast_plain_twin", 0.93)]
    for content in records[-2:]:
        content["seeds"][0] |= {"tta": "flip+translate", "test_top1_tta": 0.94, "val_top1_tta": 0.94}
    records += [made_up(f"03_half_{part}", 0.92) for part in ("as_fast", "cutout")]
    return {content["name"]: content for content in records}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A copy of what is committed, with two records alone and what is made of them."""
    root = tmp_path_factory.mktemp("small")
    for folder in ("report", "notebooks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs"))
    for file in ("README.md", "my_utils.py"):
        shutil.copy(ROOT / file, root)
    for path in (root / "report" / "figures").iterdir():
        path.unlink()
    write(root, {"01_baseline": BASELINE, "02_basic": made_up("02_basic", 0.781)})
    documents.build(root)
    return root


@pytest.fixture
def project(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "project"))


def write(project, records):
    """Replace the project's records."""
    for path in (project / "report" / "results").glob("*.json"):
        path.unlink()
    for name, content in records.items():
        (project / "report" / "results" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return records


def read(pdf):
    """The text of a PDF, with single blanks, and its number of pages."""
    pages = PdfReader(io.BytesIO(pdf)).pages
    text = " ".join(page.extract_text() for page in pages)
    return re.sub(r"\s+", " ", text.replace("\N{NO-BREAK SPACE}", " ")), len(pages)


# --- What is committed ---


def test_what_is_committed_fits_the_committed_records(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_what_ships_is_what_the_records_say():
    seeds = [entry for path in ROOT.glob("report/results/*.json") for entry in json.loads(path.read_text())["seeds"]]
    shipped = {entry["weights"]: entry["fingerprint"] for entry in seeds if "weights" in entry}
    files = sorted((ROOT / "report" / "runs").glob("*"))
    assert {path.name: load_run(path)["fingerprint"] for path in files} == shipped != {}
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_two_builds_are_the_same_to_the_byte_and_times_and_layout_do_not_matter(project):
    written = documents.build(project)
    assert {path.name for path in written} >= {"report.pdf", "README.md", "accuracy_cost.png"}
    first = [path.read_bytes() for path in written]
    (project / RESULT).write_text(json.dumps(json.loads((project / RESULT).read_text())))
    for path in filter(Path.is_file, project.rglob("*")):
        os.utime(path, (0, 0))
    assert documents.check(project) == []
    assert documents.build(project) == written
    assert [path.read_bytes() for path in written] == first


# --- The check ---


def add_record(project):
    (project / "report/results/03_new.json").write_text(json.dumps(made_up("03_new", 0.9)))


def draw(project, name="01_baseline_val", size=(20, 10), **metadata):
    """Write a figure as a notebook does."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value)
    Image.new("RGB", size).save(project / f"report/figures/{name}.png", pnginfo=info)


def weights_figure(fingerprints):
    return partial(draw, name="01_weights", Description="Weights", Fingerprints=fingerprints)


def edit(path, old, new):
    def change(project):
        text = (project / path).read_text(encoding="utf-8")
        assert old in text
        (project / path).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


NOTEBOOK, RECORDED = "notebooks/03_advanced_training.ipynb", BASELINE["seeds"][0]["fingerprint"]
DRAWN = ["01_baseline_val.png", "01_baseline_confusion.png", "accuracy_cost.png"]
CHANGES = [
    (edit(RESULT, f"{BASELINE['seeds'][0]['test_top1']}", "0.6985"), [*DRAWN, "report.pdf", "README.md"]),
    (add_record, ["accuracy_cost.png", "report.pdf", "README.md"]),
    (lambda project: (project / RESULT).unlink(), [*DRAWN, "report.pdf", "README.md"]),
    (draw, ["01_baseline_val.png", "report.pdf"]),
    (weights_figure(RECORDED), ["report.pdf"]),
    (weights_figure(f"{RECORDED} 0123456789abcdef"), ["01_weights.png", "report.pdf"]),
    (weights_figure(""), ["01_weights.png", "report.pdf"]),
    (lambda project: (project / "report/report.pdf").unlink(), ["report.pdf"]),
    (edit("report/report.typ", "= The question", "= Question"), ["report.pdf"]),
    (edit("report/published.json", "0.29", "0.3"), ["accuracy_cost.png", "report.pdf"]),
    (edit("README.md", "| 0.084 |", "| 281,341 |"), ["README.md"]),
    (edit(NOTEBOOK, 'REPOSITORY = \\"\\"', 'REPOSITORY = \\"https://a\\"'), ["03_advanced_training.ipynb"]),
    (edit(RESULT, '"epochs": 10', '"epochs": "ten"'), ["01_baseline.json"]),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=lambda value: "" if callable(value) else "+".join(value))
def test_the_check_lists_what_does_not_fit(project, change, named):
    change(project)
    assert [Path(line.split(":")[0]).name for line in documents.check(project)] == named


# --- Records that cannot be used ---


def broken(change):
    content = copy.deepcopy(BASELINE)
    change(content)
    return json.dumps(content)


FAULTY = [
    (json.dumps(BASELINE)[:2000], ""),
    (broken(lambda r: r.pop("parameters")), "parameters"),
    (broken(lambda r: r["seeds"][0]["history"].pop("val_top1")), r"seeds\[0\].history.*val_top1"),
    (broken(lambda r: r["seeds"][2].update(test_top1=71.4)), r"seeds\[2\].test_top1.*71.4"),
    (broken(lambda r: r["seeds"][0].update(test_top1=float("nan"))), "NaN"),
    (broken(lambda r: r["seeds"][0]["history"]["val_top1"].pop()), r"seeds\[0\].history.val_top1.*9 "),
    (broken(lambda r: r["seeds"][1].update(seed=0)), "seeds.*0, 0, 2"),
    (broken(lambda r: r.update(name="other")), "name.*other"),
    (broken(lambda r: r.update(data="synthetic")), "data"),
]


@pytest.mark.parametrize(("text", "says"), FAULTY)
def test_a_faulty_record_is_named_with_its_key(project, text, says, capsys):
    (project / RESULT).write_text(text)
    with pytest.raises(documents.RecordError, match=rf"^01_baseline\.json: .*{says}"):
        documents.build(project)
    assert len(documents.check(project)) == 1


def test_a_record_must_not_contradict_what_was_published(project):
    write(project, {"02_s0": made_up("02_s0", 0.9, published=(0.93, 65))})
    with pytest.raises(documents.RecordError, match=r"02_s0\.json: published_top1"):
        documents.build(project)


# --- The report ---


def test_the_report_without_records(project):
    records = write(project, {})
    documents.build_figures(project, records)
    assert {path.stem for path in project.glob("report/figures/*.png")} & documents.PLOTS.keys() == {"accuracy_cost"}
    text, pages = read(documents.compile_report(project, records))
    assert 4 <= pages <= 6 and text.count("not run") > 30
    # Every decimal number is one that others published: none of ours was typed.
    numbers = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", text.split("References")[0]))
    systems, speed = PUBLISHED["systems"], PUBLISHED["speed_records"]
    facts = {f"{100 * entry['top1']:.2f}" for entry in systems + speed if entry["top1"]}
    assert numbers == facts | {f"{entry['pflop']}" for entry in speed}


# Figures that need weights, and about how large they are.
FROM_NOTEBOOKS = {"02_gates": (700, 450), "03_ladder": (704, 880), "03_reliability": (858, 440)}
FROM_NOTEBOOKS |= {"02_study": (704, 726), "03_confusion": (825, 715), "03_damage": (825, 682)}
FROM_NOTEBOOKS["03_mistakes"] = (638, 478)


def test_the_complete_report(project):
    records = write(project, complete())
    assert documents.read_records(project / "report" / "results").keys() == records.keys()
    documents.build_figures(project, records)
    for name in documents.PLOTS:
        assert documents.describe(project / f"report/figures/{name}.png") == documents.PLOTS[name].alt
    for name, size in FROM_NOTEBOOKS.items():
        draw(project, name, size, Description="Weights")
    text, pages = read(documents.compile_report(project, records))
    assert 4 <= pages <= 6 and "not run" not in text
    for name, content in ((name, content) for name, content in records.items() if "_long_" not in name):
        part = re.search("_ablation_|_half_|_ladder_", name)
        top1 = percent([entry["val_top1" if part else "test_top1"] for entry in content["seeds"]])
        assert top1 in text, name
        assert f"{content['parameters']:,}" in text
    # Compared are: 93 % against 92 %, experts seed by seed, the fast model, and the steps of the ladder and the arms.
    for number in ("30 epochs against 65", "−0.17 ± 0.00", "94.25 ± 0.13", "−0.30 ± 0.00", "−0.60 ± 0.00"):
        assert number in text
    # Rung 8 falls back to the start; rung 9 is compared with rung 7, the last one kept, and not with rung 8.
    assert "−3.50 (0.17)" in text and "−3.00 (0.17)" in text  # a step and its standard error


@pytest.mark.parametrize("few", [True, False])
def test_any_subset_of_the_records_makes_a_report(project, few):
    names = sorted(everything := complete())
    kept = names[3::6] if few else [name for name in names if names.index(name) % 6 != 2]
    records = write(project, {name: everything[name] for name in kept} | {"05_other": made_up("05_other", 0.5123)})
    documents.build_figures(project, records)
    text, pages = read(documents.compile_report(project, records))
    assert 4 <= pages <= 6 and "not run" in text and "51.23" in text


# --- README ---


def test_the_results_table_shows_headline_records_with_links(project):
    records = write(project, complete())
    headline, _, _, _, *rows = documents.results_markdown(records, {"02_s0": "S0"}).splitlines()
    assert not [number for number in ("94.25 ± 0.13", "−0.90 ± 0.00", "−0.60 ± 0.00") if number not in headline]
    links = [re.match(r"\| \[(.+?)\]\(report/results/(\w+)\.json\) \|", row).groups() for row in rows]
    shown = [name for _, name in links]
    assert all(title == {"02_s0": "S0"}.get(name, name) for title, name in links)
    assert shown == [name for name in records if not re.search("_ablation_|_half_|_ladder_|_long_|_twin$", name)]
    assert "| 71.13 ± 0.13 |" in rows[0]


ADDRESS = "https://github.com/someone/experts"


def test_the_address_is_set_everywhere_and_can_be_set_again(project):
    before = {path: path.read_bytes() for path in (project / "notebooks").glob("*.ipynb")}
    documents.set_address(project, "https://github.com/another/fork")
    written = documents.set_address(project, ADDRESS)
    assert documents.check(project) == []
    start = "https://colab.research.google.com/github/someone/experts/blob/main/"
    readme = (project / "README.md").read_text(encoding="utf-8")
    badges = dict(re.findall(r"\[!\[Open (\w+) in Colab\]\(\S+\)\]\((\S+)\)", readme))
    assert list(badges) == [path.stem for path in sorted(before)]
    assert f"url = {{{ADDRESS}}}" in readme
    for name, link in badges.items():
        path = project / link.removeprefix(start)
        assert path in written and path.stem == name
        text = path.read_text(encoding="utf-8")
        assert text.count(link) == 1 and f'REPOSITORY = \\"{ADDRESS}\\"' in text
    assert not [path for path in written if "another/fork" in path.read_text(encoding="utf-8")]
    for page in build_site(project, stored=True):
        assert page.name == "index.html" or f"Open {page.stem} in Colab" in page.read_text(encoding="utf-8")
    documents.set_address(project, "")
    assert {path: path.read_bytes() for path in before} == before
    assert "colab-badge" not in (project / "README.md").read_text(encoding="utf-8")


def test_an_address_is_that_of_origin_or_one_on_github(tmp_path):
    git = ["git", "-C", tmp_path]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for text in ("", "https://gitlab.com/a/b", "https://github.com/a", "a/b", 'https://github.com/a/b"'):
        with pytest.raises(ValueError, match=text or "nothing"):
            address.github_address(tmp_path, text)
    subprocess.run([*git, "remote", "add", "origin", f"{ADDRESS}.git"], check=True)
    for text in ("", f"{ADDRESS}/", "git@github.com:someone/experts.git"):
        assert address.github_address(tmp_path, text) == ADDRESS


def test_one_command_sets_the_address_of_a_clone(project):
    git = ["git", "-C", project, "-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run([*git, "remote", "add", "origin", f"{ADDRESS}.git"], check=True)
    result = subprocess.run([sys.executable, project / "report/build.py", "--address"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    changed = subprocess.run([*git, "diff", "--stat"], capture_output=True, text=True).stdout
    assert "4 files changed" in changed and documents.check(project) == []  # README and notebooks
