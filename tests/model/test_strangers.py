"""Untrusted model folders: whatever they hold, they give a model or one line, and nothing else is read or written."""

import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_tokenizers import make_tokenizer
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM

from bertlite.core.errors import UserError
from bertlite.data.tokenizer import load_tokenizer
from bertlite.data.vocabulary import SPECIAL_TOKENS
from bertlite.export.parity import check_parity
from bertlite.inference.fill import fill
from bertlite.model.heads import SequenceClassifier
from bertlite.model.huggingface import load_model, load_tokenizer_of, load_weights_for
from bertlite.training.checkpoint import problem


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """A small model folder that loads."""
    folder = tmp_path_factory.mktemp("valid") / "model"
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    pieces = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(25))]
    make_tokenizer(pieces).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(valid, tmp_path) -> Path:
    return shutil.copytree(valid, tmp_path / "model")


def use(folder: Path) -> None:
    """Do with a model folder all that commands do."""
    model = load_model(folder)
    tokenizer = load_tokenizer_of(folder, model.config)
    fill(model, tokenizer, "w1 [MASK] w2")
    tokenizer("w1 w2 unknown")
    check_parity(folder)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"problem_type": "guessing"}, r"config\.json: problem_type is 'guessing'"),
        ({"add_cross_attention": True}, r"config\.json: add_cross_attention is True"),
        ({"max_position_embeddings": 7}, r"config\.json: max_position_embeddings is 7: Input should be greater than"),
        ({"pad_token_id": 50}, r"config\.json: pad_token_id is 50, outside of the vocabulary of 30"),
        ({"hidden_size": int("9" * 4000)}, r"config\.json: hidden_size is 9{57}\.\.\.: Input should be less"),
        ({"layer_norm_eps": "small"}, r"config\.json: layer_norm_eps is 'small': "),
        ({"dtype": "float99"}, r"model: no tokenizer could be loaded from it: .*float99"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"model: transformers cannot load it: "),
    ],
)
def test_settings_that_one_side_cannot_read_are_named(folder, changes, message):
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        use(folder)


def test_a_file_that_is_larger_than_any_of_its_kind_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("bertlite.core.trust.MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match=r"json: [\d,]+ bytes are too many for a JSON file"):
        use(folder)


@pytest.mark.parametrize("changes", [{"return_dict": False}, {"chunk_size_feed_forward": 7}])
def test_settings_that_change_no_number_are_ignored(folder, changes):
    change_json(folder / "config.json", **changes)
    assert all(check.ok for check in check_parity(folder))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 2] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"safetensors: bert\.encoder\.layer\.1\.output\.dense\.weight holds values that"
    ):
        use(folder)


