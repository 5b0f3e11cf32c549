"""The report, its figures and the README's tables: built from the committed records, and checked against them.

Nothing here trains or opens weights. Each product carries the digest of what it was built from (a figure and the
report in their metadata; the README's text is simply compared), so that `check` tells when a record has changed since.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import address
import jsonschema
import numpy as np
import pandas as pd
import seaborn as sns
import typst
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from pypdf import PdfReader
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import my_utils as utils

baseline = utils.models_of("01_baseline")
Records = Mapping[str, dict]

# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


class RecordError(ValueError):
    """Records that cannot be used; the message has a line for each fault, with file and key."""


def _object(**properties: dict) -> dict:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: dict, **more) -> dict:
    return {"type": "array", "items": items, **more}


TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number", "minimum": 0}, {"type": "integer", "minimum": 0}
FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
HISTORY = _object(
    step_loss=_list(NUMBER),
    step_learning_rate=_list(NUMBER),
    train_loss=_list(NUMBER),
    train_top1=_list(FRACTION),
    val_loss=_list(NUMBER),
    val_top1=_list(FRACTION),
    test_top1=_list(FRACTION),
    seconds=_list(NUMBER),
    probe=_list({"type": "object", "additionalProperties": {"type": "number"}}),
)
SEED = _object(
    seed=COUNT,
    fingerprint=TEXT,
    device=TEXT,
    versions=_object(python=TEXT, torch=TEXT),
    val_top1={"anyOf": [FRACTION, {"type": "null"}]},
    test_top1=FRACTION,
    test_top1_interval=_list(FRACTION, minItems=2, maxItems=2),
    test_nll=NUMBER,
    test_ece=FRACTION,
    test_confusion=_list(_list(COUNT, minItems=10, maxItems=10), minItems=10, maxItems=10),
    train_seconds=NUMBER,
    history=HISTORY,
)
RECORD = _object(
    name=TEXT,
    notebook=TEXT,
    system={"enum": [None, "S0", "S1", "S2", "S3", "S4"]},
    data={"const": "cifar10"},
    run_size={"const": "full"},
    parameters=COUNT,
    train_flops={"type": "number", "exclusiveMinimum": 0},
    epochs={"type": "integer", "minimum": 1},
    recipe=_object(
        batch_size=COUNT,
        optimizer=TEXT,
        overrides={"type": "object"},
        learning_rate=NUMBER,
        schedule=TEXT,
        label_smoothing=FRACTION,
        augmentation={"type": "object"},
    ),
    published_top1={"anyOf": [FRACTION, {"type": "null"}]},
    published_epochs={"anyOf": [COUNT, {"type": "null"}]},
    seeds=_list(SEED, minItems=1),
)


def read_records(folder: Path) -> dict[str, dict]:
    """Return the records in a folder by name, in order.

    Raises:
        RecordError: a record is cut off, lacks a key, has a value of another type or an accuracy outside 0 .. 1, is
            not of a full run on CIFAR-10, or contradicts itself.
    """
    records, faults = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        except ValueError as error:
            faults.append(f"{path.name}: not a whole JSON file: {error}")
            continue
        errors = sorted(jsonschema.Draft202012Validator(RECORD).iter_errors(content), key=lambda e: e.json_path)
        found = [f"{e.json_path.removeprefix('$').removeprefix('.')}: {e.message:.200}" for e in errors]
        faults += [f"{path.name}: {fault.removeprefix(': ')}" for fault in found or _contradictions(content, path.stem)]
        records[path.stem] = content
    if faults:
        raise RecordError("\n".join(faults))
    return records


def _refuse(constant: str):
    raise ValueError(f"{constant} is not a number")


def _contradictions(content: dict, name: str) -> list[str]:
    """What no single value of a record shows: its name, seeds that occur twice, curves of another length."""
    faults = [] if content["name"] == name else [f"name: {content['name']!r} is not the name of the file"]
    seeds = [entry["seed"] for entry in content["seeds"]]
    if len(set(seeds)) < len(seeds):
        faults.append(f"seeds: a seed occurs twice in {seeds}")
    for index, entry in enumerate(content["seeds"]):
        for curve, values in entry["history"].items():
            if not curve.startswith("step_") and len(values) not in (0, content["epochs"]):
                faults.append(
                    f"seeds[{index}].history.{curve}: {len(values)} values, but epochs is {content['epochs']}"
                )
    return faults


def read_published(report: Path) -> dict:
    """Return what others published, the five systems and the speed records, and the titles of our own records."""
    published, titles = (json.loads((report / f"{name}.json").read_text("utf-8")) for name in ("published", "titles"))
    return published | {"titles": titles}


def digest(content) -> str:
    """Return a hash of anything JSON can hold; how a file was formatted does not change it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """A figure made of records alone: which ones it uses, how it is drawn, and what it shows, in words.

    Without any record that it uses there is no such figure, unless it is drawn `always`.
    """

    uses: str  # a regular expression that fits the whole name of a record
    draw: Callable[[Records, dict], Figure]
    alt: str
    always: bool = False


