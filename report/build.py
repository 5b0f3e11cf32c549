"""Run the notebooks and show what they reached; or, without running any, build the report.

Every notebook runs from top to bottom in a fresh kernel, at the run size that the environment
variable RUN_SIZE asks for. What happened is kept in build/, as <name>.ipynb and as a page to
read, <name>.html; build/index.html leads to all pages. The accuracies at the end come from the
records that the notebooks wrote meanwhile; a last table compares what was evaluated anew with the
committed records. The exit status is 1 if a notebook failed or a comparison did not agree, and 130
after Ctrl-C.

--report, --check, --pages and --address run no notebook. The first two need the committed records alone.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pandas as pd
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from pages import build_site

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"
RUNS = Path(os.environ.get("RUNS_DIR") or ROOT / "runs").expanduser()
RESULTS = (RUNS.parent / "build" / "results", ROOT / "report" / "results")

TERMINAL_PAUSE, FILE_PAUSE = 0.5, 10.0  # least seconds between two lines of progress
HEARTBEAT = 15.0  # seconds of silence after which a running cell is said to be alive


def duration(seconds: float) -> str:
    """A duration for people: 3.2 s, 45 s, 2.5 min, 11 h."""
    unit, length = next((u, n) for u, n in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= n)
    value = seconds / (length or 1)
    return f"{value:.{0 if value >= 9.95 else 1}f} {unit}"


class CellLine:
    """The line about a running cell: rewritten in place on a terminal, repeated now and then in a file."""

    def __init__(self, label: str):
        self.label, self.news = label, ""
        self.start = self.shown = time.monotonic()
        self.in_place = sys.stdout.isatty()
        if self.in_place:
            self.show("")

    def show(self, text: str, last: bool = False) -> None:
        """Print the label and `text`; what follows the `last` text of a cell begins on a new line."""
        line, self.shown = f"{self.label} ... {text}", time.monotonic()
        if self.in_place:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + (line if last else line[:width]).ljust(width), end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)

    def end(self, outcome: str = "") -> None:
        """Print how the cell ended and how long it took."""
        self.show(outcome + duration(time.monotonic() - self.start), last=True)

    async def follow(self) -> None:
        """Show the cell's news as they come and, after a silence, that it is still running; until cancelled."""
        while True:
            await asyncio.sleep(TERMINAL_PAUSE / 2)
            now = time.monotonic()
            if self.news and now - self.shown >= (TERMINAL_PAUSE if self.in_place else FILE_PAUSE):
                self.show(f"{duration(now - self.start)}: {self.news}")
                self.news = ""
            elif now - self.shown >= HEARTBEAT:
                self.show(f"still running, {duration(now - self.start)}")


def interrupted() -> bool:
    """Whether Ctrl-C was pressed: asyncio then cancels the running task."""
    return asyncio.current_task().cancelling() > 0


class Client(NotebookClient):
    """A notebook client that reports on each cell while it runs."""

    async def run_cell(self, index: int, label: str) -> None:
        """Execute cell `index`. Raises `CellExecutionError` if it fails, `DeadKernelError` if its kernel dies."""
        self.line = CellLine(label)
        follower = asyncio.create_task(self.line.follow())
        outcome = "stopped after "
        try:
            await self.async_execute_cell(self.nb.cells[index], index)
            outcome = ""
        except DeadKernelError:
            if interrupted():  # which nbclient takes for a dead kernel
                raise asyncio.CancelledError from None
            raise
        finally:
            follower.cancel()
            self.line.end(outcome)

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """Note the newest line that the cell prints or displays, then process the message as usual."""
        content = msg["content"]
        text = content.get("text") or content.get("data", {}).get("text/plain", "")
        lines = [line.strip() for line in re.split(r"[\r\n]", strip_ansi(text)) if line.strip()]
        if lines and not lines[-1].startswith("<"):  # "<Figure size ...>" stands for a picture
            self.line.news = lines[-1]
        return super().process_message(msg, cell, cell_index)


