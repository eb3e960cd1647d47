"""Artifacts: whole or absent, resumed only with the same identity, never overwritten by accident."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ctp_cli import artifact
from ctp_cli.artifact import Workspace, manifest_of, newest, workspace
from ctp_cli.errors import InputError, OutputError
from ctp_cli.files import read_json, whole_file


def make(path: Path, *, kind: str = "thing", identity: dict[str, object] | None = None, force: bool = False) -> Path:
    with workspace(path, kind=kind, identity=identity or {"bits": 4}, force=force) as space:
        (space.path / "data").write_text("whole")
        return space.finish({"results": 1})


def test_a_finished_artifact_is_there_with_its_manifest_and_nothing_else(tmp_path: Path) -> None:
    path = make(tmp_path / "a" / "b")
    manifest = manifest_of(path)
    assert manifest is not None and manifest["identity"] == {"bits": 4} and manifest["files"] == {"data": 5}
    assert manifest["environment"]["torch"] and manifest["peak_memory_bytes"] > 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b"]


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    held = bytearray(os.urandom(4096) * 75_000)  # 300 MB, of which every page is resident
    script = "from ctp_cli.artifact import peak_memory_bytes; print(peak_memory_bytes())"
    own = int(subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE).stdout)
    assert 5e6 < own < 200e6 < len(held) < artifact.peak_memory_bytes()


def test_nothing_appears_before_it_is_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path / "x", kind="k", identity={"a": 1}) as space:
        (space.path / "part").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "x").exists() and (tmp_path / "x.partial" / "part").exists()
    assert manifest_of(tmp_path / "x.partial") is None


def test_unfinished_work_goes_on_only_with_the_same_identity(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path / "x", kind="k", identity={"compress": {"bits": 4}}) as space:
        (space.path / "part").write_text("half")
        raise RuntimeError
    other = workspace(tmp_path / "x", kind="k", identity={"compress": {"bits": 3}})
    with pytest.raises(OutputError, match=r"compress\.bits was 4, is 3"), other:
        pass
    with workspace(tmp_path / "x", kind="k", identity={"compress": {"bits": 4}}) as again:
        assert again.resumed and (again.path / "part").read_text() == "half"
        again.finish({})
    assert (tmp_path / "x" / "part").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(1, 6))
def test_killed_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """At the removal of each scratch file, at the rename, and after it: never scratch in what has its final name."""
    left = iter(range(step - 1, -1, -1))

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def counted(path: Path, *arguments: object, **options: object) -> object:
            if (path.parent.name.startswith("x") or path.name.startswith("x")) and next(left) == 0:
                raise Killed
            return call(path, *arguments, **options)

        return counted

    def made() -> None:
        with workspace(tmp_path / "x", kind="k", identity={"bits": 4}) as space:
            for name in ("data", "one.layers", "two.layers", "state"):
                (space.path / name).write_text("whole")
            space.finish({}, scratch=("*.layers", "state"))

    with pytest.raises(Killed), monkeypatch.context() as dying:
        dying.setattr(Path, "unlink", deadly(Path.unlink))
        dying.setattr(Path, "rename", deadly(Path.rename))
        made()
    assert not (tmp_path / "x").exists()
    made()
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["ctp.json", "data"]
    assert read_json(tmp_path / "x" / "ctp.json")["files"] == {"data": 5}


def test_a_whole_artifact_with_the_name_of_unfinished_work_is_not_thrown_away(tmp_path: Path) -> None:
    make(tmp_path / "kept", identity={"bits": 3}).rename(tmp_path / "x.partial")
    with pytest.raises(OutputError, match="bits was 3, is 4"):
        make(tmp_path / "x", identity={"bits": 4})
    assert sorted(p.name for p in (tmp_path / "x.partial").iterdir()) == ["ctp.json", "data"]


def test_existing_output_is_refused_and_force_replaces_it_at_the_end(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(OutputError, match="exists"):
        make(tmp_path / "x")
    with pytest.raises(RuntimeError), workspace(tmp_path / "x", kind="k", identity={"n": 2}, force=True):
        raise RuntimeError
    assert (tmp_path / "x" / "data").read_text() == "whole"  # the old one stays until the new one is whole
    make(tmp_path / "x", identity={"n": 3}, force=True)
    manifest = manifest_of(tmp_path / "x")
    assert manifest is not None and manifest["identity"] == {"n": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_what_stands_where_work_would_go_is_kept(tmp_path: Path) -> None:
    partial = tmp_path / "x.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match="not made by ctp"):
            make(tmp_path / "x", force=force)
    assert (partial / "notes.txt").read_text() == "mine"
    (partial / "notes.txt").unlink()
    assert make(tmp_path / "x") == tmp_path / "x", "an empty folder, as one killed at once leaves it"
    (tmp_path / "y.partial").write_text("mine")
    with pytest.raises(OutputError, match="not made by ctp"):
        make(tmp_path / "y", force=True)


def test_an_error_before_anything_was_saved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path / "x", kind="k", identity={}):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_output_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with workspace(tmp_path / "x", kind="k", identity={}) as space:
        (space.path / "data").write_text("ours")
        (tmp_path / "x").mkdir()
        with pytest.raises(OutputError, match="exists by now"):
            space.finish({})
    assert isinstance(space, Workspace) and (tmp_path / "x.partial" / "data").exists()


def test_whole_file_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as beside:
        beside.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_newest_takes_finished_artifacts_of_its_kind_and_refuses_a_tie(tmp_path: Path) -> None:
    assert newest(("thing",), tmp_path) is None
    make(tmp_path / "old")
    young = make(tmp_path / "young")
    make(tmp_path / "other", kind="another")
    assert newest(("thing",), tmp_path) == young
    stamp = read_json(young / artifact.MANIFEST)
    manifest = read_json(tmp_path / "old" / artifact.MANIFEST) | {"created": stamp["created"]}
    (tmp_path / "old" / artifact.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="old, young"):
        newest(("thing",), tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_manifest_is_an_error_with_a_name(content: bytes, tmp_path: Path) -> None:
    make(tmp_path / "x")
    (tmp_path / "x" / artifact.MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=r"ctp\.json"):
        manifest_of(tmp_path / "x")
