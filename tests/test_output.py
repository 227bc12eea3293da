"""Output directories and files: whole under their name, or absent."""

import errno
from pathlib import Path

import pytest

from unbackdoor import UnbackdoorError
from unbackdoor._errors import IncompleteError
from unbackdoor._output import check_free, directory, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with directory(tmp_path / "deep" / "out") as folder:
        (folder / "record.json").write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["record.json"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("a bug")], ids=["ctrl-c", "bug"])
def test_nothing_is_left_when_the_block_fails(failure: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(failure)), directory(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise failure
    assert names(tmp_path) == []


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
    refusal = pytest.raises(UnbackdoorError, match=r"file/out cannot be written \(.*\)\. Choose another --out\.$")
    with refusal, directory(tmp_path / "file" / "out"):
        pass


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with directory(tmp_path / "out") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["two"]


def test_what_may_be_overwritten(tmp_path: Path) -> None:
    free, taken, ours = tmp_path / "free", tmp_path / "taken", tmp_path / "ours"
    check_free(free, overwrite=False)
    taken.mkdir()
    (taken / "mine").write_text("")
    ours.mkdir()
    (ours / "record.json").write_text("{}")
    with pytest.raises(UnbackdoorError, match=r"ours exists\. Use --overwrite, or another --out\.$"):
        check_free(ours, overwrite=False)
    check_free(ours, overwrite=True)
    with pytest.raises(UnbackdoorError, match=r"taken was not written by unbackdoor \(it has no record\.json\)\."):
        check_free(taken, overwrite=True)
    with pytest.raises(UnbackdoorError, match=r"ours is the input itself; --out must be another directory\.$"):
        check_free(ours, overwrite=True, inputs=(ours,))
    (taken / "file").write_text("")
    with pytest.raises(
        UnbackdoorError, match=r"file/out cannot be written \(.*taken/file is no folder to write to\)\."
    ):
        check_free(taken / "file" / "out", overwrite=False)
    with pytest.raises(UnbackdoorError, match=r"ours holds the input .*/ours/clean\.parquet; --out must be another"):
        check_free(ours, overwrite=True, inputs=(free, ours / "clean.parquet"))


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "cell.json", "text")
    write_file(tmp_path / "a" / "cell.json", "other")
    assert names(tmp_path / "a") == ["cell.json"]
    assert (tmp_path / "a" / "cell.json").read_text() == "other"
