"""The models of the notebooks, for tests and measurements."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def import_models(name: str, folder: Path) -> ModuleType:
    """Return notebook `name`'s cells tagged `model` as a module; they are written into `folder`, to have a source."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if "model" in cell["metadata"].get("tags", [])]
    path = folder / f"models_{name}.py"
    path.write_text("\n".join(sources), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
