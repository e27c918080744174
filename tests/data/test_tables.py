"""Labelled tables in every format, and messages about those that cannot be read."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from paths import SHARED

from bertlite.config.finetune_settings import TaskSettings
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.data.columns import get_column
from bertlite.data.tables import read_records

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the development data are not here")


def read(path: Path | str, **settings) -> list[dict]:
    place = settings.pop("place", {"path": str(path)})
    task = TaskSettings.model_validate({"train": "unread", **settings})
    return [row.columns for row in read_records(DataLocation.model_validate(place), task, "task.train")]


WANTED = [{"text": 'He said "no', "label": "1"}, {"text": "fine, thanks", "label": "0"}]
FORMATS = {
    "a.tsv": ('text\tlabel\nHe said "no\t1\nfine, thanks\t0\n', {}),
    "b.csv": ('text,label\r\n"He said ""no",1\r\n"fine, thanks",0\r\n', {}),
    "c.txt": ('1 He said "no\n0 fine, thanks\n', {"columns": ["label", "text"], "delimiter": " "}),
    "d.jsonl": ("\n".join(map(json.dumps, WANTED)) + "\n\n", {}),
    "e.json": (json.dumps(WANTED), {}),
    "f.tsv": ('\ufefftext\tlabel\r\nHe said "no\t1\r\n\r\nfine, thanks\t0', {}),
    "g.data": ('label|text\n1|"He said ""no"\n0|fine, thanks\n', {"delimiter": "|", "quoting": True}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(name, tmp_path):
    text, settings = FORMATS[name]
    for opener, ending in ((open, ""), (gzip.open, ".gz"), (lzma.open, ".xz")):
        with opener(tmp_path / (name + ending), "wb") as file:
            file.write(text.encode())
        assert read(tmp_path / (name + ending), **settings) == WANTED


def test_parquet_and_datasets(tmp_path):
    import datasets

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(WANTED), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == WANTED
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": [names]})
    table = datasets.Dataset.from_list([{"text": "x", "label": 1, "tags": [0, 1]}], features=features)
    datasets.DatasetDict(dev=table).save_to_disk(tmp_path / "saved")
    place = {"dataset": str(tmp_path / "saved"), "split": "dev"}
    assert read("", place=place) == [{"text": "x", "label": "good", "tags": ["bad", "good"]}]
    with pytest.raises(UserError, match=r"saved: there is no split 'nothing'; there are dev"):
        read("", place=place | {"split": "nothing"})


def test_quoted_newlines_and_their_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"two\r\nlines",x\r\nmore,y\r\nwrong\r\n')
    with pytest.raises(UserError, match=r"a\.csv:5: 1 columns, but 2 are named \(text, label\)"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"two\r\nlines",x\r\n')
    assert read(tmp_path / "a.csv") == [{"text": "two\nlines", "label": "x"}]


def test_squad_becomes_flat_records(tmp_path):
    question = {"id": "q", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    document = {"data": [{"title": "t", "paragraphs": [{"context": "Ada did.", "qas": [question]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    answers = {"text": ["Ada"], "answer_start": [0]}
    wanted = {"id": "q", "question": "Who?", "context": "Ada did.", "answers": answers}
    assert read(tmp_path / "a.json", type="question-answering") == [wanted]
    del question["id"]
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"a\.json: object 1: differs from SQuAD: 'id' is missing"):
        read(tmp_path / "a.json", type="question-answering")


def test_the_sample_has_three_splits():
    task = TaskSettings.model_validate({"train": "sample"})
    sizes = [len(read_records(task.train, task, f"task.{part}")) for part in ("train", "validation", "test")]
    assert sizes == [1330, 280, 560]


BAD = {
    "latin": (
        b"text\tlabel\nfine\t1\ncaf\xe9\t0\n",
        {},
        r"bad\.tsv:3: not UTF-8 text \(byte 0xe9\); perhaps cp1252 .* or set task\.encoding",
    ),
    "wide": ("text\tlabel\nfine\t1\n".encode("utf-16"), {}, r"bad\.tsv:1: not UTF-8 .* utf-16"),
    "encoding": (b"a\tb\n", {"encoding": "klingon"}, "the encoding is 'klingon'"),
    "empty": (b"", {}, r"bad\.tsv is empty"),
    "header alone": (b"text\tlabel\n", {}, r"bad\.tsv holds no examples"),
    "twice": (b"text\ttext\nx\ty\n", {}, "duplicate column among text, text"),
    "carriage return": (b"text|label\na\rb|1\n", {"delimiter": "|", "quoting": True}, r"bad\.tsv:2: "),
    "open": (
        b'text,label\n"a ""b"" c",1\n"d,2\ne,3\n',
        {"delimiter": ",", "quoting": True},
        r"bad\.tsv:3: .*unexpected end of data; close each quote",
    ),
    "open, last": (
        b'label,text\n1,a\n2,"b\n3,c\n',
        {"delimiter": ",", "quoting": True},
        r"bad\.tsv:3: .*unexpected end of data",
    ),
    "open within": (
        b'text,label\na,1\n"b,2\nc,3\n"d",4\n',
        {"delimiter": ",", "quoting": True},
        r"bad\.tsv:3: the record that starts here is not valid: ',' expected after '\"'",
    ),
    "fields": (
        b"text\tlabel\nx\ty\tz\n",
        {},
        r"bad\.tsv:2: 3 columns, but 2 are named \(text, label\); the delimiter is '\\t'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(name, tmp_path):
    content, settings, message = BAD[name]
    (tmp_path / "bad.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "bad.tsv", **settings)


def test_other_bad_files(tmp_path):
    for name, content, message in [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("b.jsonl", '{"text": "x"}\n3\n', r"b\.jsonl:2: not a JSON object"),
        ("c.json", "{}", r"c\.json: should be a list of objects"),
        ("d.parquet", "no parquet", r"d\.parquet: not a readable Parquet file"),
        ("e.tsv.gz", "no gzip", r"e\.tsv\.gz: damaged or truncated"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"task\.train: .*nowhere\.tsv: there is no such file"):
        read(tmp_path / "nowhere.tsv")


def test_a_missing_column_lists_those_there_are(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\nx\ty\n")
    task = TaskSettings.model_validate({"train": str(tmp_path / "a.tsv")})
    (row,) = read_records(task.train, task, "task.train")
    with pytest.raises(
        UserError, match=r"a\.tsv:2: task\.text: there is no column 'sentence'; there are 'text', 'label'"
    ):
        get_column(row, "sentence", "task.text")


@pytest.mark.parametrize(
    "name, header, advice",
    [
        ("a.tsv", "1\ta fine film", r"are '1', 'a fine film'; if these are an example and no header, .* task\.columns"),
        ("a.tsv", f"good\t{'a fine film ' * 9}", r"are 'good', 'a fine film .*…'; if these are an example"),
        ("a.csv", "text;label", r"are 'text;label'; ';' seems to separate them: set task\.delimiter, or .* sep=;$"),
        ("a.csv", "body,label", r"there are 'body', 'label'$"),
    ],
)
def test_a_missing_column_tells_of_missing_headers_and_other_delimiters(tmp_path, name, header, advice):
    (tmp_path / name).write_text(f"{header}\n" * 2)
    (row,) = read_records(DataLocation(path=str(tmp_path / name)), TaskSettings(train=DataLocation(path="x")), "")
    with pytest.raises(UserError, match=advice):
        get_column(row, "text", "task.text")


def test_a_row_with_more_tabs_than_names_is_an_error(tmp_path):
    (tmp_path / "a.tsv").write_text("cj99\t0\t*\tThe more you want.\n")
    with pytest.raises(UserError, match=r"a\.tsv:1: 4 columns, but 3 are named \(source, label, text\)"):
        read(tmp_path / "a.tsv", columns=["source", "label", "text"])


def test_a_column_is_not_both_text_and_label():
    for wrong in ({"text": "label"}, {"text": ["first", "second"], "label": "second"}):
        with pytest.raises(ValueError, match=r"text is '(label|second)', and so is label"):
            TaskSettings.model_validate({"train": "unread", **wrong})


ODDITIES = {
    "trec6/train.txt": (5452, {"columns": ["label", "text"], "delimiter": " ", "encoding": "latin-1"}),
    "banking77/train.csv": (10003, {}),
    "cola/train.tsv": (8551, {"columns": ["source", "label", "mark", "text"]}),
    "sst2/train.tsv": (67349, {}),
    "mrpc/dev.tsv": (408, {}),
    "qnli_dev/dev.tsv": (5463, {}),
    "agnews/test.tsv": (7600, {"columns": ["text", "label"]}),
    "chnsenticorp/dev.tsv": (1200, {}),
    "ohsumed23/train.tsv": (3357, {}),
}


@needs_shared
@pytest.mark.parametrize("name", ODDITIES)
def test_files_that_people_have(name):
    count, settings = ODDITIES[name]
    rows = read(SHARED / "finetune" / name, **settings)
    assert len(rows) == count
    if "banking" in name:
        assert len({row["category"] for row in rows}) == 77 and any("\n" in row["text"] for row in rows)
    if "mrpc" in name:
        assert next(iter(rows[0])) == "Quality"  # no byte order mark
    if "agnews" in name:
        assert len({row["label"] for row in rows}) == 4
    if "trec" in name:
        assert {row["label"] for row in rows} == set("012345")


def write_folders(folder: Path, texts: dict[str, list[str]]) -> Path:
    """Texts in folders with the names of their labels, as aclImdb and 20 Newsgroups have them."""
    for label, of_label in texts.items():
        (folder / label).mkdir(parents=True)
        for number, text in enumerate(of_label):
            (folder / label / f"{number}_{number % 3}{'.txt' if number % 2 else ''}").write_text(
                text, encoding="latin-1"
            )
    return folder


def test_folders_of_classes_are_read_as_scikit_learn_reads_them(tmp_path):
    from sklearn.datasets import load_files

    texts = {"pos": ["a café", "two\nlines"], "neg": ["bad", "worse"], "unsup": ["who knows"]}
    folder = write_folders(tmp_path / "train", texts)
    theirs = load_files(folder, encoding="latin-1", shuffle=False)
    expected = {(text, theirs.target_names[target]) for text, target in zip(theirs.data, theirs.target, strict=True)}
    rows = read(folder, encoding="latin-1", text="review", label="opinion")
    assert {(row["review"], row["opinion"]) for row in rows} == expected and len(rows) == 5
    with pytest.raises(UserError, match=r"pos/0_0:1: not UTF-8"):
        read(folder)


@pytest.mark.parametrize("path", ["shards", "shards/train-*.parquet", "shards/*"])
def test_the_shards_of_a_table_are_one_table(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(10)]
    for shard in range(3):
        table = pyarrow.Table.from_pylist(rows[4 * shard : 4 * shard + 4])
        pyarrow.parquet.write_table(table, f"shards/train-0000{shard}-of-00003.parquet")
    assert read(path) == rows == pyarrow.parquet.read_table("shards").to_pylist()


def test_lines_of_fasttext_have_their_labels(tmp_path):
    """Under any name; labels may stand anywhere in the line."""
    (tmp_path / "cooking.train").write_text("__label__a-b __label__c  How  to?\n\n__label__d yes __label__e no\nnone\n")
    assert read(tmp_path / "cooking.train") == [
        {"label": ["a-b", "c"], "text": "How  to?"},
        {"label": ["d", "e"], "text": "yes no"},
        {"label": [], "text": "none"},
    ]


def test_excel_names_its_delimiter(tmp_path):
    content = 'sep=;\r\ntext;label\r\n"one; two\r\nlines";x\r\nthree;y;z\r\n'
    (tmp_path / "a.csv").write_text(content, encoding="utf-8-sig", newline="")
    assert read(tmp_path / "a.csv", on_bad_example="skip") == [{"text": "one; two\nlines", "label": "x"}]
    with pytest.raises(UserError, match=r"a\.csv:5: 3 columns, .* the delimiter is ';'"):
        read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text;label\none, two;x\n")
    with pytest.raises(
        UserError, match=r"b\.csv:2: .* the delimiter is ',', but ';' seems to be: .* sep=;; see .*task\.delimiter"
    ):
        read(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text('text;label\n"one, two";x\n')
    with pytest.raises(UserError, match=r"b\.csv:2: .* not valid: .* but ';' seems to be: .* sep=;"):
        read(tmp_path / "b.csv")


def test_rows_of_another_width_are_left_out_on_request(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text("text\tlabel\nfine\t1\nbroken\ngood\t0\nx\ty\tz\n")
    assert [row["text"] for row in read(tmp_path / "a.tsv", on_bad_example="skip")] == ["fine", "good"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "task.train: left out for their number of columns: 2 rows: " in message and "a.tsv:3: 1 columns" in message
    (tmp_path / "a.tsv").write_text("text\tlabel\nbroken\n")
    with pytest.raises(UserError, match=r"a\.tsv:2: 1 columns"):
        read(tmp_path / "a.tsv", on_bad_example="skip")


def test_columns_may_be_keys_of_nested_objects(tmp_path):
    record = {"data": {"text": "fine", "meta": {"stars": 5}}, "data.id": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = read(tmp_path / "a.jsonl", text="data.text", label=["data.meta.stars"])
    assert row == {**record, "data.text": "fine", "data.meta.stars": 5}
    (row,) = read(tmp_path / "a.jsonl", text="data.id", label=["data.meta.gone"])
    assert row == record


# Two contexts in the form of CMRC 2018 (Cui et al. 2019), with an answer that its context does not have.
CMRC = [
    {
        "context_id": "T_0",
        "context_text": "江苏路街道位于上海市长宁区，面积1.52平方公里。",
        "title": "江苏路街道",
        "qas": [
            {"query_id": "T_0_Q_0", "query_text": "它在哪个城市？", "answers": ["上海市", "上海"]},
            {"query_id": "T_0_Q_1", "query_text": "面积多大？", "answers": ["两平方公里"]},
        ],
    },
    {"context_id": "T_1", "context_text": "他生于1930年。", "qas": [{"query_id": "T_1_Q_0", "query_text": "何时？"}]},
]


@pytest.mark.parametrize("content", [json.dumps(CMRC), "\n".join(map(json.dumps, CMRC)), json.dumps({"data": CMRC})])
def test_cmrc_becomes_flat_records(content, tmp_path):
    """Answers without positions stand where they first occur, as the squad-like release of the same set has them."""
    (tmp_path / "a.json").write_text(content)
    first, second, unanswered = read(tmp_path / "a.json", type="question-answering")
    assert first["question"] == "它在哪个城市？" and first["id"] == "T_0_Q_0"
    assert first["context"] == CMRC[0]["context_text"]
    assert first["answers"] == {"text": ["上海市", "上海"], "answer_start": [7, 7]}
    assert first["context"][7:10] == "上海市" and second["answers"]["answer_start"] == [-1]
    assert unanswered == {"id": "T_1_Q_0", "question": "何时？", "context": "他生于1930年。"}  # of a test set


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.txt"])
def test_a_header_with_the_texts_stands_above_the_columns_of_the_settings(name, tmp_path, caplog):
    sign, columns = "," if name == "a.csv" else "\t", {"text": ["body"], "columns": ["label", "body"]}
    quote = '"' if name == "a.csv" else ""
    for header in (sign.join(["body", "label", "id"]), f"\ufeff{quote}body{quote}{sign}label{sign}id"):
        (tmp_path / name).write_text(f"{header}\n{sign.join(['fine', 'good', '3'])}\n", encoding="utf-8")
        assert read(tmp_path / name, **columns) == [{"body": "fine", "label": "good", "id": "3"}]
        assert f"{name}: its first line names the columns, in place of task.columns" in caplog.text
        caplog.clear()
    (tmp_path / name).write_text(f"label{sign}text\n")  # no column of the texts: an example
    assert read(tmp_path / name, **columns) == [{"label": "label", "body": "text"}]


def test_what_annotators_rejected_in_prodigy_is_left_out_and_counted(tmp_path, caplog):
    answers = ["accept", "reject", "ignore", "accept"]
    records = [{"text": f"t{n}", "label": "x", "_task_hash": n, "answer": answer} for n, answer in enumerate(answers)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level("INFO", "bertlite"):
        assert [record["text"] for record in read(tmp_path / "a.jsonl")] == ["t0", "t3"]
    assert "task.train: left out 2 records of which Prodigy's answer is reject or ignore" in caplog.text
    assert len(read(tmp_path / "a.jsonl", label="answer")) == 4  # a yes or no for each text
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x", "answer": "reject"}\n')  # not Prodigy's
    assert len(read(tmp_path / "a.jsonl")) == 1


def test_parquet_of_the_datasets_library_keeps_the_names_of_classes(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": datasets.Sequence(names)})
    rows = [{"text": "x", "label": 1, "tags": [0, 1]}, {"text": "y", "label": -1, "tags": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    expected = [{"text": "x", "label": "good", "tags": ["bad", "good"]}, {"text": "y", "label": None, "tags": []}]
    assert read(tmp_path / "a.parquet") == expected
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    for metadata in (b"no JSON", b"[]", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'):
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "b.parquet")
        assert [row["label"] for row in read(tmp_path / "b.parquet")] == [1, -1]


def test_race_in_its_own_form(tmp_path):
    """A file of JSON for each article, in folders that are no labels."""
    (tmp_path / "train/high").mkdir(parents=True)
    choices = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    article = {"answers": ["A", "C"], "options": choices, "questions": ["What?", "Who _ ?"], "article": "An article."}
    path = tmp_path / "train/high/1.txt"
    path.write_text(json.dumps(article | {"id": "high1.txt"}))
    rows = read(tmp_path / "train", type="multiple-choice", text=["article", "question"])
    assert [(row["question"], row["options"], row["answer"]) for row in rows] == [
        ("What?", choices[0], "A"),
        ("Who _ ?", choices[1], "C"),
    ]
    assert {(row["article"], row["example_id"]) for row in rows} == {("An article.", "high1.txt")}
    path.write_text(json.dumps(article | {"answers": ["A"]}))
    with pytest.raises(
        UserError, match=r"1\.txt: object 1: questions, options and answers should be lists of one length"
    ):
        read(tmp_path / "train", type="multiple-choice", text=["article", "question"])


def test_a_file_without_the_label_is_for_predict(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,some words\n")
    task = TaskSettings.model_validate({"train": "unread"})
    (record,) = read_records(DataLocation(path=str(tmp_path / "a.csv")), task, "task.test")
    with pytest.raises(UserError, match=r"no column 'label'.*texts without labels are for bertlite predict"):
        get_column(record, "label", "task.label")


def test_a_label_deep_in_an_export_is_named_by_keys_and_numbers(tmp_path):
    result = [{"value": {"choices": ["good"]}, "type": "choices"}]
    record = {"data": {"text": "x"}, "annotations": [{"result": result}]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    label = "annotations.0.result.0.value.choices.0"
    assert read(tmp_path / "a.json", text="data.text", label=label)[0][label] == "good"
    assert label + "1" not in read(tmp_path / "a.json", text="data.text", label=label + "1")[0]