def _small(figure: Figure) -> Figure:
    figure.set_size_inches(6, 3.8)  # readable at half the width of the report
    return figure


def plot_baseline(records: Records, _) -> Figure:
    """Return the baseline's validation curve, as notebook 01 draws it."""
    return _small(baseline.plot_curves({"baseline": records["01_baseline"]}, "val_top1", "Validation, baseline"))


def plot_baseline_confusion(records: Records, _) -> Figure:
    """Return the confusion matrix of the baseline's first seed."""
    seed = records["01_baseline"]["seeds"][0]
    title = f"Baseline, test split, seed {seed['seed']}"
    return baseline.plot_confusion(seed["test_confusion"], utils.CIFAR10_CLASSES, title)


def plot_networks(records: Records, _) -> Figure:
    """Return the validation curves of the networks that were trained with the common recipe."""
    labels = {"basic network" if name == "02_basic" else name[3:].upper(): r for name, r in records.items()}
    return _small(baseline.plot_curves(labels, "val_top1", "Six networks, one recipe"))


def plot_entropy(records: Records, _) -> Figure:
    """Return how evenly gates use their experts, per block, over the epochs of the first seed; a panel per network."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, (name, content) in zip(panels, records.items(), strict=True):
        seed = content["seeds"][0]
        entropy = pd.DataFrame(seed["history"]["probe"])
        entropy.index += 1
        if not entropy.empty:
            sns.lineplot(entropy, ax=axes, marker="o", palette="colorblind")
        title = f"{name.removeprefix('02_').upper()}, seed {seed['seed']}"
        axes.set(xlabel="epoch", ylabel="entropy of the gate / ln K", ylim=(0, 1.05), title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_cost(records: Records, published: dict) -> Figure:
    """Return test accuracy against training cost, with the speed records as anchors."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(("01", "02", "03"), sns.color_palette("colorblind", 3), strict=True))
    labels = {"01": "notebook 01: baseline", "02": "notebook 02: blocks", "03": "notebook 03: training"}
    labels["tta"] = "with test-time augmentation, as the stars"
    left, right, high = {"xytext": (-9, -4), "ha": "right"}, {"xytext": (9, -4)}, {"xytext": (0, 8), "ha": "center"}
    crowded = {"03_fast": left, "03_fast_plain": right, "02_s3": high, "02_s2": right}
    for name, content in records.items():
        top1 = [100 * entry["test_top1"] for entry in content["seeds"]]
        error = np.std(top1, ddof=1) if len(top1) > 1 else None
        pflop, colour = content["train_flops"] / 1e15, colours.get(name[:2], "0.3")
        label = labels.pop(name[:2], None)
        axes.errorbar(pflop, np.mean(top1), error, fmt="o", color=colour, capsize=3, label=label)
        twice = all("test_top1_tta" in entry for entry in content["seeds"])  # two points, the label below them
        centred = {"xytext": (0, -17 if twice else 7), "ha": "center"}
        place = crowded.get(name, centred if name.startswith("03") else {"xytext": (6, -11)})
        title = published["titles"].get(name, name)
        axes.annotate(title, (pflop, np.mean(top1)), **place, textcoords="offset points", fontsize="small")
        if twice:
            better = 100 * np.mean([entry["test_top1_tta"] for entry in content["seeds"]])
            axes.plot(pflop, better, "o", color=colour, fillstyle="none", label=labels.pop("tta", None))
    speed = published["speed_records"]
    cost, top1 = [entry["pflop"] for entry in speed], [100 * entry["top1"] for entry in speed]
    axes.plot(cost, top1, "k*--", ms=11, linewidth=0.8, label="speed records (airbench)")
    for entry, place in zip(speed, zip(cost, top1, strict=True), strict=True):
        axes.annotate(entry["name"], place, xytext=(0, 9), textcoords="offset points", fontsize="small", ha="center")
    axes.set(xscale="log", xlabel="training cost (PFLOP)", ylabel="test accuracy (%)")
    axes.set_title("Test accuracy against training cost; bars: standard deviation over seeds")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.12)
    axes.legend(loc="lower right")
    return figure


