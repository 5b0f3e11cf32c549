"""The run store as a zip file: what goes out comes back, and nothing else does."""

import io
import zipfile
from dataclasses import asdict
from functools import partial

import pytest
import torch
from tiny import Tiny, each_forward, recipe

import my_utils

fit = partial(my_utils.fit, run="test/tiny", plot=False)
FOLDER = "smoke/test/tiny/seed0-0123456789abcdef"


@pytest.fixture
def packed(splits, store, tmp_path, monkeypatch):
    """A zip file with a finished run, and the store empty again: (the run, its folder's name, the file)."""
    run = fit(Tiny, splits, recipe())
    path = my_utils.pack_runs(tmp_path / "runs.zip")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "other"))
    return run, f"smoke/test/tiny/seed0-{run.fingerprint}", path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_locks(folder):
    return {name: content for name, content in contents(folder).items() if not name.endswith(("lock", "lock.owner"))}


def rewritten(path, change):
    """Change the members of a zip file: `change` maps {name: bytes} to the new one."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)


def as_if_stopped(members, epochs):
    """Leave only the checkpoint after the first or the second epoch."""
    kept = {1: "checkpoint.previous.pt", 2: "checkpoint.pt"}[epochs]
    [name] = [name for name in members if name.endswith(kept)]
    return {name.replace(".previous", ""): members[name]}


def test_what_is_packed_comes_back(splits, store, tmp_path, packed):
    run, name, path = packed
    assert my_utils.unpack_runs(path) == [name]
    assert without_locks(tmp_path / "other") == without_locks(store)
    with each_forward() as calls:
        again = fit(Tiny, splits, recipe())
    assert calls == [] and again.history == run.history
    assert my_utils.unpack_runs(path) == []  # it is there already


def test_the_run_with_more_epochs_stays(splits, tmp_path, packed):
    run, name, path = packed
    whole = path.read_bytes()
    rewritten(path, partial(as_if_stopped, epochs=1))
    assert my_utils.unpack_runs(path) == [name]
    first = without_locks(tmp_path / "other")
    assert list(first) == [f"{name}/checkpoint.pt"]

    path.write_bytes(whole)
    rewritten(path, partial(as_if_stopped, epochs=2))
    assert my_utils.unpack_runs(path) == [name]
    second = without_locks(tmp_path / "other")
    assert second.keys() == first.keys() and second != first

    path.write_bytes(whole)
    rewritten(path, partial(as_if_stopped, epochs=1))
    assert my_utils.unpack_runs(path) == []
    assert without_locks(tmp_path / "other") == second

    ended = fit(Tiny, splits, recipe())
    assert asdict(ended.history) == asdict(run.history)
    before = without_locks(tmp_path / "other")
    path.write_bytes(whole)
    assert my_utils.unpack_runs(path) == []
    assert without_locks(tmp_path / "other") == before


@pytest.mark.parametrize(
    "name",
    [
        f"../{FOLDER}/run.json",
        f"smoke/../../../{FOLDER}/run.json",
        f"/{FOLDER}/run.json",
        f"C:/{FOLDER}/run.json",
        f"..\\{FOLDER}/run.json",
        f"{FOLDER}/../run.json",
        f"{FOLDER}/my_utils.py",
        f"{FOLDER}/",
        "smoke/test/run.json",
        "run.json",
    ],
)
def test_other_files_are_refused(tmp_path, packed, name):
    _, _, path = packed
    rewritten(path, lambda members: members | {name: b"{}"})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is no part of a run store"):
        my_utils.unpack_runs(path)
    assert contents(tmp_path) == before and not list((tmp_path / "other").iterdir())


def lying(members):
    return {name: bytes(1 << 24) if name.endswith("run.json") else content for name, content in members.items()}


def test_a_zip_bomb_is_refused(tmp_path, packed):
    _, _, path = packed
    rewritten(path, lying)
    with pytest.raises(ValueError, match=r"unpacks to 16,\d+,\d+ bytes; it may be 1,000,000"):
        my_utils.unpack_runs(path, max_bytes=1_000_000)
    # The same with a declared size of 9 bytes: no more than these are written, and they do not fit the checksum.
    size = (1 << 24).to_bytes(4, "little")
    assert path.read_bytes().count(size) == 2  # before the file and in the directory
    path.write_bytes(path.read_bytes().replace(size, (9).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="no sound zip file"):
        my_utils.unpack_runs(path, max_bytes=1_000_000)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("damage", [lambda good: b"hello", lambda good: good[:1000], lambda good: b""])
def test_what_is_no_zip_file_is_refused(tmp_path, packed, damage):
    _, _, path = packed
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="no sound zip file"):
        my_utils.unpack_runs(path)


def test_a_damaged_checkpoint_is_not_taken(tmp_path, packed):
    _, name, path = packed
    buffer = io.BytesIO()
    torch.save([1, 2, 3], buffer)
    rewritten(path, lambda members: {f"{name}/checkpoint.pt": buffer.getvalue()})
    with pytest.raises(ValueError, match=r"checkpoint\.pt in seed0-\w+ is damaged"):
        my_utils.unpack_runs(path)
    assert not list((tmp_path / "other").iterdir())


def test_a_junk_finished_run_is_not_taken(splits, tmp_path, packed):
    """It would hide the checkpoint that is there."""
    _, name, path = packed
    rewritten(path, lambda members: as_if_stopped(members, epochs=1))
    assert my_utils.unpack_runs(path) == [name]
    before = contents(tmp_path / "other")
    rewritten(path, lambda _: {f"{name}/run.json": b'{"history": {}}', f"{name}/weights.safetensors": b"x"})
    with pytest.raises(ValueError, match=r"run\.json in seed0-\w+ is damaged"):
        my_utils.unpack_runs(path)
    assert contents(tmp_path / "other") == before


def test_what_a_kill_between_two_moves_left_is_not_lost(store, tmp_path, packed, monkeypatch):
    """Then the run has no checkpoint.pt, only the one before."""
    _, name, path = packed
    rewritten(path, lambda members: as_if_stopped(members, epochs=1))
    assert my_utils.unpack_runs(path) == [name]
    checkpoint = tmp_path / "other" / name / "checkpoint.pt"
    checkpoint.rename(checkpoint.with_name("checkpoint.previous.pt"))
    assert my_utils.unpack_runs(path) == []  # it has as many epochs
    moved = my_utils.pack_runs(tmp_path / "moved.zip")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "third"))
    assert my_utils.unpack_runs(moved) == [name]


def test_a_run_that_is_being_trained_is_not_packed(store, tmp_path, packed):
    _, name, path = packed
    before = path.read_bytes()
    assert my_utils.unpack_runs(path) == [name]
    held = my_utils._holding(tmp_path / "other" / name / "lock", name)
    with held, pytest.raises(RuntimeError, match="is being used"):
        my_utils.pack_runs(path)
    assert path.read_bytes() == before


def test_a_run_that_is_being_trained_is_left_alone(tmp_path, packed):
    _, name, path = packed
    folder = tmp_path / "other" / name
    folder.mkdir(parents=True)
    with my_utils._holding(folder / "lock", "run test/tiny"), pytest.raises(RuntimeError, match="is being used by"):
        my_utils.unpack_runs(path)
    assert not without_locks(tmp_path / "other")