async def execute(notebook: NotebookNode, name: str) -> bool:
    """Execute `notebook` in place, to its end or its first error, which is printed. Returns whether it ran through."""
    heading, headings = "start", {}  # of each code cell: the nearest heading above it
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ +(.+)", cell.source, re.MULTILINE) or [heading])[-1]
        elif cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # the page shows nothing of an earlier run
            if cell.source.strip():
                headings[index] = heading

    # With no folders to search, the kernel is this very Python, whatever else is installed under the name "python3".
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = Client(notebook, km=manager, coalesce_streams=True, extra_arguments=["--log-level=ERROR"])
    try:
        await client.async_start_new_kernel(cwd=str(NOTEBOOKS))
        await client.async_start_new_kernel_client()
        for number, (index, heading) in enumerate(headings.items(), start=1):
            try:
                await client.run_cell(index, f"[{name}] cell {number}/{len(headings)} ({heading})")
            except (CellExecutionError, DeadKernelError) as error:
                print(f"[{name}] FAILED in cell {number}:\n\n{describe(error, notebook.cells[index])}\n")
                return False
        client.set_widgets_metadata()
        return True
    finally:
        await manager.shutdown_kernel(now=interrupted())
        if client.kc:
            client.kc.stop_channels()


def describe(error: CellExecutionError | DeadKernelError, cell: NotebookNode) -> str:
    """The first lines of the `cell` that failed, the end of the traceback and the error, without colours."""
    source = cell.source.strip().splitlines()
    lines = source[:4] + ["..."] * (len(source) > 4) + [""]
    if isinstance(error, CellExecutionError):
        *frames, _ = next(output.traceback for output in cell.outputs if output.output_type == "error")
        lines += [*"\n".join(frames).splitlines()[-12:], "", f"{error.ename}: {error.evalue}"]
    else:
        lines += [f"{error} (out of memory?)"]
    return textwrap.indent(strip_ansi("\n".join(lines)), "    ")


def run_notebook(path: Path) -> bool:
    """Execute the notebook at `path` and save what was executed in `BUILD`. Returns whether it ran through."""
    notebook = nbformat.read(path, as_version=4)
    try:
        return asyncio.run(execute(notebook, path.stem))
    finally:
        BUILD.mkdir(exist_ok=True)
        nbformat.write(notebook, BUILD / path.name)


def written_since(since: float) -> dict[str, dict]:
    """The records, by name, that were written after the time `since`, in seconds since the epoch."""
    paths = [path for folder in RESULTS for path in sorted(folder.glob("*.json")) if path.stat().st_mtime >= since]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def results_table(records: dict[str, dict]) -> str:
    """The accuracies in some records."""
    rows = []
    for record in records.values():
        seeds = pd.DataFrame(record["seeds"])
        test = f"{seeds.test_top1.mean():.2%} "
        if len(seeds) > 1:
            test += f"± {seeds.test_top1.std():.2%}"
        else:
            test += "[{:.2%}, {:.2%}]".format(*seeds.test_top1_interval[0])
        row = {"name": record["name"], "data": record["data"], "run size": record["run_size"]}
        row |= {"epochs": record["epochs"], "seeds": len(seeds)}
        row["val top-1"] = "-" if seeds.val_top1.isna().any() else f"{seeds.val_top1.mean():.2%}"
        rows.append(row | {"test top-1": test})
    if not rows:
        return "No accuracies were recorded during this run."
    note = "test top-1: mean ± standard deviation over the seeds, or of one seed with its 95 % interval"
    if any(row["data"] == "synthetic" for row in rows):
        note += "\nSynthetic data only show that everything works: their accuracies say nothing about CIFAR-10."
    return f"Accuracies recorded during this run:\n\n{pd.DataFrame(rows).to_string(index=False)}\n\n{note}"


