"""Files of tagged words."""

import gzip
import json
from pathlib import Path

import pytest
from paths import SHARED

from bertlite.config.finetune_settings import TaskSettings
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.data.tables import read_records

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the development data are not here")


def read(path: Path, **settings) -> list[dict]:
    task = TaskSettings.model_validate({"train": "unread", "type": "token-classification", **settings})
    return [row.columns for row in read_records(DataLocation(path=str(path)), task, "task.train")]


CONLL = "-DOCSTART- -X- O\n\nAda NNP B-PER\nspoke VBD O\n\n\n-DOCSTART- -X- O\nof IN O\nLos NNP B-LOC\n"


def test_conll_columns(tmp_path):
    (tmp_path / "a.conll").write_text(CONLL)
    rows = read(tmp_path / "a.conll", text="w", label="t")
    assert rows == [{"w": ["Ada", "spoke"], "t": ["B-PER", "O"]}, {"w": ["of", "Los"], "t": ["O", "B-LOC"]}]
    named = {"columns": ["text", "kind", "label"], "label": "kind"}
    assert read(tmp_path / "a.conll", **named)[0] == {"text": ["Ada", "spoke"], "kind": ["NNP", "VBD"]}
    assert read(tmp_path / "a.conll", text=0, label=1)[0] == {"0": ["Ada", "spoke"], "1": ["NNP", "VBD"]}
    assert read(tmp_path / "a.conll", text="w", label=-2)[0] == {"w": ["Ada", "spoke"], "-2": ["NNP", "VBD"]}
    with pytest.raises(UserError, match=r"task\.label is 'label', which is not one of the columns text, tag"):
        read(tmp_path / "a.conll", columns=["text", "tag"])
    with pytest.raises(UserError, match=r"a\.conll:3: .* has 3 columns: task\.label should be from -3 to 2, not 3"):
        read(tmp_path / "a.conll", label=3)


def test_a_header_names_the_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("word\tpos\tner\nAda\tNNP\tB-PER\nspoke\tVBD\tO\n")
    names = {"text": "word", "label": "pos"}
    assert read(tmp_path / "a.tsv", **names) == [{"word": ["Ada", "spoke"], "pos": ["NNP", "VBD"]}]
    assert read(tmp_path / "a.tsv", **names, columns=["pos", "word"]) == read(tmp_path / "a.tsv", **names)


def test_a_word_without_its_tag_is_an_error(tmp_path):
    (tmp_path / "a.conll").write_text("Ada B-PER\nspoke\n")
    with pytest.raises(UserError, match=r"a\.conll:2: 'spoke' should have 2 columns, as the first line has"):
        read(tmp_path / "a.conll")
    (tmp_path / "a.conll").write_text("Ada NNP B-PER\nspoke VBD\n")
    with pytest.raises(UserError, match=r"a\.conll:2: 'spoke VBD' should have 3 columns, as the first line has"):
        read(tmp_path / "a.conll")
    with pytest.raises(UserError, match=r"a\.conll:2: 'spoke VBD' should be text kind label"):
        read(tmp_path / "a.conll", columns=["text", "kind", "label"])


def test_blanks_around_tabs_belong_to_no_column(tmp_path):
    (tmp_path / "a.conll").write_text("Ada\tB-PER\nlives  O\nin\tO \nRome \t B-LOC\n")
    (row,) = read(tmp_path / "a.conll")
    assert row == {"text": ["Ada", "lives", "in", "Rome"], "label": ["B-PER", "O", "O", "B-LOC"]}


# Comments of WNUT, GermEval and MultiCoNER, and words that start with #.
COMMENTS = {
    "tabs": ("# text = is O\nis\tO\n#\tO\n#fun\tO\n", ["is", "#", "#fun"], 1),
    "blanks": ("# id 3\n# newdoc\nis O\n# O\n#fun O\n", ["is", "#", "#fun"], 2),
    "four columns": ("# id 3 domain=en\nAda _ _ B-PER\n# _ _ O\nspoke _ _ O\n", ["Ada", "#", "spoke"], 1),
    "a comment with a tab": ("#\tn-tv.de vom 26.02.2005\nAda\tB-PER\nspoke\tO\n", ["Ada", "spoke"], 1),
}


@pytest.mark.parametrize("name", COMMENTS)
def test_comments_are_left_out_and_counted(name, tmp_path, capsys):
    content, words, count = COMMENTS[name]
    (tmp_path / "a.conll").write_text(content)
    assert [row["text"] for row in read(tmp_path / "a.conll")] == [words]
    assert f"a.conll: {count} comment lines (# …) are left out" in capsys.readouterr().err


