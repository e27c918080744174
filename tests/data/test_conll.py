"""Files of tagged words."""

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
    rows = read(tmp_path / "a.conll", type="token-classification", text="w", label="t")
    assert rows == [{"w": ["Ada", "spoke"], "t": ["B-PER", "O"]}, {"w": ["of", "Los"], "t": ["O", "B-LOC"]}]
    options = {"type": "token-classification", "columns": ["text", "kind", "label"]}
    assert read(tmp_path / "a.conll", **options, label="kind")[0] == {"text": ["Ada", "spoke"], "kind": ["NNP", "VBD"]}
    (tmp_path / "a.conll").write_text("Ada B-PER\nspoke\n")
    with pytest.raises(UserError, match=r"a\.conll:2: 'spoke' should be text label"):
        read(tmp_path / "a.conll", type="token-classification")
    with pytest.raises(UserError, match=r"task\.columns should name 'text' and 'label'"):
        read(tmp_path / "a.conll", type="token-classification", columns=["text", "tag"])


@needs_shared
@pytest.mark.parametrize("name, sentences", [("wnut17/train.conll", 3394), ("zh_peopledaily/dev.txt", 4631)])
def test_named_entities_that_people_have(name, sentences):
    assert len(read(SHARED / "ner" / name, type="token-classification")) == sentences
