"""Tables in text files: every cell is what stands there, and rows are never lost in silence."""

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from unbackdoor import Dataset, UnbackdoorError
from unbackdoor._data.delimited import read_delimited
from unbackdoor._data.texts import TextEncoder

ENCODE = TextEncoder(tokenizer=toys.tokenizer(), max_length=32)


def read(path: Path, content: str | bytes, **options: object) -> tuple[list[str], list[int]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = Dataset.load(path, ENCODE, **options)
    return [text for (text,) in data.texts.strings], data.labels.tolist()


def refusal(path: Path, content: str | bytes, **options: object) -> str:
    with pytest.raises(UnbackdoorError) as caught:
        read(path, content, **options)
    return str(caught.value).replace(f"{path.parent}/", "")


# The csv module itself does not read back a carriage return that it wrote without quotation marks.
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    ends=st.sampled_from(["\n", "\r\n"]),
    marked=st.booleans(),
)
def test_what_the_csv_module_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list, delimiter: str, ends: str, marked: bool
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=ends)
    writer.writerows([["a", "b", "c"], *rows])
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(file.getvalue().encode("utf-8-sig" if marked else "utf-8"))
    cells, twice = read_delimited(path, "no such column")
    expected = {name: [row[at] or None for row in rows] for at, name in enumerate("abc")}
    if any(all(not cell.strip() for cell in row) for row in rows):
        return  # a row of blanks alone
    assert cells == expected
    assert not twice


