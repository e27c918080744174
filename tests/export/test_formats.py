"""Exported models load in transformers, onnxruntime and sentence-transformers, and compute the same there."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tiny_models import HEADS, assert_same_weights, change_weights
from tokenizers import normalizers
from transformers import AutoTokenizer, pipeline

from bertlite import load
from bertlite.core.errors import Failure, UserError
from bertlite.export import onnx as export_onnx
from bertlite.export import parity
from bertlite.export.formats import DTYPES, FORMATS, export
from bertlite.export.model_card import describe_run
from bertlite.inference.batching import inference_linear
from bertlite.inference.embed import POOLINGS
from bertlite.model.bert import Pooler
from bertlite.model.huggingface import load_model

TEXTS = ["The state of the union.", "a", "Of the people, by the people and for the people of the state."]
TASKS = {
    "BertForMaskedLM": ("fill-mask", "The [MASK] of the state."),
    "BertForSequenceClassification": ("text-classification", "The state."),
    "BertForTokenClassification": ("token-classification", "The state."),
    "BertForQuestionAnswering": ("question-answering", {"question": "What?", "context": "The state of the union."}),
    "BertModel": ("feature-extraction", "The state."),
}


def theirs_of(folder: Path, head: str) -> torch.nn.Module:
    name = head if head.startswith("Bert") else "BertForSequenceClassification"
    return getattr(transformers, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_hugging_face_folder_is_the_same_model(every_head, tmp_path, head):
    export(every_head[head], tmp_path / "out", "hf")
    before, after = theirs_of(every_head[head], head), theirs_of(tmp_path / "out", head)
    assert_same_weights(after, before)
    kept = ("id2label", "problem_type", "hidden_act", "layer_norm_eps")
    assert all(getattr(before.config, name) == getattr(after.config, name) for name in kept)
    if head in TASKS and head != "BertForQuestionAnswering":  # which has no pipeline any more
        task, text = TASKS[head]
        mine, other = (
            pipeline(task, model=str(path), device="cpu")(text) for path in (tmp_path / "out", every_head[head])
        )
        assert mine == other


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_can_be_stored_in_half_the_bytes(every_head, tmp_path, dtype):
    source = every_head["BertForMaskedLM"]
    export(source, tmp_path / "out", "hf", dtype=dtype)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == DTYPES[dtype] and torch.equal(weight, before[name].to(DTYPES[dtype]))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == DTYPES[dtype]


def test_a_weight_that_fp16_cannot_express_is_named(every_head, tmp_path):
    shutil.copytree(every_head["BertForMaskedLM"], tmp_path / "large")
    change_weights(tmp_path / "large", lambda weights: weights | {"cls.predictions.bias": torch.full((600,), 1e5)})
    with pytest.raises(UserError, match=r"cls\.predictions\.bias holds 1e\+05, more than .*use bf16"):
        export(tmp_path / "large", tmp_path / "out", "hf", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertModel"])
def test_sentence_transformers_gives_the_vectors_of_embed(every_head, tmp_path, head, pooling):
    library = pytest.importorskip("sentence_transformers")
    export(every_head[head], tmp_path / "out", "sentence-transformers", pooling=pooling)
    theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    ours = load(every_head[head]).encode(TEXTS, pooling=pooling)
    assert np.abs(theirs - ours).max() <= 1e-5 * max(1, np.abs(theirs).max())
    assert np.abs(load(tmp_path / "out").encode(TEXTS, pooling=pooling) - ours).max() <= 1e-6 * np.abs(ours).max()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert ("pooler.dense.weight" in saved) == (head == "BertModel")  # none is made up


@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=pytest.mark.slow) if name == "onnx" else name for name in FORMATS]
)
def test_every_format_names_a_tokenizer_class_that_transformers_4_and_5_know(every_head, tmp_path, format):
    """Also where the tokenizer is not BERT's: transformers 5 itself writes TokenizersBackend, which 4 does not know."""
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    source = shutil.copytree(every_head["BertForMaskedLM"], tmp_path / "source")
    backend = AutoTokenizer.from_pretrained(source).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    (source / "tokenizer_config.json").unlink()
    backend.save(str(source / "tokenizer.json"))
    export(source, tmp_path / "out", format, dtype="fp32")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(exported(text)["input_ids"] == backend.encode(text).ids for text in [*TEXTS, "ＳＴＡＴＥ café"])


