"""Stands in for Colab's dialogs: whoever is asked for files chooses all of the folder UPLOADS."""

import os
from pathlib import Path


def upload() -> dict[str, bytes]:
    """Save the chosen files in the working folder, under names that are free; return their own names and contents.

    Without UPLOADS the upload is cancelled: nothing is saved, and the answer is empty.
    """
    folder = os.environ.get("UPLOADS")
    uploaded = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())} if folder else {}
    for name, content in uploaded.items():
        free, count = Path(name), 0
        while free.exists():
            count += 1
            free = Path(f"{Path(name).stem} ({count}){Path(name).suffix}")
        print(f"Saving {name} to {free}")
        free.write_bytes(content)
    return uploaded


def download(filename: str) -> None:
    """Download a file."""
    if not Path(filename).exists():
        raise FileNotFoundError(f"Cannot find file: {filename}")