def replayed_table(records: dict[str, dict]) -> tuple[str, bool]:
    """What networks that ship with the series reached just now, beside their committed records; and whether all agree.

    On another processor the last digits differ, so up to 3 of 10,000 images may be classified otherwise.
    """
    rows = []
    for name, record in records.items():
        committed = RESULTS[1] / f"{name}.json"
        shipped = json.loads(committed.read_text(encoding="utf-8"))["seeds"] if committed.exists() else []
        shipped = {entry["fingerprint"]: entry for entry in shipped if "weights" in entry}
        for entry in record["seeds"]:
            if entry["fingerprint"] in shipped:
                before = shipped[entry["fingerprint"]]["test_top1"]
                images = round(10_000 * abs(entry["test_top1"] - before))
                row = {
                    "network": name,
                    "seed": entry["seed"],
                    "now": f"{entry['test_top1']:.2%}",
                    "record": f"{before:.2%}",
                }
                rows.append(row | {"agree": "yes" if images <= 3 else f"NO, {images} images differ"})
    if not rows:
        return "", True
    table = pd.DataFrame(rows).to_string(index=False)
    agree = all(row["agree"] == "yes" for row in rows)
    return f"Networks that ship with the series, evaluated just now on this machine (test top-1):\n\n{table}\n\n", agree


def build_or_check_report(check: bool) -> int:
    """Build, or only check, what is made of the committed records. Returns the exit status."""
    import documents  # here, because it loads torch, which running notebooks does not need

    try:
        lines = documents.check(ROOT) if check else documents.build(ROOT)
    except documents.RecordError as error:
        print(error, file=sys.stderr)
        return 1
    if check and not lines:
        print("Report, figures and README fit the committed records.")
    print(*lines, sep="\n")
    if check and lines:
        print("\nTo build them anew: python report/build.py --report")
    return 1 if check and lines else 0


def set_address(text: str) -> int:
    """Write the address of the series on GitHub wherever it belongs. Returns the exit status."""
    import address
    import documents

    try:
        place = address.github_address(ROOT, text)
        print(f"The series is at {place}. Changed:", *documents.set_address(ROOT, place), sep="\n")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks that the command line `arguments` name, all by default. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NOTEBOOK", help="how its name begins, such as 01; default: all")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--report", action="store_true", help="build report.pdf, its figures and the README's tables")
    mode.add_argument("--check", action="store_true", help="fail with a list if one of them does not fit the records")
    mode.add_argument("--pages", action="store_true", help="build the pages with the notebooks' stored outputs")
    mode.add_argument(
        "--address", nargs="?", const="", help="set the address on GitHub, for Colab's badges; default: that of origin"
    )
    options = parser.parse_args(arguments)
    names = options.names
    if names and (options.report or options.check or options.pages or options.address is not None):
        parser.error("a NOTEBOOK can be named only to be run")
    if options.report or options.check:
        return build_or_check_report(options.check)
    if options.address is not None:
        return set_address(options.address)
    if options.pages:
        print(*build_site(ROOT, stored=True), sep="\n")
        return 0
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    for name in names or [""]:
        if not any(path.name.startswith(name) for path in paths):
            parser.error(f"no notebook {name}* in {NOTEBOOKS}")
    paths = [path for path in paths if path.name.startswith(tuple(names) or "")]

    sys.stdout.reconfigure(errors="replace")  # a heading may hold what a terminal cannot show
    started = time.time()
    try:
        failed = [path.stem for path in paths if not run_notebook(path)]
    except KeyboardInterrupt:
        build_site(ROOT)
        print(f"\nInterrupted. What was executed is in {BUILD}")
        return 130
    index = build_site(ROOT)[0]
    records = written_since(started)
    replayed, agree = replayed_table(records)
    print(f"\n{results_table(records)}\n\n{replayed}Pages to read: {index}")
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
    return 0 if agree and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