CONLLU = """\
# sent_id = 1
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\tV\tMood=Imp\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tP\tCase=Acc\t1\tobj\t_\t_
2.1\tel\tel\tDET\tD\t_\t_\t_\t_\t_
3\tmar\tmar\tNOUN\tN\t_\t1\tobl\t_\t_
"""


@pytest.mark.parametrize("name", ["a.conllu", "a.conllu.gz", "a.txt"])
def test_conllu_has_names_of_its_own(name, tmp_path):
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb") as file:
        file.write(CONLLU.encode())
    columns = {"upos": ["VERB", "PRON", "NOUN"], "xpos": ["V", "P", "N"], "deprel": ["root", "obj", "obl"]}
    for label, tags in columns.items():
        assert read(tmp_path / name, label=label) == [{"text": ["Vamos", "nos", "mar"], label: tags}]
    assert read(tmp_path / name, text="lemma", label="upos")[0]["lemma"] == ["ir", "nosotros", "mar"]
    if name != "a.txt":
        with pytest.raises(UserError, match=r"task\.label is 'label', which is not one of the columns id, form, l"):
            read(tmp_path / name)


# The form of Kaggle's annotated corpus: the number of a sentence stands at its first word only.
NUMBERED = 'Sentence #,Word,POS,Tag\nSentence: 1,"""",``,O\n,Ada,NNP,B-per\n,"1,000",CD,O\nSentence: 2,None,NN,O\n'


def test_a_table_with_a_word_per_row(tmp_path):
    (tmp_path / "a.csv").write_text(NUMBERED)
    names = {"sentence": "Sentence #", "text": "Word", "label": "Tag"}
    rows = read(tmp_path / "a.csv", **names)
    assert rows == [{"Word": ['"', "Ada", "1,000"], "Tag": ["O", "B-per", "O"]}, {"Word": ["None"], "Tag": ["O"]}]
    repeated = [{"n": number, "text": word, "label": "O"} for number, word in [(1, "a"), (1, "b"), (2, "c")]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, repeated)))
    assert [row["text"] for row in read(tmp_path / "a.jsonl", sentence="n")] == [["a", "b"], ["c"]]
    repeated[1]["n"] = float("nan")  # as pandas reads an empty cell
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, repeated)))
    assert [row["text"] for row in read(tmp_path / "a.jsonl", sentence="n")] == [["a", "b"], ["c"]]
    for content, message in {
        NUMBERED + "Sentence: 1,x,NN,O\n": r"a\.csv:6: the sentence 'Sentence: 1' continues after another one",
        NUMBERED + ",x,NN,\n": r"a\.csv:6: the word 'x' has no tag",
        "Sentence #,Word,POS,Tag\n,x,NN,O\n": r"a\.csv:2: the first row has no value in the column 'Sentence #'",
        "Word,POS,Tag\nx,NN,O\n": r"task\.sentence: there is no column 'Sentence #'; there are 'Word'",
        "Sentence #,Word,POS\n1,x,NN\n": r"task\.label: there is no column 'Tag'",
    }.items():
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.csv", **names)
    (tmp_path / "a.csv").write_text(NUMBERED)
    with pytest.raises(UserError, match=r"a # after a blank begins a comment in YAML: quote the name, 'Sentence #'"):
        read(tmp_path / "a.csv", **names | {"sentence": "Sentence"})


@needs_shared
@pytest.mark.parametrize("name, sentences", [("wnut17/train.conll", 3394), ("zh_peopledaily/dev.txt", 4631)])
def test_named_entities_that_people_have(name, sentences):
    assert len(read(SHARED / "ner" / name)) == sentences


def test_the_columns_that_were_taken_are_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n")
    with caplog.at_level("INFO", "bertlite"):
        read(tmp_path / "a.txt")
    assert "of 4 columns the first is the word and the last its tag: 'EU' and 'B-ORG'" in caplog.text


def test_the_code_of_a_language_before_each_word_is_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("en:Ada\tB-PER\n" + "en:spoke\tO\n" * 12)
    assert read(tmp_path / "a.txt")[0]["text"][0] == "en:Ada"
    assert "all words begin with 'en:', which is read as a part of them" in caplog.text
    caplog.clear()
    (tmp_path / "a.txt").write_text("en:Ada\tB-PER\n" + "spoke\tO\n" * 12)
    read(tmp_path / "a.txt")
    assert "all words" not in caplog.text
