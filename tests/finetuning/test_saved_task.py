"""task.json: a fine-tuned model's folder knows what the model reads."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_tasks import make_records, save_model

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.data.tokenizer import load_tokenizer
from bertlite.export.formats import export
from bertlite.finetuning.finetune import run
from bertlite.finetuning.tasks import TASKS, find_task, input_settings
from bertlite.model.huggingface import load_model


def test_a_run_and_its_exports_keep_the_settings_of_inputs(write, tmp_path):
    records = [{"body": record["text"], "subject": record["label"]} for record in make_records("classification")]
    config = write(records=records, task__text="body", task__label="subject", task__encoding="latin-1")
    run(config)
    model = tmp_path / "run" / "model"  # loaded from a checkpoint, so that checkpoints have it, too
    export(model, tmp_path / "export", "hf", "bf16")
    for folder in (model, tmp_path / "export"):
        saved = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        assert saved == config.task.model_dump(include=set(InputSettings.model_fields))
        assert saved["text"] == ["body"] and saved["encoding"] == "latin-1" and "train" not in saved
        assert input_settings(load_model(folder), load_tokenizer(str(folder))).model_dump() == saved


def test_a_folder_without_it_has_the_defaults_of_its_head(vocabulary, tmp_path):
    for kind in TASKS:
        folder = save_model(vocabulary, kind, tmp_path / kind)
        model, tokenizer = load_model(folder), load_tokenizer(str(folder))
        settings = input_settings(model, tokenizer)
        assert find_task(model) is TASKS[kind] is TASKS[settings.type]
        assert len(settings.text) in TASKS[kind].num_texts and settings.max_length == 128  # positions of the model
        assert not (folder / "task.json").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"task\.json: not valid JSON"),
        ("[" * 100_000, r"task\.json: not valid JSON"),
        ("[]", r"task\.json: should hold the settings of a task, but holds a list"),
        ('{"max_length": 4}', r"task\.json: max_length is 4: it should be greater than or equal to 8"),
        ('{"max_answer_length": 1e30}', r"task\.json: max_answer_length is 1e\+30: it should be a valid integer"),
        ('{"max_answer_length": 1' + "0" * 30 + "}", r"max_answer_length is 10{30}: it should be less than"),
        ('{"maxlength": 40}', r"task\.json: maxlength is not a setting\. Did you mean max_length\?"),
        ('{"train": "/etc/passwd"}', r"task\.json: train is not a setting"),
        ('{"type": "regresion"}', r"task\.json: type is 'regresion'.*Did you mean regression\?"),
        ('{"type": "question-answering"}', r"question-answering of 2 text columns is no task of .* SequenceClassifier"),
        ('{"text": ["a", "b", "c"]}', r"task\.json: text is "),
    ],
)
def test_what_does_not_go_with_the_model_is_named(content, message, vocabulary, tmp_path):
    folder = save_model(vocabulary, "classification", tmp_path / "model")
    (folder / "task.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        find_task(load_model(folder))
    assert len(str(error.value).splitlines()) == 1


def test_a_link_out_of_the_folder_is_not_read(vocabulary, tmp_path):
    folder = save_model(vocabulary, "classification", tmp_path / "model")
    Path(shutil.copy(folder / "config.json", tmp_path / "other.json"))
    (folder / "task.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"task\.json: a link that leaves its folder"):
        load_model(folder)
