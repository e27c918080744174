"""The command line as a user meets it: results, help, and what it says about mistakes."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from paths import ROOT
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel, pipeline

from bertlite import __version__, cli, load

COMMANDS = [
    "prepare",
    "pretrain",
    "plan",
    "bench",
    "report",
    "batch",
    "evaluate",
    "finetune",
    "sweep",
    "compare",
    "predict",
    "fill",
    "embed",
    "export",
    "verify",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache, text_files) -> Path:
    """The run folder of a model that has learnt a little."""
    from bertlite.config.loading import load_config
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining.pretrain import run

    folder = tmp_path_factory.mktemp("trained")
    config = {
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        "tokenizer": {"vocab_size": 1000},
        "data": {"train": [text_files["train"]], "validation": [text_files["validation"]], "sequence_length": 64,
                 "cache_dir": cache},
        "train": {"max_steps": 100, "learning_rate": 2e-3, "compile": False, "eval_steps": 50, "save_steps": 50},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    run(load_config(PretrainConfig, folder / "config.yaml"))
    return folder / "run"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, spins, bertlite, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # is restored after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    bertlite("--version")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_version(bertlite):
    assert bertlite("--version") == (0, f"bertlite {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(bertlite, command):
    code, out, _ = bertlite(command, "--help")
    assert code == 0 and f"bertlite {command}" in out.replace("pytest", "bertlite")
    assert command in bertlite("--help")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(bertlite, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, bertlite(command, "--help")[1].splitlines())) <= 80


def test_a_run_says_its_folder_once_and_in_lines_that_fit(bertlite, write_config, tmp_path):
    code, out, err = bertlite("pretrain", write_config(train__max_steps=3))
    assert code == 0 and (out + err).count(str(tmp_path / "run")) == 1
    lines = [line.replace(str(tmp_path.parent), "") for line in err.splitlines()]
    assert max(map(len, lines)) <= 140, max(lines, key=len)


def test_every_command_is_in_this_list():
    assert sorted(command.callback.__name__ for command in cli.app.registered_commands) == sorted(COMMANDS)


def test_prepare_then_pretrain_uses_the_cache(bertlite, write_config, tmp_path):
    path = write_config(data__cache_dir=str(tmp_path / "cache"))
    assert bertlite("prepare", path)[0] == 0
    assert not (tmp_path / "run").exists()
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")}
    assert len(made) == 4
    code, out, err = bertlite("pretrain", path)
    assert (code, out) == (0, f"{tmp_path}/run/model\n"), err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.bin")} == made


def test_a_change_that_the_file_system_hides_is_found_on_request(bertlite, write_config, tmp_path, text_files):
    text = Path(shutil.copy(text_files["train"], tmp_path / "text.txt"))
    path = write_config(data__train=[str(text)], data__cache_dir=str(tmp_path / "cache"))
    bertlite("prepare", path)
    text.write_text(text.read_text(encoding="utf-8").replace("the", "eht"), encoding="utf-8")
    (record,) = [file for file in (tmp_path / "cache/digests").iterdir() if '/text.txt"' in file.read_text()]
    state, status = json.loads(record.read_text()), text.stat()
    state |= {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns, "size": status.st_size}
    record.write_text(json.dumps(state))
    assert "tokenizing" not in bertlite("prepare", path)[2]
    assert "data.train: tokenizing" in bertlite("prepare", path, "--check-content")[2]


def test_out_and_set(bertlite, write_config, tmp_path):
    code, out, _ = bertlite("pretrain", write_config(), "--out", tmp_path / "other", "--set", "train.max_steps=1")
    assert (code, out) == (0, f"{tmp_path}/other/model\n")
    assert json.loads((tmp_path / "other/metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


@pytest.mark.parametrize("text", ["The [MASK] of the state.", "The [MASK] of [MASK] is [MASK]."])
def test_fill_answers_like_the_pipeline(bertlite, trained, text):
    reference = pipeline("fill-mask", model=str(trained / "model"), device="cpu")(text, top_k=5)
    answers = json.loads(bertlite("fill", trained, text, "--json")[1])
    ours, theirs = ([answers], [reference]) if isinstance(reference[0], dict) else (answers, reference)
    assert len(ours) == text.count("[MASK]")
    for mine, other in zip(ours, theirs, strict=True):
        assert [{**answer, "score": 0} for answer in mine] == [{**answer, "score": 0} for answer in other]
        scores = [answer["score"] for answer in other]
        assert [answer["score"] for answer in mine] == pytest.approx(scores, abs=1e-5)


def test_fill_prints_a_line_an_answer(bertlite, trained):
    assert len(bertlite("fill", trained, "A [MASK].", "--top-k", "3")[1].splitlines()) == 3
    assert len(bertlite("fill", trained, "A [MASK].")[1].splitlines()) == 5


def test_evaluate_repeats_the_evaluation_of_the_training(bertlite, trained, text_files):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    code, out, err = bertlite("evaluate", trained, "--data", text_files["validation"], "--json")
    result = json.loads(out)
    assert code == 0 and result.keys() == {"eval_loss", "eval_accuracy"}
    assert "15% of the tokens are masked, the same tokens every time" in err
    assert result["eval_loss"] == pytest.approx(last["eval_loss"], abs=2e-3)  # trained in bf16 where that is faster
    assert result["eval_accuracy"] == pytest.approx(last["eval_accuracy"], abs=5e-3)


def test_evaluate_is_the_loss_of_transformers(trained, text_files):
    """By hand: the rows and masks of the evaluation, the model of transformers."""
    from bertlite.api import LoadedModel
    from bertlite.config.settings import DataSettings
    from bertlite.core.runtime import initialize_runtime
    from bertlite.data.batches import Batches
    from bertlite.data.corpus import prepare_corpus
    from bertlite.data.packing import pack_corpus
    from bertlite.pretraining.evaluate import evaluate_text

    loaded = LoadedModel(trained / "model", initialize_runtime())
    model, tokenizer = loaded.masked_lm, loaded.tokenizer
    files = [text_files["validation"]]
    for length in (64, 33):
        result = evaluate_text(model, tokenizer, files, initialize_runtime(), sequence_length=length)
        data = DataSettings.model_validate({"train": files})
        corpus = prepare_corpus(data.train, tokenizer, data, "text")
        plan = pack_corpus(corpus, length)
        batch = Batches(corpus, plan, tokenizer, length).evaluation(0, len(plan))
        reference = AutoModelForMaskedLM.from_pretrained(trained / "model")
        with torch.inference_mode():
            logits = reference(
                input_ids=batch.input_ids,
                attention_mask=(batch.document_ids[:, :, None] == batch.document_ids[:, None, :])[:, None],
                position_ids=batch.position_ids,
            ).logits
        scored = batch.labels != -100
        logits = logits.gather(1, batch.prediction_positions[..., None].expand(-1, -1, logits.shape[-1]))[scored]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[scored]).item()
        accuracy = (logits.argmax(-1) == batch.labels[scored]).double().mean().item()
        assert result["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert result["eval_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_evaluate_of_minimal_pairs(bertlite, trained, tmp_path):
    lines = [{"sentence_good": good, "sentence_bad": bad, "linguistics_term": "order", "UID": uid}
             for good, bad, uid in [("The state is here.", "State the here is.", "first"),
                                    ("Of the people.", "People the of.", "second")]]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = bertlite("evaluate", trained, "--pairs", tmp_path / "pairs.jsonl")
    assert code == 0 and re.search(r"^pairs_accuracy +[01]\.\d{4}$", out, re.MULTILINE)
    assert re.search(r"^order +\S+% of 2$", out, re.MULTILINE) and re.search(
        r"^  second +\S+% of 1$", out, re.MULTILINE
    )
    result = json.loads(bertlite("evaluate", trained, "--pairs", tmp_path / "pairs.jsonl", "--json")[1])
    assert result.keys() == {"pairs_accuracy", "phenomena"} and result["phenomena"]["order"]["pairs"] == 2
    bf16 = bertlite("evaluate", trained, "--pairs", tmp_path / "pairs.jsonl", "--precision", "bf16", "--json")
    assert bf16[0] == 0


def test_evaluate_of_pseudo_perplexity(bertlite, trained, tmp_path):
    (tmp_path / "text.txt").write_text("The state of the union.")
    result = json.loads(
        bertlite("evaluate", trained, "--data", tmp_path / "text.txt", "--pseudo-perplexity", "--json")[1]
    )
    assert result.keys() == {"eval_loss", "eval_accuracy", "pseudo_perplexity"}
    assert 1 < result["pseudo_perplexity"] < 1e5


@pytest.mark.parametrize("options", [(), ("--pooling", "cls", "--layer", "1", "--normalize", "--sequence-length", "8")])
def test_embed_writes_a_row_a_line(bertlite, trained, tmp_path, options):
    (tmp_path / "text.txt").write_text("The state.\n\nOf the people, by the people and for the people.\n")
    code, out, _ = bertlite("embed", trained, tmp_path / "text.txt", "--out", tmp_path / "v.npy", *options)
    assert (code, out) == (0, f"{tmp_path}/v.npy: 3 vectors of 64\n")
    texts = (tmp_path / "text.txt").read_text().splitlines()
    settings = {"pooling": "cls", "layer": 1, "normalize": True, "sequence_length": 8} if options else {}
    assert np.allclose(np.load(tmp_path / "v.npy"), load(trained).encode(texts, **settings), atol=1e-6)


def test_embed_reads_tables_and_compressed_files(bertlite, trained, tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('{"body": "The state."}\n{"body": ""}\n{"body": "a"}\n')
    for precision in ("fp32", "bf16"):
        code, _, err = bertlite("embed", trained, tmp_path / "rows.jsonl.gz", "--out", tmp_path / f"{precision}.npy",
                                "--column", "body", "--precision", precision)  # fmt: skip
        assert code == 0, err
    exact, rounded = (np.load(tmp_path / f"{precision}.npy") for precision in ("fp32", "bf16"))
    assert exact.shape == (3, 64) and exact.dtype == rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.1


def test_export_is_a_folder_that_transformers_loads(bertlite, trained, tmp_path):
    assert bertlite("export", trained, tmp_path / "out", "--format", "hf")[:2] == (0, f"{tmp_path}/out\n")
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    text = "The state, of the union."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(trained / "model")(
        text
    )
    assert not (tmp_path / "out" / "training").exists()
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    code, _, err = bertlite("export", trained, tmp_path / "out")
    assert code == 2 and str(tmp_path / "out") in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_verify_prints_a_table_and_json(bertlite, trained):
    code, out, _ = bertlite("verify", trained)
    assert code == 0 and out.count(" ok\n") == len(out.splitlines()) - 2
    result = json.loads(bertlite("verify", trained / "checkpoints" / "step-00000050", "--json")[1])
    assert result["ok"] and {check["inputs"] for check in result["checks"]} == {"weights", "padded", "packed", "pair"}
    assert bertlite("verify", trained, "--precision", "bf16")[0] == 0


def test_verify_fails_with_exit_code_1(bertlite, trained, monkeypatch):
    from bertlite.export import parity

    load = parity.load_reference

    def wrong(folder, ours):
        model, surprises = load(folder, ours)
        with torch.no_grad():
            model.bert.encoder.layer[1].attention.self.query.weight[0, 0] += 1e-3
        return model, surprises

    monkeypatch.setattr(parity, "load_reference", wrong)
    code, out, _ = bertlite("verify", trained)
    assert code == 1 and "DIFFERS" in out
    assert json.loads(bertlite("verify", trained, "--json")[1])["ok"] is False


MISTAKES = {
    "unknown key": (("train.learning_rat=1",), "Did you mean train.learning_rate?"),
    "key of another section": (("hidden_size=8",), "Did you mean model.hidden_size?"),
    "wrong type": (("train.max_steps=many",), "train.max_steps is 'many'"),
    "heads": (("model.num_attention_heads=3",), "num_attention_heads is 3, which does not divide hidden_size 32"),
    "missing file": (("data.train=[nowhere.txt]",), "data.train: nowhere.txt"),
    "no match": (("data.validation=['nothing/*.txt']",), "data.validation: nothing/*.txt"),
    "small vocabulary": (("tokenizer.vocab_size=4",), "tokenizer.vocab_size is 4"),
    "long rows": (("data.sequence_length=4096",), "model.max_position_embeddings 512"),
    "no such optimizer": (("train.optim=adam",), "Did you mean adamw?"),
    "no such strategy": (("masking.strategy=words",), "masking.strategy is 'words'"),
    "no such schedule": (("train.lr_scheduler_type=linea",), "Did you mean linear?"),
    "no such activation": (("model.hidden_act=gelo",), "Did you mean gelu?"),
    "no such tokenizer": (("tokenizer.path=./nowhere",), "nowhere"),
    "rate": (("masking.rate=1.5",), "masking.rate is 1.5"),
    "nothing to extend": (("tokenizer.extend=50",), "no tokenizer to extend; set tokenizer.path or model.init_from"),
    "not key=value": (("train.max_steps",), "section.key=value"),
}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("pretrain", "x.yaml", "--max_steps", "100"), "--max_steps is a setting: write --set train.max_steps=100"),
        (
            ("pretrain", "x.yaml", "--train.max_steps=9"),
            "--train.max_steps is a setting: write --set train.max_steps=9",
        ),
        (("plan", "x.yaml", "--gradient-checkpointing"), "write --set train.gradient_checkpointing=VALUE"),
        (("finetune", "x.yaml", "--num_train_epochs", "1"), "write --set train.num_train_epochs=1"),
        (("sweep", "x.yaml", "--output_dir", "out"), "write --set output_dir=out"),
        (("pretrain", "x.yaml", "--nonsense", "1"), None),
        (("evaluate", "model", "--max_steps", "1"), None),  # reads no configuration
    ],
)
def test_an_option_that_is_a_setting_points_to_set(bertlite, arguments, expected):
    code, out, err = bertlite(*arguments)
    assert (code, out) == (2, "") and "No such option" in err
    assert expected in err if expected else "--set" not in err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_is_named(bertlite, write_config, tmp_path, mistake):
    changes, expected = MISTAKES[mistake]
    options = [part for change in changes for part in ("--set", change)]
    code, out, err = bertlite("pretrain", write_config(), *options)
    assert (code, out) == (2, "") and expected in err
    assert len([line for line in err.splitlines() if line.startswith("bertlite: ")]) <= 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"\n \n\n", "there is no text in it"),
        (b"good\n\nb\xe9d\n", ":3: not UTF-8 text (byte 0xe9)"),
    ],
)
def test_a_bad_text_file_is_named(bertlite, write_config, tmp_path, content, expected):
    (tmp_path / "bad.txt").write_bytes(content)
    code, _, err = bertlite("pretrain", write_config(data__train=[str(tmp_path / "bad.txt")]))
    assert code == 2 and "bad.txt" in err and expected in err


def test_a_text_too_short_to_learn_from_is_an_error(bertlite, write_config, tmp_path):
    (tmp_path / "short.txt").write_text("x")
    code, _, err = bertlite("pretrain", write_config(data__train=[str(tmp_path / "short.txt")]))
    assert code == 2 and "the training text has 3 tokens, too few to mask one of them" in err
    assert not (tmp_path / "run").exists()


def test_precision_changes_the_numbers(bertlite, trained, text_files):
    for command in (
        ("evaluate", trained, "--data", text_files["validation"]),
        ("fill", trained, "A [MASK]."),
        ("verify", trained),
    ):
        exact, rounded = (json.loads(bertlite(*command, "--json", "--precision", name)[1]) for name in ("fp32", "bf16"))
        assert exact != rounded


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "out of memory; lower the batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; lower the batch size"),
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
    ],
)
def test_what_the_system_refuses_ends_in_one_line(bertlite, trained, monkeypatch, error, code, message):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr("bertlite.api.load_model", refuse)
    found, _, err = bertlite("fill", trained, "a [MASK]")
    assert found == code and message in err and err.count("\n") == 1


def test_a_held_out_text_too_short_to_measure_by_is_an_error(bertlite, write_config, tmp_path):
    """It is masked at its own rate, whatever that of the training."""
    (tmp_path / "short.txt").write_text("x y")
    config = write_config(data__validation=[str(tmp_path / "short.txt")], masking__rate=0.5)
    code, _, err = bertlite("pretrain", config)
    assert code == 2 and re.search(r"the validation text has \d tokens, too few to mask one of them", err)


def test_a_text_too_short_to_measure_by_is_an_error(bertlite, trained, tmp_path):
    (tmp_path / "short.txt").write_text("the cat")
    code, out, err = bertlite("evaluate", trained, "--data", tmp_path / "short.txt")
    assert code == 2 and not out and "--data: the text is too short to mask one of its tokens" in err


def test_an_unfinished_run_is_told_of(bertlite, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    assert bertlite("fill", tmp_path / "run", "The [MASK].")[2] == ""
    shutil.rmtree(tmp_path / "run" / "model")
    assert (
        "run: the run has not finished; this is its step-00000100" in bertlite("fill", tmp_path / "run", "A [MASK].")[2]
    )


def test_a_vocabulary_without_special_tokens_is_named(bertlite, write_config, tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    code, _, err = bertlite("pretrain", write_config(tokenizer__path=str(tmp_path / "vocab.txt")))
    assert code == 2 and "vocab.txt" in err and "[MASK]" in err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("fill", "{none}", "a [MASK]"), "none"),
        (("verify", "{empty}"), "no readable config.json"),
        (("evaluate", "{none}", "--data", "x.txt"), "none"),
        (("evaluate", "{trained}", "--data", "nowhere.txt"), "--data: nowhere.txt"),
        (("evaluate", "{trained}", "--data", "{text}", "--sequence-length", "4096"), "512 positions"),
        (("fill", "{trained}", "no mask here"), "no [MASK]"),
        (("fill", "{trained}", "[MASK] " * 600), "512 positions"),
        (("fill", "{trained}", "a [MASK]", "--top-k", "100000"), "--top-k"),
        (("fill", "{encoder}", "a [MASK]"), "no masked language modelling head"),
        (("export", "{trained}", "{new}", "--format", "gguf"), "--format is 'gguf'"),
        (("export", "{none}", "{new}"), "none"),
        (("export", "{broken}", "{new}"), "model.safetensors: damaged"),
        (("export", "{trained}", "{new}", "--dtype", "int4"), "--dtype is 'int4'"),
        (("predict", "{trained}", "a text", "--file", "{text}"), "either TEXT or --file"),
        (("evaluate", "{trained}"), "--pairs FILE"),
        (("evaluate", "{trained}", "--pairs", "{text}"), ":1: not valid JSON"),
        (("evaluate", "{trained}", "--pairs", "{text}", "--pseudo-perplexity"), "needs --data FILE"),
        (("embed", "{broken}", "{text}", "--out", "{new}"), "model.safetensors: damaged"),
        (("embed", "{trained}", "{none}", "--out", "{new}"), "FILE: "),
        (("embed", "{trained}", "{text}", "--out", "{none}/v.npy"), "none: there is no such folder"),
        (("embed", "{trained}", "{text}", "--out", "{empty}"), "empty: is a folder; name a file"),
        (("embed", "{trained}", "{text}", "--out", "{new}", "--pooling", "sum"), "--pooling is 'sum'"),
        (("fill", "org/name", "a [MASK]"), "org/name"),
        (("pretrain", "nowhere.yaml"), "nowhere.yaml"),
        (("batch", "{trained}/config.yaml", "--step", "99999"), "--step is 99999, but the steps are 1 to"),
        (("pretrain", "{trained}/config.yaml", "--out", "{text}"), "is a file; name another folder with --out"),
        (("pretrain", "{trained}/config.yaml", "--out", "{text}/run"), "run: cannot be created or written: Not a dir"),
        (("pretrain", "{trained}/config.yaml", "--out", "{encoder}"), "encoder: is not empty and holds no run"),
        (("fill", "{begun}", "a [MASK]"), "begun: this run has no valid checkpoint yet"),
    ],
)
def test_a_wrong_argument_is_named(bertlite, trained, tmp_path, text_files, arguments, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=1000)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    shutil.copytree(tmp_path / "encoder", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    places = {name: tmp_path / name for name in ("none", "empty", "new", "encoder", "broken", "begun")}
    filled = [part.format(trained=trained, text=text_files["train"], **places) for part in arguments]
    code, out, err = bertlite(*filled)
    assert (code, out) == (2, "") and expected in err
    assert not (tmp_path / "new").exists()


def test_what_the_hub_answers_is_told_in_one_line(bertlite):
    with pytest.raises(OSError) as caught:
        snapshot_download("org/name")
    code, _, err = bertlite("fill", "org/name", "a [MASK]")
    assert code == 2 and err.endswith(
        f"no such folder, and the download from the hub failed: {str(caught.value).strip().splitlines()[0]}\n"
    )


def test_a_tokenizer_larger_than_the_embedding_is_named(bertlite, trained, tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=900)
    from transformers import BertForMaskedLM

    BertForMaskedLM(config).save_pretrained(tmp_path / "small")
    for file in (trained / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "small")
    (tmp_path / "text.txt").write_text("a")
    for command in (("fill", "a [MASK]"), ("export", tmp_path / "out"),
                    ("embed", tmp_path / "text.txt", "--out", tmp_path / "v.npy")):  # fmt: skip
        code, _, err = bertlite(command[0], tmp_path / "small", *command[1:])
        assert code == 2 and "1,000 tokens" in err and "900" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "v.npy").exists()


def test_a_long_value_in_a_message_is_cut_in_its_middle(bertlite, trained, tmp_path):
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"add_cross_attention": "a" * 10**6}))
    code, _, err = bertlite("fill", folder, "a [MASK]")
    assert (
        code == 2 and len(err) < 1100 and err.startswith(f"bertlite: {folder}/config.json: add_cross_attention is 'aa")
    )
    assert err.endswith("aa', which bertlite does not have\n") and "aa … aa" in err


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["evaluate", "runs/x", "test.tsv"], "to measure on test.tsv, write --data test.tsv"),
        (["predict", "runs/x", "-5 degrees"], "to read '-5 degrees' as a text, write -- before it"),
        (["embed", "runs/x", "a.csv", "--out", "a.npy", "--column", "a", "--column", "b"], "a second --column"),
    ],
)
def test_a_command_that_was_meant_otherwise_is_explained(bertlite, arguments, hint):
    code, _, err = bertlite(*arguments)
    assert code == 2 and hint in err


@pytest.mark.parametrize(
    "task, message",
    [
        ("train: [a.tsv, b.tsv]", r"task\.train\.path: for several files write a glob"),
        ("train: a.tsv, text: [#1 String]", "what follows # is a comment, unless it is quoted"),
    ],
)
def test_files_and_columns_that_yaml_reads_otherwise_are_explained(bertlite, tmp_path, task, message):
    (tmp_path / "a.yaml").write_text(f"task: {{{task}}}\n")
    code, _, err = bertlite("finetune", tmp_path / "a.yaml", "--model", tmp_path)
    assert code == 2 and re.search(message, err), err


@pytest.mark.parametrize(
    "command, setting, message",
    [
        ("finetune", "train.seeds=3", r"train\.seeds is 3: it should be a list of seeds, such as \[0, 1, 2\]"),
        ("pretrain", "train.budget=5parsecs", r"train\.budget is '5parsecs': neither a time, such as 30m or 24h"),
    ],
)
def test_values_of_another_kind_are_explained(bertlite, command, setting, message):
    config = ROOT / "configs" / ("classification.yaml" if command == "finetune" else "mini.yaml")
    code, _, err = bertlite(command, config, "--set", setting)
    assert code == 2 and re.search(message, err), err


def run_in_shell(*arguments: object, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does, with some of its streams closed."""
    command = f"exec {shlex.join([sys.executable, '-m', 'bertlite', *map(str, arguments)])} {redirection}"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, env=variables)


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command(every_head, redirection):
    result = run_in_shell("fill", every_head["BertForMaskedLM"], "the [MASK]", redirection=redirection)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert bool(result.stdout) == (">&-" not in redirection.replace("2>&-", ""))


def test_a_terminal_that_knows_ascii_alone_gets_escapes(every_head, tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    result = run_in_shell("evaluate", every_head["BertForMaskedLM"], "--data", tmp_path / "für.txt", **ascii_only)
    assert result.returncode == 2 and r"f\xfcr.txt" in result.stderr and "Traceback" not in result.stderr
    (tmp_path / "für.txt").write_text("The president spoke to the people of the city.\n" * 9)
    result = run_in_shell("evaluate", every_head["BertForMaskedLM"], "--data", tmp_path / "für.txt", **ascii_only)
    assert result.returncode == 0 and "loss" in result.stdout, result.stderr


def test_a_home_that_cannot_be_written_is_named(write_config):
    path = write_config(data__cache_dir=None)
    result = run_in_shell("prepare", path, HOME="/dev/null/home", BERTLITE_CACHE="")
    assert result.returncode == 2 and "/dev/null/home" in result.stderr and "Traceback" not in result.stderr