PARTS = "_(ablation|half|ladder|long|recipe)_|_twin$"  # records that are not a network's main result
PLOTS = {
    "01_baseline_val": Plot("01_baseline", plot_baseline, "Validation accuracy of the baseline rises over the epochs"),
    "01_baseline_confusion": Plot(
        "01_baseline", plot_baseline_confusion, "Heat map of true against predicted class, in per cent"
    ),
    "02_networks": Plot(
        "02_(basic|s[0-4])", plot_networks, "Validation accuracy over the epochs, one line per network, one recipe"
    ),
    "02_entropy": Plot("02_s[14]", plot_entropy, "Normalised entropy of each gate of S1 and S4 over the epochs"),
    "accuracy_cost": Plot(
        f"(?!.*({PARTS}|_published$|03_s[0-9])).*",  # without the authors' recipes
        plot_cost,
        "Test accuracy against training cost on a logarithmic axis: our networks, and airbench's speed records",
        always=True,
    ),
}


def _used(plot: Plot, records: Records) -> dict[str, dict]:
    return {name: content for name, content in records.items() if re.fullmatch(plot.uses, name)}


def _figure_digest(plot: Plot, records: Records, published: dict) -> str:
    used = _used(plot, records)
    return digest([used, published["speed_records"], published["titles"]] if plot.always else used)


def build_figures(root: Path, records: Records) -> None:
    """Draw every figure that records alone can give into report/figures/; delete those whose records are gone."""
    published = read_published(root / "report")
    folder = root / "report" / "figures"
    folder.mkdir(exist_ok=True)
    for name, plot in PLOTS.items():
        used, path = _used(plot, records), folder / f"{name}.png"
        if used or plot.always:
            metadata = {"Description": plot.alt, "Records": _figure_digest(plot, records, published)}
            plot.draw(used, published).savefig(path, dpi=140, metadata=metadata)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def _figures(report: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted((report / "figures").glob("*.png"))}


def _report_digest(report: Path, records: Records) -> str:
    texts = [(report / name).read_text(encoding="utf-8") for name in ("report.typ", "references.bib", "titles.json")]
    images = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in _figures(report).items()}
    return digest([records, read_published(report), texts, images])


def compile_report(root: Path, records: Records) -> bytes:
    """Return the report as PDF. With the same version of typst, the same input gives the same bytes."""
    report = root / "report"
    published = read_published(report)
    for system in published["systems"]:
        for name in system["ours"].keys() & records.keys():
            stated = records[name]["published_top1"], records[name]["published_epochs"]
            if stated != (None, None) and stated != (system["top1"], system["epochs"]):
                raise RecordError(f"{name}.json: published_top1, published_epochs: {stated}, unlike published.json")
    inputs = {
        "records": json.dumps(list(records)),
        "figures": json.dumps({name: describe(path) for name, path in _figures(report).items()}),
        "validation": "5000",
        "t": json.dumps([stats.t.ppf(0.975, freedom) for freedom in range(1, 100)]),  # Student's, for 95 % intervals
        "digest": _report_digest(report, records),
    }
    return typst.compile(
        str(report / "report.typ"),
        root=str(report),
        ignore_system_fonts=True,
        sys_inputs=inputs,
        pdf_standards=["ua-1"],
    )


def describe(path: Path) -> str:
    """Return what a figure shows, in words, from its metadata."""
    with Image.open(path) as image:
        if not image.info.get("Description"):
            raise ValueError(f"{path.name} has no alternative text in its metadata (Description)")
        return image.info["Description"]


# ---------------------------------------------------------------------------------------------------------------------
# README
# ---------------------------------------------------------------------------------------------------------------------


def headline_markdown(records: Records) -> str:
    """Return the results of the series in a line: accuracy and cost of the final models, and what experts add."""
    parts = []
    for name in ("03_fast", "03_strong"):
        top1 = [entry.get("test_top1_tta") for entry in records.get(name, {"seeds": []})["seeds"]]
        if top1 and None not in top1:
            cost = f"{records[name]['train_flops'] / 1e15:.2f} PFLOP"
            parts.append(f"*{name[3:]}* **{utils.percent(top1)} %** for {cost}")
    lines = [f"Test accuracy with TTA: {', '.join(parts)}."] if parts else []
    study = {
        name.removeprefix("02_ablation_"): {entry["seed"]: 100 * entry["val_top1"] for entry in content["seeds"]}
        for name, content in records.items()
        if name.startswith("02_ablation_")
    }
    controls = {"FLOPs": "plain_flops", "time": "plain_time", "parameters": "plain_parameters"}
    gates = {name: top1 for name, top1 in study.items() if not name.startswith(("plain", "uniform"))}
    if gates and set(controls.values()) <= study.keys():
        best = max(gates.values(), key=lambda top1: np.mean(list(top1.values())))
        gains = [f"{difference(best, study[control])} points at equal {what}" for what, control in controls.items()]
        lines.append(f"In notebook 02's study (validation, 95 % intervals), the best gate adds {', '.join(gains)}.")
    if {"03_fast_plain", "03_fast_experts"} <= records.keys():
        first, other = (
            {entry["seed"]: 100 * entry.get("test_top1_tta", np.nan) for entry in records[name]["seeds"]}
            for name in ("03_fast_experts", "03_fast_plain")
        )
        change = f"{difference(first, other)} points (95 % interval)"
        lines.append(f"In *fast* on every image, experts change the test accuracy with TTA by {change}.")
    return " ".join(lines) or "No training has been recorded yet."