def test_outputs_that_are_not_finite_end_every_use_in_one_line(folder, tmp_path, bertlite):
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.LayerNorm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 20)
    pair = {"sentence_good": "w1 w2", "sentence_bad": "w2 w1", "UID": "a", "linguistics_term": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    uses = [
        ("fill", folder, "w1 [MASK]", "--json"),
        ("embed", folder, tmp_path / "texts.txt", "--out", tmp_path / "vectors.npy"),
        ("evaluate", folder, "--data", tmp_path / "texts.txt", "--json"),
        ("evaluate", folder, "--pairs", tmp_path / "pairs.jsonl", "--json"),
    ]
    for use_of_model in uses:
        code, output, errors = bertlite(*use_of_model)
        assert code == 1 and output == "" and "the model's outputs are not finite" in errors, use_of_model[0]
    assert not (tmp_path / "vectors.npy").exists()


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leaves_the_folder_is_refused(folder, name):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(Path("..") / name)
    with pytest.raises(UserError, match=f"{name}: a link that leaves its folder"):
        use(folder)
    with pytest.raises(UserError, match=f"{name}: a link that leaves its folder"):
        load_tokenizer(str(folder))


RUN_FILES = [
    "config.yaml",
    "metrics.jsonl",
    "results.json",
    "model",
    "checkpoints/step-00000001/training/manifest.json",
]


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_out_of_a_run_folder_and_pipes_in_it_are_refused(folder, tmp_path, bertlite, name, kind):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    shutil.copytree(folder, run / "checkpoints" / "step-00000001")
    (run / "checkpoints" / "step-00000001" / "training").mkdir()
    (run / "config.yaml").write_text("data: {train: [secret.txt]}\n")
    path = run / name
    shutil.move(path, tmp_path / "outside") if path.exists() else (tmp_path / "outside").write_text("{}")
    path.symlink_to(tmp_path / "outside") if kind == "link" else os.mkfifo(path)
    for arguments in (("fill", run, "w1 [MASK]"), ("export", run, tmp_path / "out")):
        code, _, errors = bertlite(*arguments)
        reason = "a link that leaves its folder" if kind == "link" else "neither a file nor a folder"
        assert code == 2 and f"{path}: {reason}" in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_model_folder_tells_nothing_of_what_lies_beside_it(folder, tmp_path, bertlite):
    run = tmp_path / "mine"
    shutil.copytree(folder, run / "model")
    (run / "config.yaml").write_text("data: {train: [SECRET.txt]}\n")
    for name, expected in ((run / "model", False), (run, True)):
        out = tmp_path / f"out-{expected}"
        assert bertlite("export", name, out)[0] == 0
        assert ("SECRET.txt" in (out / "README.md").read_text()) == expected


def test_names_cannot_write_markdown_or_html_into_the_card(folder, tmp_path, bertlite):
    run, name = tmp_path / "mine", "x\n\n# pwned\n<script>alert(1)</script>![](http://evil/x.png)"
    shutil.copytree(folder, run / "model")
    (run / "config.yaml").write_text(json.dumps({"data": {"train": [name]}}))
    assert bertlite("export", run, tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    description = card[card.index("## Data") : card.index("## Recipe")]
    assert "pwned" in description
    assert not re.search(r"^# |(?<!\\)[<!]|(?<!\\)\[", description, re.MULTILINE)


def test_links_as_the_hub_cache_has_them_are_followed(folder, tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    use(cache / "snapshots" / "abc")
    (cache / "secret").write_text("{}")
    (cache / "snapshots" / "abc" / "added_tokens.json").symlink_to("../../secret")
    with pytest.raises(UserError, match="leaves its folder"):
        use(cache / "snapshots" / "abc")


def test_a_pipe_is_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match=r"config\.json: neither a file nor a folder"):
        use(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**9},
        {"max_position_embeddings": 10**15},
        {"type_vocab_size": 10**18},
        {"hidden_size": 1 << 24, "num_attention_heads": 1 << 24, "vocab_size": 1 << 24, "intermediate_size": 1 << 24},
        {"max_position_embeddings": 1 << 24},
        {"num_hidden_layers": 10_000},
    ],
)
def test_absurd_shapes_are_refused_before_memory_is_allocated(folder, changes):
    change_json(folder / "config.json", **changes)
    message = (
        rf"config\.json: {next(iter(changes))} is \d+: Input should be less than"
        if max(changes.values()) > 1 << 24
        else r"config\.json means \(16777216, |config\.json describes layers 0 to 9999, the weights"
    )
    with pytest.raises(UserError, match=message):
        load_model(folder)
    with pytest.raises(UserError, match=message):
        load_weights_for(SequenceClassifier, ["a"], folder)


@pytest.mark.parametrize("shape", [(), (3,), (0, 8), (10**9, 0)])
def test_a_head_of_an_odd_shape_is_refused(folder, shape):
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "cls." not in name}
    save_file(weights | {"classifier.weight": torch.zeros(shape)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=re.escape(f"classifier.weight has shape {shape}, which no head has")):
        load_model(folder)


def test_an_empty_vocabulary_is_refused(tmp_path):
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="the tokenizer lacks pad_token"):
        load_tokenizer(str(tmp_path))


def test_layers_with_a_gap_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("encoder.layer.1.", "encoder.layer.2."): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"describes layers 0 to 1, the weights are those of layers \[0, 2\]"):
        load_model(folder)


def write_header(path: Path, header: dict, body: bytes = b"", size: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


BIAS = "cls.predictions.bias"


@pytest.mark.parametrize(
    "header, size",
    [
        ({BIAS: {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, None),
        ({BIAS: {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 40]}}, None),
        ({BIAS: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 40]}}, None),
        ({BIAS: {"dtype": "F32", "shape": [0, 10**15], "data_offsets": [0, 0]}}, None),
        ({BIAS: {"dtype": "F32", "shape": [10], "data_offsets": [40, 0]}}, None),
        ({BIAS: {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}, 2**62),
        ({BIAS: {"dtype": "F99", "shape": [10], "data_offsets": [0, 40]}}, None),
        ({}, None),
    ],
)
def test_headers_with_wrong_sizes_are_refused(folder, header, size):
    write_header(folder / "model.safetensors", header, b"\0" * 3000, size)
    with pytest.raises(UserError, match=str(folder)):
        load_model(folder)


def test_code_in_a_folder_never_runs_and_nothing_is_downloaded(folder, tmp_path, monkeypatch):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py"):
        (folder / name).write_text(code)
    maps = {"AutoConfig": "configuration_x.C", "AutoModelForMaskedLM": "modeling_x.M",
            "AutoTokenizer": ["tokenization_x.T", "tokenization_x.T"]}  # fmt: skip
    change_json(folder / "config.json", auto_map=maps, _name_or_path="stranger/model")
    change_json(folder / "tokenizer_config.json", auto_map=maps, tokenizer_class="T", name_or_path="stranger/model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stranger/model"}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    sockets = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: sockets.append(address))
    for attempt in (use, load_model, check_parity):
        try:
            attempt(folder)
        except UserError as error:
            assert str(folder) in str(error)
    assert not sockets and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file"])