def run(folder: Path, graph: str, text) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="np", padding=True)
    return onnxruntime.InferenceSession(str(folder / graph)).run(None, dict(inputs)), inputs


def test_a_graph_of_multiple_choice_is_refused(every_head, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="--format onnx has no inputs for several choices"):
        export(every_head["BertForMultipleChoice"], tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


OFTEN = ("BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering")


@pytest.mark.parametrize(
    "head",
    [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
        for name in HEADS
        if name != "BertForMultipleChoice"
    ],
)
def test_onnxruntime_computes_what_transformers_computes(every_head, tmp_path, head):
    """With dynamic axes: other batch sizes, other lengths, padding and pairs."""
    pytest.importorskip("onnxruntime")
    export(every_head[head], tmp_path / "out", "onnx", dtype="fp32")
    theirs = theirs_of(every_head[head], head)
    for text in (TEXTS, TEXTS[:1], [("The state", "of the union"), ("a", "b")], ["people " * 40]):
        outputs, inputs = run(tmp_path / "out", "model.onnx", text)
        with torch.inference_mode():
            output = theirs(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        if head == "BertForQuestionAnswering":
            expected = [output.start_logits, output.end_logits]
        else:
            expected = [output.last_hidden_state, output.pooler_output] if head == "BertModel" else [output.logits]
        assert len(outputs) == len(expected)
        for array, reference in zip(outputs, expected, strict=True):
            assert array.shape == reference.shape
            real = inputs["attention_mask"].astype(bool)
            per_token = array.shape[:2] == real.shape
            difference = np.abs(array - reference.numpy())[real if per_token else ...]
            assert difference.max() <= 1e-5 * max(1, np.abs(reference.numpy()).max())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    assert "backend" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())  # of transformers 5


@pytest.fixture(scope="module")
def decided(every_head, tmp_path_factory) -> Path:
    """A classifier whose scores differ widely."""
    folder = tmp_path_factory.mktemp("decided") / "model"
    shutil.copytree(every_head["BertForSequenceClassification"], folder)
    bias = torch.tensor([0.0, 9.0, 0.0])
    change_weights(folder, lambda weights: weights | {"classifier.bias": bias})
    return folder


def test_int8_is_a_quarter_and_agrees(decided, tmp_path):
    pytest.importorskip("onnxruntime")
    export(decided, tmp_path / "both", "onnx")
    assert {path.name for path in (tmp_path / "both").glob("*.onnx")} == {"model.onnx", "model_int8.onnx"}
    exact, small = (run(tmp_path / "both", name, TEXTS)[0][0] for name in ("model.onnx", "model_int8.onnx"))
    assert not np.array_equal(exact, small) and np.array_equal(exact.argmax(-1), small.argmax(-1))
    assert "model_int8.onnx" in (tmp_path / "both" / "README.md").read_text()


def test_int8_that_decides_otherwise_is_refused_or_left_out(decided, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export_onnx, "AGREEMENT", 1.01)
    with pytest.raises(Failure, match=r"int8: only \d+\.\d% of its decisions are those of fp32"):
        export(decided, tmp_path / "small", "onnx", dtype="int8")
    assert list(tmp_path.iterdir()) == []
    export(decided, tmp_path / "both", "onnx")
    assert [path.name for path in (tmp_path / "both").glob("*.onnx")] == ["model.onnx"]
    assert "left out" in capsys.readouterr().err and "left out" in (tmp_path / "both" / "README.md").read_text()


def test_agreement_is_that_of_the_answers(every_head):
    """By hand, with two graphs that are functions."""

    class Session:
        def __init__(self, shift: int) -> None:
            self.shift, self.calls = shift, 0

        def run(self, _, inputs):
            self.calls += 1
            answers = (inputs["input_ids"] + (self.shift if self.calls % 4 == 0 else 0)) % 600
            return [np.eye(600)[answers]]

    model = load_model(every_head["BertForMaskedLM"])
    tokenizer = AutoTokenizer.from_pretrained(every_head["BertForMaskedLM"])
    graph = export_onnx.Graph(model)
    assert export_onnx._agreement(graph, Session(0), Session(0), tokenizer) == 1
    assert export_onnx._agreement(graph, Session(0), Session(1), tokenizer) == pytest.approx(0.75, abs=0.1)


def need_packages(format: str) -> None:
    for package in FORMATS[format].packages:
        pytest.importorskip(package)


def spoil_weights(patch: pytest.MonkeyPatch) -> None:
    wrong = parity.Check("weights", "tensors not equal bit for bit", 1.0, 0.0)
    patch.setattr(parity, "compare_weights", lambda *models: wrong)


def spoil_graph(patch: pytest.MonkeyPatch) -> None:
    """Let the graph differ from what PyTorch computes."""
    pool = Pooler.forward
    scale = lambda: 1.001 if torch.compiler.is_exporting() else 1.0  # noqa: E731
    patch.setattr(Pooler, "forward", lambda self, hidden: pool(self, hidden) * scale())


def spoil_vectors(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(POOLINGS, "mean", lambda hidden, real: hidden.mean(1) + 1e-3)


SPOIL = {"hf": spoil_weights, "onnx": spoil_graph, "sentence-transformers": spoil_vectors}


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_written_when_a_check_fails(every_head, tmp_path, monkeypatch, format):
    need_packages(format)
    SPOIL[format](monkeypatch)
    with pytest.raises(Failure, match="differ"):
        export(every_head["BertModel"], tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "head, format, options, message",
    [
        ("BertModel", "gguf", {}, "--format is 'gguf', which is not one of hf, onnx, sentence-transformers"),
        ("BertModel", "hf", {"dtype": "int8"}, "--dtype is 'int8'; --format hf has fp32, bf16, fp16"),
        ("BertModel", "onnx", {"dtype": "bf16"}, "--dtype is 'bf16'; --format onnx has fp32, int8"),
        ("BertModel", "sentence-transformers", {"dtype": "fp16"}, "--format sentence-transformers has fp32"),
        ("BertModel", "sentence-transformers", {"pooling": "sum"}, "--pooling is 'sum'; .* has mean, cls, max"),
        ("BertModel", "hf", {"pooling": "mean"}, "--pooling is 'mean'; --format hf has no pooling"),
        ("regression", "sentence-transformers", {}, "cannot express a SequenceClassifier"),
    ],
)
def test_what_a_format_cannot_express_is_named(every_head, tmp_path, head, format, options, message):
    with pytest.raises(UserError, match=message):
        export(every_head[head], tmp_path / "out", format, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].packages])