def difference(first: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Return the mean of paired differences and half of its 95 % interval, from values by seed."""
    pairs = [first[seed] - other[seed] for seed in first.keys() & other.keys()]
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs) if len(pairs) > 1 else np.nan
    if not pairs:
        return "-"
    return f"{np.mean(pairs):+.2f} ± {half:.2f}".replace("-", "−")


def results_markdown(records: Records, titles: Mapping[str, str]) -> str:
    """Return the headline, and a table of the networks in Markdown; each title (or name) is a link to its record."""
    shown = {name: content for name, content in records.items() if not re.search(PARTS, name)}
    if not shown:
        return headline_markdown(records)
    table = baseline.results_table(shown).drop(columns=["val top-1 %", "parameters"])
    links = [f"[{titles.get(name, name)}](report/results/{name}.json)" for name in shown]
    table.insert(0, "network", links)
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    lines = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    return f"{headline_markdown(records)}\n\n{lines}"


def fill_readme(root: Path, records: Records) -> str:
    """Return the README with what stands between its markers made anew."""
    text = (root / "README.md").read_text(encoding="utf-8")
    place = address.read_address(root)
    titles = read_published(root / "report")["titles"]
    contents = {"results": results_markdown(records, titles), "colab": address.colab_markdown(root, place)}
    for name, content in (contents | {"citation": address.citation_markdown(place)}).items():
        start, end = f"<!-- {name}: written by report/build.py -->\n\n", f"\n\n<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have the lines {start.strip()!r} and {end.strip()!r} once each")
        before, rest = text.split(start)
        text = before + start + content + end + rest.split(end)[1]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


def build(root: Path) -> list[Path]:
    """Build figures, report and README tables from the committed records. Returns what it wrote."""
    records = read_records(root / "report" / "results")
    build_figures(root, records)
    pdf = root / "report" / "report.pdf"
    pdf.write_bytes(compile_report(root, records))
    readme = root / "README.md"
    readme.write_text(fill_readme(root, records), encoding="utf-8", newline="\n")
    return [*(path for name, path in _figures(root / "report").items() if name in PLOTS), pdf, readme]


def set_address(root: Path, place: str) -> list[Path]:
    """Write the address of the series on GitHub into the notebooks and the README. Returns what it wrote."""
    written = address.write_notebooks(root, place)
    readme = root / "README.md"
    text = fill_readme(root, read_records(root / "report" / "results"))
    readme.write_text(text, encoding="utf-8", newline="\n")
    return [*written, readme]


def check(root: Path) -> list[str]:
    """Return what does not fit the committed records, a line each. No line, all is up to date.

    Figures that need weights are written by the notebooks; each must name training runs that the records hold.
    """
    report = root / "report"
    try:
        records = read_records(report / "results")
    except RecordError as error:
        return str(error).splitlines()
    published, found, problems = read_published(report), _figures(report), []
    for name, plot in PLOTS.items():
        wanted = plot.always or _used(plot, records)
        if bool(wanted) != (name in found):
            problems.append(f"report/figures/{name}.png: " + ("missing" if wanted else "there is no record for it"))
        elif wanted:
            with Image.open(found[name]) as image:
                if image.info.get("Records") != _figure_digest(plot, records, published):
                    problems.append(f"report/figures/{name}.png: not built from the committed records")
    recorded = {entry["fingerprint"] for content in records.values() for entry in content["seeds"]}
    for name in sorted(found.keys() - PLOTS.keys()):
        with Image.open(found[name]) as image:
            shown = image.info.get("Fingerprints", "").split()
        if not shown or not recorded.issuperset(shown):
            problems.append(f"report/figures/{name}.png: shows training runs that are in no committed record")
    if not (report / "report.pdf").exists():
        problems.append("report/report.pdf: missing")
    elif PdfReader(report / "report.pdf").metadata.get("/Keywords") != _report_digest(report, records):
        problems.append("report/report.pdf: not built from the committed records, figures and text")
    if fill_readme(root, records) != (root / "README.md").read_text(encoding="utf-8"):
        problems.append("README.md: its tables, badges or citation do not fit the committed records")
    place = address.read_address(root)
    for path in address.notebooks(root):
        if address.fill_notebook(path, place) != json.loads(path.read_text(encoding="utf-8")):
            problems.append(f"notebooks/{path.name}: its REPOSITORY or badge is not that of notebook 1, {place!r}")
    return problems