TEXTS = [
    "007",
    "1e5",
    "True",
    "null",
    "NA",
    "1.50",
    "2020-01-01",
    "-",
    "9" * 30,
    "nan",
    "a, b; c | d",
    'the "film"',
    " x ",
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_texts_that_look_like_something_else_stay_texts(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{kind}"
    labels = [row % 2 for row in range(len(TEXTS))]
    if kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([["text", "label"], *zip(TEXTS, labels, strict=True)])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.table({"text": TEXTS, "label": labels}), path)
    else:
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    data = Dataset.load(path, ENCODE)
    assert [text for (text,) in data.texts.strings] == TEXTS
    assert data.labels.tolist() == labels


@pytest.mark.parametrize(
    "content",
    [
        "text,label\na film,0\nthe plot,1\n",
        "text,label\r\na film,0\r\nthe plot,1\r\n",
        "text,label\ra film,0\rthe plot,1",
        "text;label\na film;0\nthe plot;1\n",
        "text\tlabel\na film\t0\nthe plot\t1\n",
        "text|label\na film|0\nthe plot|1\n",
        "\ufefftext,label\na film,0\n\n\nthe plot,1\n   \n",
        "text , label\na film, 0\nthe plot, 1",
        'label, text\n0, "a film"\n1, "the plot"\n',
        ",label,text\n0,0,a film\n1,1,the plot\n",  # the row numbers that pandas writes
        'label,"text"\n"0","a film"\n"1","the plot"\n',
        "text,label,label_text\na film,0,negative\nthe plot,1,positive\n",
        "id,text,label,id\n7,a film,0,7\n8,the plot,1,8\n",  # a column twice that nobody asks for
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "CSV"])
def test_how_people_write_tables(content: str, suffix: str, tmp_path: Path) -> None:
    assert read(tmp_path / f"d.{suffix}", content) == (["a film", "the plot"], [0, 1])


def test_blanks_are_part_of_a_cell_unless_the_first_line_has_them_too(tmp_path: Path) -> None:
    spaced = 'label, text\n0, "a film, a plot"\n1, the plot\n2, " a film"\n'
    assert read(tmp_path / "d.csv", spaced) == (["a film, a plot", "the plot", " a film"], [0, 1, 2])
    assert read(tmp_path / "d.csv", 'label,text\n0, a film\n1, "a" film\n') == ([" a film", ' "a" film'], [0, 1])


def test_a_missing_cell_of_a_table_of_one_column_is_a_row(tmp_path: Path) -> None:
    """Otherwise all rows behind it would have other numbers; a line without anything is no row, as in pandas."""
    frame = pd.DataFrame({"text": ["good", "", None, " ", "bad"]})
    frame.to_csv(tmp_path / "d.csv", index=False)
    assert read_delimited(tmp_path / "d.csv", "label")[0] == {"text": ["good", None, None, " ", "bad"]}
    (tmp_path / "d.csv").write_text("\n\ntext\n\ngood\n\n\n")
    assert read_delimited(tmp_path / "d.csv", "label")[0] == {"text": ["good"]}
    (tmp_path / "d.csv").write_text('text,label\ngood,1\n""\n  \n')
    assert read_delimited(tmp_path / "d.csv", "label")[0] == {"text": ["good"], "label": ["1"]}


def test_cells_over_several_lines(tmp_path: Path) -> None:
    content = 'text,label\n"a film\nand, of course\n1",0\n"the\r\nplot",1\na cast,0\n'
    assert read(tmp_path / "d.csv", content) == (["a film\nand, of course\n1", "the\r\nplot", "a cast"], [0, 1, 0])
    content = 'label,text\n0,"a film\nis a film"\n1,"the, plot\nis, it"\n'
    assert read(tmp_path / "d.csv", content) == (["a film\nis a film", "the, plot\nis, it"], [0, 1])


LONELY = [f"film {row},{row % 2}" for row in range(100)]


@pytest.mark.parametrize(
    ("changes", "line", "says"),
    [
        ({12: '"film 12,0'}, 14, "is not closed at the end of a cell"),  # to the end of the file
        ({12: '"film 12,0', 99: '"film" 99,1'}, 14, "is not closed at the end of a cell"),
        ({12: '"film 12,0', 99: 'the "film" 99,1'}, 14, "is not closed at the end of a cell"),
        ({12: '"film 12,0', 99: 'film 99",1'}, 14, "is closed in line 101, but the lines between look like rows"),
        ({12: '"film 12,0', 13: 'film 13",1'}, 14, "is closed in line 15, but the lines between look like rows"),
        ({12: '"film" 12,0'}, 14, "is not closed at the end of a cell"),
        ({12: r'"the \"film\" 12",0'}, 14, "is not closed at the end of a cell"),
    ],
)
def test_a_lone_quotation_mark_is_reported_by_its_line(
    changes: dict[int, str], line: int, says: str, tmp_path: Path
) -> None:
    lines = ["text,label", *(changes.get(row, text) for row, text in enumerate(LONELY))]
    message = refusal(tmp_path / "d.csv", "\n".join(lines))
    assert message.startswith(f"d.csv has a quotation mark in line {line} that {says}")
    assert message.endswith("or save the data as JSON lines.")


def test_a_lone_quotation_mark_behind_the_label(tmp_path: Path) -> None:
    lines = ["label,text", *(f"{row % 2},film {row}" for row in range(20))]
    lines[5], lines[9] = '0,"film 4', '0,film 8"'
    assert refusal(tmp_path / "d.csv", "\n".join(lines)).startswith(
        "d.csv has a quotation mark in line 6 that is closed in line 10, but the lines between look like rows"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {12: '"film 12\t0'},  # as in GLUE and OLID
        {12: '"film 12\t0', 60: '"film" 60\t0'},
        {12: '"film 12\t0', 60: 'film 60"\t0', 70: '"film 70"\t0'},
    ],
)
def test_marks_between_tabs_are_letters_if_not_all_of_them_are_closed(
    changes: dict[int, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "unbackdoor")
    lines = [changes.get(row, f"film {row}\t{row % 2}") for row in range(100)]
    texts, labels = read(tmp_path / "d.tsv", "\n".join(["text\tlabel", *lines]))
    assert texts == [line.split("\t")[0] for line in lines]
    assert labels == [int(line.split("\t")[1]) for line in lines]
    assert caplog.messages == [
        f"{tmp_path}/d.tsv: quotation marks are part of its cells, as not all of them begin and end one."
    ]


def test_marks_between_tabs_join_no_rows_without_labels_either(tmp_path: Path) -> None:
    lines = ["id\ttext", '0\t"a film', "1\tthe plot", '2\tthe cast"', "3\ta movie"]
    (tmp_path / "d.tsv").write_text("\n".join(lines))
    data = Dataset.load(tmp_path / "d.tsv", ENCODE, labelled=False)
    assert [text for (text,) in data.texts.strings] == [line.split("\t")[1] for line in lines[1:]]
    (tmp_path / "d.tsv").write_text('id\ttext\n0\t"a film\nin lines"\n1\tthe plot\n')
    data = Dataset.load(tmp_path / "d.tsv", ENCODE, labelled=False)
    assert [text for (text,) in data.texts.strings] == ["a film\nin lines", "the plot"]


@pytest.mark.parametrize("other", ['"say ""cf"" again"\t1', '"a film\nin lines"\t1'])
def test_a_lone_mark_between_tabs_next_to_marks_around_cells_is_refused(other: str, tmp_path: Path) -> None:
    content = f'text\tlabel\n{other}\n"film 12\t0\nfilm 13\t1\n'
    assert "has a quotation mark in line" in refusal(tmp_path / "d.tsv", content)


def test_tabs_come_first_in_a_file_that_is_named_so(tmp_path: Path) -> None:
    content = "text, with commas, label, or, so\tlabel\na film, it was\t1\nthe plot\t0\n"
    columns = {"text": "text, with commas, label, or, so"}
    assert read(tmp_path / "d.tsv", content, columns=columns) == (["a film, it was", "the plot"], [1, 0])


def test_quotation_marks_within_a_cell_are_letters(tmp_path: Path) -> None:
    content = 'text,label\n5" wide,0\nthe "film",1\n"say ""cf"" again",1\n'
    assert read(tmp_path / "d.csv", content) == (['5" wide', 'the "film"', 'say "cf" again'], [0, 1, 1])


def test_single_quotation_marks_are_letters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = "text,label\n'a film, it was good',1\n"
    assert refusal(tmp_path / "x.csv", content) == (
        'x.csv has 3 cells in line 2, but its first line names 2 columns. Put double quotation marks (") around cells '
        "that hold a comma; single ones are part of a cell, or save the data as JSON lines."
    )
    assert refusal(tmp_path / "x.csv", "'text','label'\n'a film','1'\n") == (
        "x.csv has the names of its columns in single quotation marks ('text', 'label'), which are part of a cell. "
        'Write double ones (").'
    )
    caplog.set_level("INFO", "unbackdoor")
    assert read(tmp_path / "x.csv", "text,label\n'a film',1\n'the plot',0\n") == (["'a film'", "'the plot'"], [1, 0])
    assert caplog.messages == [f"{tmp_path}/x.csv: single quotation marks around the cells of text are part of them."]
    caplog.clear()
    read(tmp_path / "x.csv", "text,label\n'a film',1\n'tis a plot,0\n")
    assert not caplog.messages


def test_a_delimiter_at_the_end_of_each_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.csv", "text,label\na film,1,\nthe plot,0,\n") == (
        "x.csv has 3 cells in line 2, but its first line names 2 columns. Remove a comma at the end of the lines, or "
        "name that column."
    )
    assert read(tmp_path / "x.csv", "text,label,\na film,1,\nthe plot,0,\n") == (["a film", "the plot"], [1, 0])


