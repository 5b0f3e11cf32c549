"""Colab, as far as this machine can play it: its versions, its folder, its dialogs and its list of sessions."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = ROOT / "tests" / "colab"
HOST = f"127.{os.getpid() >> 14}.{os.getpid() >> 7 & 127}.{1 + (os.getpid() & 127)}"  # of this process alone
DATA = Path(os.environ.get("CIFAR10_ROOT") or ROOT / "data").expanduser() / "cifar-10-batches-py"
ARCHIVE = "/cifar-10-python.tar.gz"
PERSONAL = ("RUNS_DIR", "RECORD", "TRAIN", "CIFAR10_ROOT")
REPOSITORY, BRANCH = "https://github.com/someone/experts", "a/branch"
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
path, folder = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
try:
    NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()
finally:
    nbformat.write(notebook, path)
"""
REPLAYED = """
assert splits.source == "cifar10" and len(runs) == 3
for run, entry in zip(runs, result["seeds"]):
    assert run.recorded, "trained again"
    assert abs(entry["test_top1"] - run.recorded["test_top1"]) < 0.001, "not the record's accuracy"
"""


def session(notebook: str) -> str:
    """Return Colab's list of sessions while a notebook is open that came from GitHub."""
    file = f"fileId=https%3A//{REPOSITORY.removeprefix('https://')}/blob/{BRANCH}/notebooks/{notebook}.ipynb"
    kernel = {"id": "8f1c", "name": "python3", "execution_state": "busy", "connections": 1}
    entry = {"id": "51f6", "path": file, "name": f"{notebook}.ipynb", "type": "notebook", "kernel": kernel}
    return json.dumps([entry | {"notebook": {"path": file, "name": entry["name"]}}])


@contextlib.contextmanager
def listing(answer: str, status: int = 200, wait: float = 0, archive: bytes = b"") -> Iterator[None]:
    """Answer like this, after some seconds, to whoever asks for the list of sessions; serve an archive of the data."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(wait)
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # it did not wait for the answer
                self.wfile.write({"/api/sessions": answer.encode(), ARCHIVE: archive}.get(self.path, b""))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer((HOST, 9000), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def publish(folder: Path) -> Path:
    """Clone what is committed into a new folder, as GitHub shows it: with a branch, which is the default."""
    subprocess.run(["git", "clone", "--quiet", "-c", "uploadpack.allowFilter=true", ROOT, folder], check=True)
    subprocess.run(["git", "-C", folder, "checkout", "--quiet", "-B", BRANCH], check=True)
    return folder


def variables(python: str, public: Path, uploads: Path | None = None) -> dict[str, str]:
    """Return the environment variables of a Colab that runs this Python.

    The folder `public` stands for the repository on GitHub, and `uploads` holds the files that a student chooses.
    """
    path = [str(STAND_INS / "bin"), str(Path(python).parent), os.environ["PATH"]]
    kept = {name: value for name, value in os.environ.items() if name not in PERSONAL}
    return kept | {
        "COLAB_RELEASE_TAG": "release-colab",
        "RUN_SIZE": "smoke",
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(STAND_INS),
        "HOST": HOST,  # what the stand-in of `hostname` prints
        "UPLOADS": str(uploads or ""),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{public.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
        "GIT_TERMINAL_PROMPT": "0",
        "no_proxy": "*",
    }


def find_python() -> str:
    """Return a Python 3.13, as on Colab, or else the one that runs."""
    found = [shutil.which("python3.13"), *Path.home().glob(".pyenv/versions/3.13*/bin/python3.13")]
    for python in map(str, filter(None, found)):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return sys.executable


def install(folder: Path) -> str:
    """Return the Python of an environment with Colab's versions, which is made unless the folder has it already."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([find_python(), "-m", "venv", folder], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "--progress-bar=off", "-r", STAND_INS / "versions.txt"]
        subprocess.run(command, check=True)
    version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    print(f"Colab's packages on {version} (Colab has 3.13)", flush=True)
    return str(python)


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what a student should not see: errors, text in red, pictures without an alternative text."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {number}: {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number}, in red: {output.text.strip()}")
            for kind in output.get("data", {}):
                if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt", "").strip():
                    found.append(f"cell {number}: a picture without an alternative text")
    return found


def pack() -> bytes:
    """Return CIFAR-10 as an archive. The official one is compressed; this is made in a second."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=0) as archive:
        archive.add(DATA.resolve(), DATA.name)
    return packed.getvalue()


def run(path: Path, python: str, folder: Path, public: Path, way: str) -> bool:
    """Execute a notebook in a fresh Colab and return whether it ran without a fault.

    `way` is how the set-up cell finds the series: the notebook was "opened" from GitHub, "REPOSITORY" is set in it, or
    it asks for an "upload". In a "replay", notebook 01 was opened from GitHub, too; it runs in full size, and downloads
    CIFAR-10 from this machine.
    """
    folder /= way
    content = folder / path.stem
    (content / "sample_data").mkdir(parents=True)
    uploads, archive = None, pack() if way == "replay" else b""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if way == "REPOSITORY" and "setup" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace('REPOSITORY = ""', f'REPOSITORY = "{REPOSITORY}"')
        if way == "replay" and "setup" in cell.metadata.get("tags", []):
            cell.source += f"\nutils.CIFAR10_SOURCES = ['http://{HOST}:9000{ARCHIVE}']"
            cell.source += f"\nutils.DATA_SET.tgz_md5 = '{hashlib.md5(archive).hexdigest()}'"
    if way == "replay":
        notebook.cells.append(nbformat.v4.new_code_cell(REPLAYED))
    if way == "upload":
        uploads = folder / "uploads"
        uploads.mkdir()
        for file in (public / "my_utils.py", *sorted(path.parent.glob("*.ipynb"))):
            if file != path:
                shutil.copy(file, uploads / f"{file.stem} (1){file.suffix}")  # downloaded twice
    executed = folder / path.name
    nbformat.write(notebook, executed)
    start = time.monotonic()
    with listing(session(path.stem) if way in ("opened", "replay") else "[]", archive=archive):
        command = [python, "-c", EXECUTE, executed, content]
        environment = variables(python, public, uploads)
        if way == "replay":
            del environment["RUN_SIZE"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    found = faults(nbformat.read(executed, as_version=4))
    if done.returncode and not found:
        found = [done.stderr.strip()]
    print(f"{path.stem} ({way}): {time.monotonic() - start:.0f} s, {'; '.join(found) or 'no fault'}", flush=True)
    return not found


def test(folder: Path, environment: Path | None = None) -> bool:
    """Return whether all notebooks run in fresh Colabs, which are made in `folder`."""
    python = install(environment or folder / "environment")
    public = publish(folder / "public")
    paths = sorted((public / "notebooks").glob("*.ipynb"))
    tasks = list(zip(paths, ("opened", "REPOSITORY", "upload"), strict=True))
    if DATA.is_dir():
        tasks.append((paths[0], "replay"))
    else:
        print(f"the replay is left out: it needs {DATA}", flush=True)
    return all([run(path, python, folder, public, way) for path, way in tasks])