def test_a_package_that_is_missing_is_named(every_head, tmp_path, monkeypatch, format):
    monkeypatch.setattr("bertlite.core.packages.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{format} needs .*: pip install 'bertlite\[{format}\]'"):
        export(every_head["BertModel"], tmp_path / "out", format)


def test_the_model_card_describes_the_run(every_head, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(every_head["BertForMaskedLM"], run / "model")
    shutil.copytree(every_head["BertForMaskedLM"], run / "checkpoints" / "step-00000002")
    state = run / "checkpoints" / "step-00000002" / "training" / "state.json"
    state.parent.mkdir()
    state.write_text('{"progress": {"step": 2, "tokens": 2345}}')
    config = {"data": {"train": ["/home/me/books.txt", {"dataset": "org/set", "split": "train"}],
                       "validation": [{"dataset": "/home/me/valid", "split": "train"}]},
              "train": {"learning_rate": 0.125}, "output_dir": "/home/me/run"}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": step, "tokens": 1000 * step, "eval_loss": 9 - step / 10, "eval_accuracy": step / 100,
              "elapsed_seconds": 1.0} for step in range(1, 41)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    export(run / "model", tmp_path / "out", "hf", licence="mit", run=run)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["pipeline_tag"], front["library_name"]) == ("mit", "fill-mask", "transformers")
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "valid" and result["task"]["type"] == "fill-mask"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"loss": 5.0, "accuracy": 0.4}
    assert "Trained on books.txt, org/set; validated on valid." in card and "/home" not in card
    assert "Tokens seen: 40,000 in 40 steps." in card and "learning_rate: 0.125" in card
    curve = re.findall(r"^\| (\d+) \| ([\d,]+) \| (\S+) \| (\S+) \|$", card, re.MULTILINE)
    assert 5 <= len(curve) <= 11 and curve[0][0] == "1" and curve[-1] == ("40", "40,000", "5.000", "40.0%")
    for check in parity.check_parity(tmp_path / "out"):
        assert f"| {check.inputs} | {check.quantity} | {check.difference:.1e} |" in card

    # The recipe of a sweep's model is that of its best trial.
    best = {"task": {"train": "sample", "validation": "sample"}, "train": {"learning_rate": 0.25}}
    (run / "config.yaml").write_text(yaml.safe_dump({**best, "sweep": {"space": {"train.learning_rate": [0.25, 1.0]}}}))
    (run / "best.yaml").write_text(yaml.safe_dump(best))
    assert "learning_rate: 0.25" in "".join(describe_run(run / "model", run, "fill-mask")[0])
    (run / "best.yaml").unlink()

    # A config.yaml that bertlite did not write is not published.
    shutil.copytree(every_head["BertForMaskedLM"], tmp_path / "mine")
    for text in ("database: {password: hunter2}", "data: {root: x}", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert "hunter2" not in "".join(describe_run(tmp_path / "mine", tmp_path, "fill-mask")[0])
        (run / "model").with_name("config.yaml").write_text(text)
        assert "says nothing" in describe_run(run / "model", run, "fill-mask")[0][0]
        assert "config.yaml cannot be read, so the model card says nothing about the training" in caplog.text
        caplog.clear()
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    export(run / "checkpoints" / "step-00000002", tmp_path / "early", "hf", run=run)
    card = (tmp_path / "early" / "README.md").read_text()
    assert "Tokens seen: 2,345 in 2 steps." in card and "license: unknown" in card


def test_the_model_card_describes_a_task_or_says_that_nothing_is_known(every_head, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(every_head["BertForSequenceClassification"], run / "model")
    labels = {"```": 1.0, "a\n```\n# b": 2.0, "$x_1|<b>": 1.0}
    config = {"task": {"type": "classification", "train": "../data/train.tsv", "class_weights": labels}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    results = {"metric": "accuracy", "mean": 0.875, "std": 0.0125, "measured_on": "test", "seeds": {"0": {}, "1": {}}}
    (run / "results.json").write_text(json.dumps(results))
    export(run / "model", tmp_path / "out", "hf", run=run)
    card = (tmp_path / "out" / "README.md").read_text()
    (result,) = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}] and result["dataset"]["name"] == "test"
    assert "accuracy: 0.8750 ± 0.0125 over 2 seeds, on the test examples." in card and "train: train.tsv" in card
    fence, recipe, rest = re.search(r"\n(`+)yaml\n(.*?)\n\s*\1(`*\n.*)", card, re.DOTALL).groups()
    assert yaml.safe_load(recipe)["task"]["class_weights"] == labels and rest.startswith("\n\n## Checks"), fence
    export(every_head["BertModel"], tmp_path / "bare", "hf")
    assert "says nothing about its training" in (tmp_path / "bare" / "README.md").read_text()


# The other formats have one example for all heads.
@pytest.mark.parametrize(
    "format, head", [(name, head) for name in FORMATS for head in (TASKS if name == "hf" else ["BertForMaskedLM"])]
)
def test_the_example_of_the_model_card_runs(every_head, tmp_path, monkeypatch, format, head):
    need_packages(format)
    export(every_head[head], tmp_path / "out", format)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    exec(example, {})
    if format == "onnx":  # a text that is longer than the model's positions
        exec(example.replace("A sentence.", "The people of the state. " * 30), {})


def test_a_model_in_python(every_head):
    model = load(str(every_head["BertForMaskedLM"]))
    assert any(getattr(module, "linear", None) is inference_linear for module in model.model.modules())
    text = "The [MASK] of the state."
    reference = pipeline("fill-mask", model=str(every_head["BertForMaskedLM"]), device="cpu")(text, top_k=3)
    predictions = model.fill(text, top_k=3)
    assert [entry["token"] for entry in predictions] == [entry["token"] for entry in reference]
    expected = pytest.approx([entry["score"] for entry in reference], abs=1e-5)
    assert [entry["score"] for entry in predictions] == expected
    with pytest.raises(UserError, match="no masked language modelling head"):
        load(every_head["BertModel"]).fill(text)