def test_a_tokenizer_file_elsewhere_is_not_read(folder, tmp_path, key):
    other = make_tokenizer([*SPECIAL_TOKENS, "secret"])
    other.save_pretrained(tmp_path / "elsewhere")
    change_json(folder / "tokenizer_config.json", **{key: str(tmp_path / "elsewhere" / "tokenizer.json")})
    assert "secret" not in load_tokenizer(str(folder)).get_vocab()


def test_versions_of_a_tokenizer_by_name_are_refused(folder, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.json")
    change_json(folder / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"])
    with pytest.raises(UserError, match="fast_tokenizer_files"):
        use(folder)


def test_ids_beyond_the_embedding_are_refused(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one more"] = 30
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"has 31 tokens, but the model's vocabulary has 30"):
        use(folder)


def test_a_deep_index_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a valid index"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "training/../../secret", "link"])
def test_a_manifest_that_names_files_outside_is_not_a_checkpoint(folder, tmp_path, name):
    (tmp_path / "secret").write_text("x")
    (folder / "training").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    entry = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    (folder / "training" / "manifest.json").write_text(json.dumps({name: entry}) + "\n")
    assert problem(folder) == f"{name} is outside the folder"


ODD = st.recursive(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 1e308, 0.5, "", "x", "../..", "/etc/passwd"]
    ),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type", "id"]), inner, max_size=2)
    ),
    max_leaves=4,
)
PLACES = [*FILES, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "model.safetensors.index.json",
          "adapter_config.json", "vocab.txt", "generation_config.json", "additional_chat_templates"]  # fmt: skip


def places_of(value, at=()):
    """Where in a JSON value something could be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [place for key, inner in list(items)[:60] for place in [(*at, key), *places_of(inner, (*at, key))]]


def spoil(folder: Path, data: st.DataObject) -> None:
    """One change to a valid folder."""
    how = data.draw(st.sampled_from(["flip", "cut", "value", "value", "value", "key", "place", "tensor"]))
    name = data.draw(st.sampled_from([name for name in FILES if (folder / name).is_file()] or ["gone"]))
    path = folder / name
    if not path.exists() or (how in ("flip", "cut") and not path.stat().st_size):
        return
    if how == "flip":
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(len(content), 3000) - 1))
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size))])
    elif how in ("value", "key") and path.suffix == ".json":
        try:
            value = json.loads(path.read_text())
        except ValueError:
            return
        *parents, last = data.draw(st.sampled_from(places_of(value) or [("new",)]))
        inner = value
        for key in parents:
            inner = inner[key]
        if isinstance(inner, dict | list):
            if how == "key" and isinstance(inner, dict):
                inner[data.draw(st.sampled_from(["auto_map", "tokenizer_class", "model_type", "x", "type"]))] = (
                    data.draw(ODD)
                )
            else:
                inner[last] = data.draw(ODD)
        path.write_text(json.dumps(value))
    elif how == "place":
        path = folder / data.draw(st.sampled_from(PLACES))
        if path.is_dir() and not path.is_symlink():
            return
        path.unlink(missing_ok=True)
        kind = data.draw(st.sampled_from(["gone", "folder", "link", "loop", "pipe", "text", "nothing"]))
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/dev/zero")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "gone":
            path.write_bytes(
                data.draw(st.sampled_from([b"[" * 9999, b"{}", b"null", b"\xff"])) if kind == "text" else b""
            )
    elif how == "tensor" and (folder / "model.safetensors").is_file():
        try:
            weights = load_file(folder / "model.safetensors")
        except Exception:  # spoiled already
            return
        some = data.draw(st.sampled_from(sorted(weights)))
        tensor = weights.pop(some)
        if data.draw(st.booleans()):
            weights[some.replace("0", data.draw(st.sampled_from(["1", "99", "99999999999"])))] = tensor.flatten()[:3]
        save_file(weights, folder / "model.safetensors")


@settings(max_examples=200, deadline=60_000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_two_hundred_damaged_folders_give_a_model_or_one_line(valid, tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp() / "spoiled"
    shutil.rmtree(base, ignore_errors=True)
    folder = shutil.copytree(valid, base / "model")
    for _ in range(data.draw(st.integers(1, 3))):
        spoil(folder, data)
    before = {path: path.lstat().st_mtime_ns for path in base.rglob("*")}
    try:
        use(folder)
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
    assert {path: path.lstat().st_mtime_ns for path in base.rglob("*")} == before