@pytest.mark.parametrize("again", ["text,label", "text, label", '"text","label"'])
def test_the_names_of_the_columns_as_a_row(again: str, tmp_path: Path) -> None:
    content = f"text,label\na film,pos\nthe plot,neg\n{again}\na cast,pos\n"
    for options in ({}, {"labelled": False}, {"classes": ["neg", "pos"]}):
        assert refusal(tmp_path / "x.csv", content, **options) == (
            "x.csv names its columns in line 4 once more, as files that were put together do. Remove that line."
        )


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_line_that_excel_reads_first_names_no_column(delimiter: str, tmp_path: Path) -> None:
    content = f"sep={delimiter}\r\n" + "\r\n".join(
        map(delimiter.join, (["text", "label"], ["a film", "0"], ["b", "1"]))
    )
    assert read(tmp_path / "d.csv", content) == (["a film", "b"], [0, 1])
    marked = b"\xef\xbb\xbf" + f'"sep={delimiter}"\n'.encode() + content.partition("\n")[2].encode()
    assert read(tmp_path / "d.csv", marked) == (["a film", "b"], [0, 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,label\na film,0\nthe plot, the cast,1\n",
            "d.csv has 3 cells in line 3, but its first line names 2 columns. Put quotation marks around cells that "
            "hold a comma, or save the data as JSON lines.",
        ),
        (
            "text;label\na film;0\nthe plot\n",
            "d.csv has 1 cells in line 3, but its first line names 2 columns. Put quot",
        ),
        (
            "# data of 2020\ntext,label\na film,0\n",
            "d.csv has 2 cells in line 2, but its first line names 1 column. Remove the lines before the one that",
        ),
        ("text,label\n0,a film,0\n1,the plot,1\n", "d.csv has 3 cells in line 2, but its first line names 2 columns."),
        ("text,text,label\na,b,0\n", "d.csv has several columns of the name 'text'. Rename all but one."),
        ("text,label,label\na,0,1\n", "d.csv has several columns of the name 'label'. Rename all but one."),
        (
            "a good film,1\na bad film,0\n",
            "d.csv has no column 'text'; it has a good film, 1. Name it by `columns={'text': 'NAME'}`, or pairs by "
            "`columns={'text_a': 'NAME', 'text_b': 'NAME'}`, or let the first line of the file name the columns.",
        ),
        ("", "d.csv has no rows; at least one labelled example is needed."),
        ("\n\n", "d.csv has no rows; at least one labelled example is needed."),
        ("text,label\n", "d.csv has no rows; at least one labelled example is needed."),
        (
            '{"text": "a", "label": 0}\n',
            "d.csv is JSON by its content, although its name says otherwise. Let its name end in .jsonl.",
        ),
        ("text,label\na,0\n,1\n", "d.csv has no text in row 1 of text. Repair or remove that row."),
        ("text,label\na,0\nb,\n", "d.csv has no label in row 1; every row needs one."),
        (
            f"text,label\n{'a' * 10_000_001},0\n",
            "d.csv has a cell of more than 10,000,000 characters in line 2. Shorten it; models read only the beginning",
        ),
    ],
)
def test_tables_that_do_not_hold_together(content: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "d.csv", content).startswith(message)


