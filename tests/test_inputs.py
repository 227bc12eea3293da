"""The one function for names that others chose, and the one way to open a file that others made."""

import os
import pickle
import socket
import sys

import pytest

from unbackdoor._errors import NAME, SENTENCE, IncompleteError, UnbackdoorError, printable
from unbackdoor._inputs import check_file, exists, open_file, read_file, read_json, read_text, reading

HOSTILE = {
    "newline": ("a\nb", "a\\nb"),
    "carriage return": ("a\rb", "a\\rb"),
    "tab": ("a\tb", "a\\tb"),
    "terminal": ("\x1b[2J", "\\x1b[2J"),
    "null": ("a\0b", "a\\x00b"),
    "right to left": ("a\u202eb", "a\\u202eb"),
    "isolate": ("a\u2066b", "a\\u2066b"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "next line": ("a\x85b", "a\\x85b"),
    "surrogate": ("a\ud800b", "a\\ud800b"),
    "zero width": ("a\u200bb", "a\\u200bb"),
    "tag": ("a\U000e0041b", "a\\U000e0041b"),
    "three marks": ("a\u0301\u0302\u0303b", "a\u0301\u0302\u0303b"),
    "flood of marks": ("a" + "\u0301" * 5 + "b", "a" + "\u0301" * 3 + "\\u0301" * 2 + "b"),
    "harmless": ("Straße 猫 кот 😀 \\n", "Straße 猫 кот 😀 \\n"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_name_of_others_is_one_line_of_letters(kind: str) -> None:
    given, shown = HOSTILE[kind]
    assert printable(given) == shown
    assert printable(printable(given)) == shown
    assert str(UnbackdoorError(f"x has the class {given}.")) == f"x has the class {shown}."


def test_a_long_name_loses_its_middle() -> None:
    assert printable("ab" * 500_000) == "ab" * 24 + "..." + "ab" * 24
    assert len(printable("\0" * 500_000)) <= NAME
    assert printable("x" * NAME) == "x" * NAME
    message = str(IncompleteError("first " + "x" * 10**6 + " last."))
    assert len(message) <= SENTENCE
    assert message.startswith("first ")
    assert message.endswith(" last.")


def test_a_number_too_long_for_text_is_reported() -> None:
    assert printable(10**6000) == "a very long int"
    assert printable(12) == "12"


def test_several_problems_have_a_line_each_and_travel_between_processes() -> None:
    problem = UnbackdoorError("x has 2 problems:", "  line 1: a\nb", "  line 2: c")
    assert str(problem) == "x has 2 problems:\n  line 1: a\\nb\n  line 2: c"
    one = pickle.loads(pickle.dumps(IncompleteError("a sentence.")))
    assert (type(one), str(one), one.exit_code) == (IncompleteError, "a sentence.", 1)


def kinds(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    return listening, {
        tmp_path / "pipe": "got a named pipe",
        tmp_path / "folder": "got a folder",
        tmp_path / "link": "got a device",
        "/dev/urandom": "got a device",
        tmp_path / "socket": "got a socket",
        tmp_path / "nothing": "does not exist",
        str(tmp_path / "null\0character"): "cannot be read (embedded null byte)",
        tmp_path / ("long" * 100): "cannot be read (File name too long)",
    }


@pytest.mark.parametrize("read", [check_file, open_file, lambda path: read_file(path, 9), read_json])
def test_only_regular_files_are_read_and_nothing_is_waited_for(tmp_path, monkeypatch, read) -> None:
    monkeypatch.chdir(tmp_path)  # or the name of the socket is too long
    listening, refused = kinds(tmp_path)
    with listening:
        for path, reason in refused.items():
            with pytest.raises(UnbackdoorError) as reported:
                read(path)
            assert reason in str(reported.value), path


def test_a_file_has_a_bound(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    assert read_file(path, 9) == b"123456789"
    assert check_file(path) == path
    for read in (read_file, check_file, open_file):
        with pytest.raises(UnbackdoorError, match=r"must have at most 8 bytes, got 9"):
            read(path, 8)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "w.pt", "config.json", "d.csv", "d.parquet", "a.png", "bpe.codes"]
)
def test_what_was_not_fetched_differs_from_what_is_damaged(tmp_path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(UnbackdoorError) as refused:
        check_file(path)
    assert str(refused.value) == f"{path} is a pointer of Git LFS, not the file itself. Fetch that by git lfs pull."
    path.write_text("\n<!DOCTYPE HTML><html><body>Log in</body></html>")
    with pytest.raises(UnbackdoorError) as refused:
        open_file(path)
    assert str(refused.value) == (
        f"{path} is a web page, not the file that its name promises. Fetch it again; its address may need a login."
    )
    path.unlink()
    path.symlink_to("../blobs/0123")  # what remains of the Hub's cache if only the links are copied
    with pytest.raises(UnbackdoorError) as refused:
        check_file(path)
    assert str(refused.value) == (
        f"{path} is a link to a file that is not there. Fetch that file, or copy what links name (cp -rL)."
    )


def test_a_card_and_a_licence_may_be_pages(tmp_path) -> None:
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        (tmp_path / name).write_text("<html>\n<p>text</p></html>")
        assert check_file(tmp_path / name) == tmp_path / name


def test_the_bound_holds_where_a_file_says_that_it_is_empty() -> None:
    with pytest.raises(UnbackdoorError, match=r"must have at most 4 bytes, got 5 or more\."):
        read_file("/proc/self/status", 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not valid JSON (Expecting property name"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"\xff\xfe{\0}\0", "is not text in UTF-8 (invalid start byte at byte 0)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not valid JSON"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "is nested more than 100 levels deep"),
        (b'{"a": ["\\ud800"]}', "has text that is not valid Unicode (\\ud800)"),
        (b'{"\\udc00": 1}', "has text that is not valid Unicode (\\udc00)"),
    ],
)
def test_json_that_makes_tracebacks_is_refused(tmp_path, content: bytes, reason: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UnbackdoorError) as reported:
        read_json(path)
    assert f"{path} {reason}" in str(reported.value)


def test_json_of_honest_people_is_read(tmp_path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"name": "Straße \\ud83d\\ude00", "nested": ' + "[" * 50 + "]" * 50 + "}")
    assert read_json(path)["name"] == "Straße 😀"
    path.write_bytes(b'{"a": "\xc3\xa9"}')
    assert read_text(path, 99) == '{"a": "é"}'


class PanicException(BaseException):
    """As Rust's libraries raise it."""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PanicException("index 5\nout of range"), "x.json cannot be read (PanicException: index 5). Fetch it again"),
        (RecursionError(), "x.json cannot be read (RecursionError). Fetch"),
        (MemoryError(), "x.json needs more memory than there is."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "x.json needs more memory than there is."),
        (OverflowError("int too large"), "x.json cannot be read (OverflowError: int too large)."),
        (UnbackdoorError("It is reported already."), "It is reported already."),
    ],
)
def test_what_libraries_raise_while_reading_is_the_fault_of_the_file(raised: BaseException, said: str) -> None:
    with pytest.raises(UnbackdoorError) as reported, reading("x.json"):
        raise raised
    assert str(reported.value).startswith(said)


def test_an_interrupt_or_a_full_disk_is_no_fault_of_the_file() -> None:
    with pytest.raises(KeyboardInterrupt), reading("x.json"):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="full"), reading("x.json"):
        raise OSError(28, "full")


def test_whether_there_is_such_a_file(tmp_path) -> None:
    assert exists(tmp_path)
    assert not exists(tmp_path / "nothing")
    assert not exists("null\0character")
    assert not exists("long" * 2000)
