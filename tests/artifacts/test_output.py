"""Output directories and files: whole under their name, or absent."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unbackdoor import UnbackdoorError
from unbackdoor._artifacts.directories import check_free, check_free_file, content, directory, write_file
from unbackdoor._artifacts.record import last_name, write_record
from unbackdoor._errors import IncompleteError

RECORD = json.loads((Path(__file__).parents[1] / "victim" / "record.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with directory(tmp_path / "deep" / "out") as folder:
        (folder / "record.json").write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["record.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_gets_its_name_in_one_step(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between two steps would leave an empty directory under its name."""
    out, seen = tmp_path / "out", []
    if overwrite:
        finished(out)
    rename = os.rename

    def watched(old: Path, new: Path) -> None:
        seen.append((new == out, out.exists()))
        rename(old, new)

    monkeypatch.setattr(os, "rename", watched)
    with directory(out, check_free(out, overwrite=overwrite)) as folder:
        (folder / "record.json").write_text("{}")
    assert (True, False) in seen
    assert (True, True) not in seen


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("a bug")], ids=["ctrl-c", "bug"])
def test_nothing_is_left_when_the_block_fails(failure: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(failure)), directory(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise failure
    assert names(tmp_path) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from unbackdoor._artifacts import directories
out, step = Path(sys.argv[1]), sys.argv[2]
if step == "placing":
    directories._renamed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with directories.directory(out, directories.check_free(out, overwrite=True)) as folder:
    (folder / "half").write_bytes(bytes(3 * 2**20))
    if step == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("step", ["writing", "placing"])
def test_what_a_killed_run_left_is_named(step: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is removed: neither what another run may be writing, nor what only has a similar name."""
    out = tmp_path / "out"
    finished(out)
    earlier = (out / "record.json").read_bytes()
    for name in (".out.partial-", ".out.partial-Backup_1", ".out.partial-12345678.d", ".other.partial-12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-afile000").write_text("")
    (tmp_path / ".out.old-nothing_").mkdir()
    (tmp_path / ".out.partial-alink000").symlink_to(tmp_path)
    theirs = set(names(tmp_path))
    done = subprocess.run([sys.executable, "-c", _KILLED, str(out), step], check=False)
    assert done.returncode == -signal.SIGKILL
    left = set(names(tmp_path)) - theirs
    (partial,) = (name for name in left if ".partial-" in name)
    expected = [
        f"{tmp_path / partial} (3.0 MiB) is what a killed run left of {out}. Remove it, unless another run is writing "
        "it."
    ]
    if step == "placing":
        (aside,) = left - {partial}
        assert not out.exists()
        assert (tmp_path / aside / "old" / "record.json").read_bytes() == earlier
        expected.insert(
            0,
            f"{tmp_path / aside / 'old'} (0.0 MiB) is an earlier {out}: a run was killed as it replaced it. Move "
            "it back, or remove it, unless another run is replacing it.",
        )
    before = names(tmp_path)
    check_free(out, overwrite=True)
    assert [each.getMessage() for each in caplog.records] == expected
    assert names(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_incomplete(number: int, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError) as refusal, directory(tmp_path / "out"):
        raise OSError(number, "No room")
    assert (
        str(refusal.value) == f"{tmp_path}/out could not be written: No room. Nothing of it was kept; free some space."
    )
    assert refusal.value.exit_code == 1
    assert names(tmp_path) == []


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(IncompleteError, match="could not be written"), directory(tmp_path / "out"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal = pytest.raises(UnbackdoorError, match=r"file/out cannot be written \(.*\)\. Choose another `out`\.$")
    with refusal, directory(tmp_path / "file" / "out"):
        pass


def test_a_place_where_nothing_can_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    """While a directory is filled it has a longer name, which must be possible as well."""
    refusal = pytest.raises(
        UnbackdoorError, match=r"x cannot be written \(File name too long\)\. Choose another `out`\.$"
    )
    with refusal:
        check_free(tmp_path / ("x" * 240), overwrite=False)
    with refusal:
        check_free(tmp_path / "new" / ("x" * 240), overwrite=False)
    if Path("/proc/self").exists():
        with pytest.raises(UnbackdoorError, match=r"^/proc/out cannot be written \(.*\)\. Choose another `out`\.$"):
            check_free(Path("/proc/out"), overwrite=False)
    with pytest.raises(UnbackdoorError, match=r"cannot be written \(File name too long\)\. Choose another `out`\.$"):
        check_free(tmp_path / ("x" * 300) / "out", overwrite=False)
    (tmp_path / "nowhere").symlink_to("gone")
    with pytest.raises(
        UnbackdoorError, match=r"nowhere/out cannot be written \(.*/nowhere is not a folder to write to"
    ):
        check_free(tmp_path / "nowhere" / "out", overwrite=False)
    assert check_free(tmp_path / "new" / ("x" * 200), overwrite=False) is None
    assert names(tmp_path) == ["nowhere"]


def test_a_file_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    def refusal(words: str) -> pytest.RaisesExc[UnbackdoorError]:
        return pytest.raises(UnbackdoorError, match=rf"cannot be written \({words}\)\. Choose another `sarif`\.$")

    with refusal("File name too long"):
        check_free_file(tmp_path / ("x" * 300), "sarif", overwrite=False)
    with refusal("File name too long"):
        check_free_file(tmp_path / ("x" * 300) / "log", "sarif", overwrite=False)
    (tmp_path / "nowhere").symlink_to("gone")
    with refusal(".*/nowhere is not a folder to write to"):
        check_free_file(tmp_path / "nowhere" / "log", "sarif", overwrite=False)
    if Path("/proc/self").exists():
        with refusal(".*"):
            check_free_file(Path("/proc/log"), "sarif", overwrite=False)
    check_free_file(tmp_path / "new" / "log", "sarif", overwrite=False)
    assert names(tmp_path) == ["nowhere"]


def test_which_files_are_replaced(tmp_path: Path) -> None:
    ours, theirs, empty, link, pipe = (tmp_path / name for name in ("ours", "theirs", "empty", "link", "pipe"))
    ours.write_text('{"tool": "unbackdoor"}')
    theirs.write_text('{"weights": []}')
    empty.write_text("")
    link.symlink_to(ours)
    os.mkfifo(pipe)

    def check(file: Path) -> None:
        check_free_file(file, "sarif", overwrite=True, mark='"unbackdoor"')

    check(ours)
    check(empty)
    with pytest.raises(UnbackdoorError, match=r"theirs was not written by unbackdoor\. Choose another `sarif`\.$"):
        check(theirs)
    with pytest.raises(
        UnbackdoorError, match=r"link is a link, which is not replaced\. Choose another `sarif`, or the f"
    ):
        check(link)
    with pytest.raises(
        UnbackdoorError, match=r"pipe is a named pipe, which is not replaced\. Choose another `sarif`\.$"
    ):
        check(pipe)


def test_what_cannot_be_written_after_the_work_is_incomplete(tmp_path: Path) -> None:
    """The exit code says that the work ran; the message names the option."""
    (tmp_path / "file").write_text("")
    with pytest.raises(IncompleteError, match=r"log cannot be written \(.*\)\. Choose another `sarif`\.$"):
        write_file(tmp_path / "file" / "log", "text", "sarif")
    with pytest.raises(IncompleteError, match=r"out cannot be written"), directory(tmp_path / "file" / "out"):
        pass


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    with directory(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text("one")
        assert write_record(folder / "record.json", RECORD) == {**RECORD, "files": ["deep/one", "record.json"]}
    earlier = check_free(tmp_path / "out", overwrite=True)
    with directory(tmp_path / "out", earlier) as folder:
        (folder / "two").write_text("two")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["two"]


def finished(out: Path, replacing: bool = False) -> Path:
    """An earlier result with three files."""
    with directory(out, content(out) if replacing else None) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "victim").mkdir()
        (folder / "victim" / "weights").write_text("1")
        write_record(folder / "record.json", RECORD)
    return out


@pytest.mark.parametrize("theirs", ["notes.txt", "victim/notes.txt", "mine/empty", "victim/.hidden"])
def test_what_the_record_does_not_list_is_not_replaced(theirs: str, tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (out / theirs).parent.mkdir(exist_ok=True)
    (out / theirs).write_text("a day's work") if "empty" not in theirs else (out / theirs).mkdir()
    with pytest.raises(UnbackdoorError) as refusal:
        check_free(out, overwrite=True)
    listed = "mine, mine/empty" if "empty" in theirs else theirs
    assert str(refusal.value) == (
        f"{out} holds what record.json does not list, and so may be somebody else's ({listed}). Move it away, or "
        "choose another `out`."
    )


def test_a_result_whose_record_lists_nothing_may_hold_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"seed": 0}')  # as earlier versions wrote it
    check_free(tmp_path, overwrite=True)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UnbackdoorError, match=r"may be somebody else's \(model\.safetensors\)\. Move it away, or"):
        check_free(tmp_path, overwrite=True)


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    finished(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(UnbackdoorError, match=r"out is a link, which is not replaced\. Choose another `out`, or the"):
        check_free(tmp_path / "out", overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(UnbackdoorError, match=r"nowhere exists\. Use `overwrite=True`, or another `out`\."):
        check_free(tmp_path / "nowhere", overwrite=False)


def folder_of_others(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("kept")


MEANWHILE = {
    "folder": folder_of_others,
    "empty folder": lambda out: out.mkdir(),
    "file": lambda out: out.write_text("kept"),
    "link": lambda out: out.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("kind", MEANWHILE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_the_place_meanwhile_stays(kind: str, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if overwrite:
        finished(out)
    earlier = check_free(out, overwrite=overwrite)
    with pytest.raises(IncompleteError) as refusal, directory(out, earlier) as folder:  # noqa: PT012
        (folder / "record.json").write_text("new")
        if overwrite:
            out.rename(tmp_path / "moved away")
        MEANWHILE[kind](out)
        before = (out.is_symlink(), out.is_dir() and content(out))
    assert str(refusal.value) == (
        f"{out} was made or changed by something else meanwhile, and stays as it is. The result is in {out}-2."
    )
    assert refusal.value.exit_code == 1
    assert (out.is_symlink(), out.is_dir() and content(out)) == before
    assert kind != "file" or out.read_text() == "kept"
    assert (tmp_path / "out-2" / "record.json").read_text() == "new"
    assert names(tmp_path) == ["moved away"] * overwrite + ["out", "out-2"]


@pytest.mark.parametrize("change", ["new file", "other content", "file gone", "deep"])
def test_what_changed_in_the_place_meanwhile_stays(change: str, tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (tmp_path / "out-2").mkdir()
    earlier = check_free(out, overwrite=True)
    refusal = pytest.raises(IncompleteError, match=r"stays as it is\. The result is in .*out-3\.$")
    with refusal, directory(out, earlier):
        if change == "new file":
            (out / "notes.txt").write_text("mine")
        elif change == "other content":
            (out / "config.json").write_text("[]")
        elif change == "file gone":
            (out / "config.json").unlink()
        else:
            (out / "victim" / "notes.txt").write_text("mine")
        before = content(out)
    assert content(out) == before
    assert names(tmp_path) == ["out", "out-2", "out-3"]
    assert names(tmp_path / "out-2") == []


def test_a_place_that_others_cleared_meanwhile_is_taken(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    earlier = check_free(out, overwrite=True)
    with directory(out, earlier) as folder:
        (folder / "new").write_text("")
        out.rename(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "out"]
    assert names(out) == ["new"]


def test_what_may_be_overwritten(tmp_path: Path) -> None:
    free, taken, ours = tmp_path / "free", tmp_path / "taken", tmp_path / "ours"
    check_free(free, overwrite=False)
    taken.mkdir()
    (taken / "mine").write_text("")
    ours.mkdir()
    (ours / "record.json").write_text("{}")
    with pytest.raises(UnbackdoorError, match=r"ours exists\. Use `overwrite=True`, or another `out`\.$"):
        check_free(ours, overwrite=False)
    check_free(ours, overwrite=True)
    with pytest.raises(UnbackdoorError, match=r"taken was not written by unbackdoor \(it has no record\.json\)\."):
        check_free(taken, overwrite=True)
    with pytest.raises(UnbackdoorError, match=r"ours is the input itself; `out` must be another directory\.$"):
        check_free(ours, overwrite=True, inputs=(ours,))
    (taken / "file").write_text("")
    with pytest.raises(
        UnbackdoorError, match=r"file/out cannot be written \(.*taken/file is not a folder to write to\)\."
    ):
        check_free(taken / "file" / "out", overwrite=False)
    with pytest.raises(UnbackdoorError, match=r"ours holds the input .*/ours/clean\.parquet; `out` must be another"):
        check_free(ours, overwrite=True, inputs=(free, ours / "clean.parquet"))


def test_the_name_of_a_model_is_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SARIF and bills of materials without one are rejected."""
    (tmp_path / "victim" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "victim")
    assert [last_name(path) for path in (".", "./", "deep/..", "../victim", "owner/name")] == [*["victim"] * 4, "name"]


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "cell.json", "text")
    write_file(tmp_path / "a" / "cell.json", "other")
    assert names(tmp_path / "a") == ["cell.json"]
    assert (tmp_path / "a" / "cell.json").read_text() == "other"