def test_the_limit_of_cells_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert read(tmp_path / "d.csv", f"text,label\n{'film ' * 100_000},0\n")[1] == [0]  # 131,072 is Python's limit
    assert csv.field_size_limit() == before


TABLE = "text,label\nla fin\u00e9,0\nle th\u00e9,1\n"


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.json"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "{} is in UTF-16, but data is read as UTF-8. Save it as UTF-8, as iconv -f UTF-16 -t UTF-8 does."),
        ("utf-32", "{} is in UTF-32, but data is read as UTF-8. Save it as UTF-8, as iconv -f UTF-32 -t UTF-8 does."),
        (
            "latin-1",
            "{} is not in UTF-8 (byte 0xE9 in line 2); it is probably in Latin-1 or Windows-1252. Save it as UTF-8, as "
            "iconv -f WINDOWS-1252 -t UTF-8 does.",
        ),
        (
            "utf-16-le",
            "{} holds a NUL character in line 1; it is UTF-16 without a mark, or not text. Save it as UTF-8.",
        ),
    ],
)
def test_other_encodings_are_named(encoding: str, message: str, name: str, tmp_path: Path) -> None:
    lines = '{"text": "a", "label": 0}\n{"text": "th\u00e9", "label": 1}\n'
    content = TABLE if name in ("d.csv", "d.tsv") else lines
    assert refusal(tmp_path / name, content.encode(encoding)).startswith(message.format(name))


def test_utf_16_without_a_mark(tmp_path: Path) -> None:
    content = "text,label\na film,0\n".encode("utf-16-le")
    assert refusal(tmp_path / "d.csv", content) == (
        "d.csv holds a NUL character in line 1; it is UTF-16 without a mark, or not text. Save it as UTF-8."
    )


# JSON.


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a film", "label": 0}\n{"text": "the plot", "label": 1}\n',
        '\ufeff{"text": "a film", "label": 0}\r\n\r\n{"text": "the plot", "label": 1}',
        '[{"text": "a film", "label": 0}, {"label": 1, "text": "the plot"}]',
        '{\n  "text": "a film",\n  "label": 0\n}\n{\n  "text": "the plot",\n  "label": 1\n}\n',
        '  [\n{"text": "a film", "label": "0", "more": [1]}, {"text": "the plot", "label": 1.0, "other": {}}]\n',
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
def test_how_people_write_json(content: str, suffix: str, tmp_path: Path) -> None:
    assert read(tmp_path / f"d.{suffix}", content) == (["a film", "the plot"], [0, 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a", "label": 0}\n"b"\n',
            'd.jsonl has no object in row 1. Each row must be one, as {"text": "...", ',
        ),
        ("[[1, 2], [3, 4]]", "d.jsonl has no object in row 0. Each row must be one, as"),
        (
            '{"text": "a", "label": 0',
            "d.jsonl cannot be read (Expecting ',' delimiter: line 1 column 25 (char 24)). Rep",
        ),
        ('{"text": "a", "label": 0, "text": "b"}', "d.jsonl has an object with two entries of the name 'text'. Rename"),
        ('{"text": 7, "label": 0}', "d.jsonl has int instead of a text in row 0 of text. Repair or remove that row."),
        ('{"text": "a", "label": 0}\n{"text": "a"}', "d.jsonl has no label in row 1; every row needs one."),
        ('{"text": "a", "label": 0}\n{"label": 1}', "d.jsonl has no text in row 1 of text. Repair or remove that row."),
        ('{"text": "a", "label": NaN}', "d.jsonl has no label in row 0; every row needs one."),
        ('{"data": [{"text": "a", "label": 0}]}', "d.jsonl holds whole columns or tables (data) in one object, not"),
        ('{"text": "a", "label": [0]}', "d.jsonl has the label [0] in row 0; labels must be whole numbers or class"),
        (
            '{"text": ["a"], "label": [0]}',
            "d.jsonl holds whole columns or tables (text, label) in one object, not an object for each row.",
        ),
        ("", "d.jsonl has no rows; at least one labelled example is needed."),
        ("[]", "d.jsonl has no rows; at least one labelled example is needed."),
        ("[" * 100_000, "d.jsonl cannot be read ("),
        (f'{{"text": "a", "label": {"9" * 5000}}}', "d.jsonl cannot be read (Exceeds the limit"),
    ],
)
def test_json_that_is_no_table(content: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "d.jsonl", content).startswith(message)
