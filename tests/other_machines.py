"""Run the tests as on another machine, as far as this one can play it: `python tests/other_machines.py [NAME ...]`.

- oldest: the lowest versions that requirements.txt allows, installed into an environment of their own.
- small: one core, 4 GB of memory for each process, and no AVX512.
- colab: the versions that Google Colab has, and a stand-in for its dialogs; only the notebooks run there, and 01
  in full size as well, if CIFAR-10 is in data/ or CIFAR10_ROOT.
- abroad: a folder with spaces and letters that are not English, a locale without UTF-8, another time zone.

Each runs in a fresh clone of what is committed; without a name, one after the other. The exit status is 1 if any fails.
Linux only.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import colab_machine

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 4 << 30  # bytes
NO_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ABROAD = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Pacific/Chatham"}


def install_oldest(clone: Path, folder: Path) -> str:
    """Return the Python of a new environment that holds the lower bounds."""
    oldest = folder / "oldest.txt"
    oldest.write_text(re.sub(">=", "==", (clone / "requirements.txt").read_text(encoding="utf-8")), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    python = str(folder / "environment" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", oldest], check=True)
    return python


def shrink() -> None:
    """Leave this process one core and little memory."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def test(name: str, environment: Path | None = None) -> bool:
    """Whether the tests pass on the machine of that name."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "colab":
            return colab_machine.test(Path(folder), environment)
        clone = Path(folder) / ("Übung 1 – CIFAR 10" if name == "abroad" else "clone")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        python = install_oldest(clone, Path(folder)) if name == "oldest" else sys.executable
        environment = os.environ | {"abroad": ABROAD, "small": NO_AVX512}.get(name, {})
        environment["PATH"] = os.pathsep.join([str(Path(python).parent), environment["PATH"]])
        command = [python, "-m", "pytest", "-q"]
        command += ["-n0"] if name == "abroad" else []  # xdist's workers cannot send the name of this folder
        limit = shrink if name == "small" else None
        return subprocess.run(command, cwd=clone, env=environment, preexec_fn=limit).returncode == 0


if __name__ == "__main__":
    machines = ("oldest", "small", "abroad", "colab")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(machines)}; default: all")
    parser.add_argument("--environment", type=Path, help="where colab's packages are, or shall be kept")
    options = parser.parse_args()
    names = options.names or machines
    if unknown := set(names) - set(machines):
        parser.error(f"there is no machine {', '.join(sorted(unknown))}")
    passed = {name: test(name, options.environment) for name in names}
    print("\n".join(f"{name:8} {'passed' if passed[name] else 'FAILED'}" for name in names))
    sys.exit(0 if all(passed.values()) else 1)
