"""Folders from transformers into bertlite and back, number by number, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FOLDER_SHAPE, assert_same_weights, change_config, change_weights, randomize
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
)

from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError
from bertlite.export import parity
from bertlite.export.parity import check_parity, compare, compare_weights, load_reference, make_inputs
from bertlite.model.architectures import build_encoder
from bertlite.model.attention import KERNELS
from bertlite.model.encoder import Encoder
from bertlite.model.heads import MaskedLanguageModel, SequenceClassifier
from bertlite.model.huggingface import (
    load_model,
    load_weights_for,
    local_folder,
    read_architecture,
    save_model,
    to_hf,
    weight_names,
)
from bertlite.model.layers import ACTIVATIONS

CLASSES: dict[str, Callable[..., Any]] = {
    "masked language model": BertForMaskedLM,
    "encoder with pooler": BertModel,
    "encoder without pooler": partial(BertModel, add_pooling_layer=False),
    "pretraining": BertForPreTraining,  # with a pooler and next-sentence prediction, which have no use here
}

ODD_SHAPES: dict[str, dict[str, Any]] = {
    "one segment": {"type_vocab_size": 1},
    "three segments": {"type_vocab_size": 3},
    "few positions": {"max_position_embeddings": 10},
    "40 positions": {"max_position_embeddings": 40},
    "heads of size 10": {"hidden_size": 30},
    "one head": {"num_attention_heads": 1},
    "narrow feed-forward": {"intermediate_size": 5},
    "one layer": {"num_hidden_layers": 1},
    "five layers": {"num_hidden_layers": 5},
    "small vocabulary": {"vocab_size": 11},
    "larger vocabulary": {"vocab_size": 1003},
    "padding is not 0": {"pad_token_id": 3},
    "no padding": {"pad_token_id": None},
    "small epsilon": {"layer_norm_eps": 1e-12},
    "dropout": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    **{activation: {"hidden_act": activation} for activation in ACTIVATIONS},
}


def make_theirs(kind: str = "masked language model", **changes: Any) -> Any:
    return randomize(CLASSES[kind](BertConfig(**{**FOLDER_SHAPE, **changes})))


def make_ours(kind: str = "masked language model", **changes: Any) -> MaskedLanguageModel | Encoder:
    config = Architecture(**{**FOLDER_SHAPE, **changes})
    if kind == "masked language model":
        return randomize(MaskedLanguageModel(config))
    return randomize(build_encoder(config, pooler=kind == "encoder with pooler"))


def failures(folder: Path, precision: str = "fp32") -> list[parity.Check]:
    return [check for check in check_parity(folder, precision) if not check.ok]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_theirs().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every kind, not to be changed."""
    paths = {kind: tmp_path_factory.mktemp("model") for kind in CLASSES}
    for kind, path in paths.items():
        make_theirs(kind).save_pretrained(path)
    return paths


@pytest.mark.parametrize("precision", parity.TOLERANCES)
@pytest.mark.parametrize("kind", CLASSES)
def test_models_of_transformers_compute_the_same_here(folders, kind, precision):
    assert failures(folders[kind], precision) == []


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("kind", ["masked language model", "encoder with pooler"])
def test_models_of_odd_shapes_compute_the_same_here(tmp_path, kind, shape):
    make_theirs(kind, **ODD_SHAPES[shape]).save_pretrained(tmp_path)
    assert failures(tmp_path) == []


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("kind", ["masked language model", "encoder with pooler"])
def test_models_of_odd_shapes_are_saved_as_they_were_loaded(tmp_path, kind, shape):
    theirs = make_theirs(kind, **ODD_SHAPES[shape])
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    save_model(load_model(tmp_path / "in"), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(
        weight.dtype == after[name].dtype and torch.equal(weight, after[name]) for name, weight in before.items()
    )
    again = type(theirs).from_pretrained(tmp_path / "out")
    assert_same_weights(again, theirs)
    kept = read_architecture(tmp_path / "in")
    assert all(getattr(again.config, name) == value for name, value in kept.model_dump().items())


def test_the_table_compares_every_quantity_for_every_kind_of_input(folders):
    quantities = {
        "masked language model": ["hidden states", "logits", "loss", "gradients"],
        "encoder with pooler": ["hidden states", "pooler", "loss", "gradients"],
        "encoder without pooler": ["hidden states", "loss", "gradients"],
    }
    for kind, expected in quantities.items():
        checks = [(check.inputs, check.quantity) for check in check_parity(folders[kind])]
        compared = [(inputs, quantity) for inputs in ("padded", "packed", "pair") for quantity in expected]
        assert checks[2:] == compared
        assert {inputs for inputs, _ in checks[:2]} == {"weights"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_computes_the_same_as_transformers(folders, kernel):
    ours = load_model(folders["masked language model"], kernel)
    theirs, _ = load_reference(folders["masked language model"], ours)
    for inputs in make_inputs(ours.config).values():
        for quantity, difference in compare(ours, theirs, inputs).items():
            assert difference <= parity.TOLERANCES["fp32"].get(quantity, 1e-5), quantity


# Every weight by kind of model and Hugging Face's name of it.
EVERY_WEIGHT = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in ("masked language model", "encoder with pooler")
    for names in weight_names(make_ours(kind)).values()
    for name in names
]


def change_reference(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Any]) -> None:
    """Change a weight of transformers' model in place."""

    def load_and_change(folder: Path, ours: MaskedLanguageModel | Encoder) -> tuple[nn.Module, list[str]]:
        theirs, odd_names = load_reference(folder, ours)
        with torch.no_grad():
            change(theirs.get_parameter(name))
        return theirs, odd_names

    monkeypatch.setattr(parity, "load_reference", load_and_change)


@pytest.mark.parametrize("kind, name", EVERY_WEIGHT)
def test_one_element_of_any_weight_is_noticed(folders, monkeypatch, kind, name):
    inputs = make_inputs(Architecture(**FOLDER_SHAPE))
    index = inputs["padded"].input_ids[0, 0] if "word_embeddings" in name else 0  # of a token in the inputs
    change_reference(monkeypatch, name, lambda weight: weight[index].view(-1)[:1].add_(1e-3))
    checks = check_parity(folders[kind])
    by_weight = [check for check in checks if check.quantity == "tensors not equal bit for bit"]
    assert [(check.difference, check.ok) for check in by_weight] == [(1.0, False)]
    by_numbers = [check for check in checks if check.inputs != "weights" and not check.ok]
    if name.endswith("key.bias"):
        assert not by_numbers  # it adds the same to all scores of a query, which softmax ignores
    else:
        assert by_numbers


@pytest.mark.parametrize("kind, name", EVERY_WEIGHT)
def test_the_gradient_of_every_weight_is_compared(folders, kind, name):
    ours = load_model(folders[kind], "matmul")
    theirs, _ = load_reference(folders[kind], ours)
    our_name, names = next(item for item in weight_names(ours).items() if name in item[1])

    def spoil(gradient: Tensor) -> Tensor:
        parts = list(gradient.chunk(len(names)))
        parts[names.index(name)] = parts[names.index(name)] + 1e-3 * gradient.norm()
        return torch.cat(parts)

    ours.get_parameter(our_name).register_hook(spoil)
    inputs = make_inputs(Architecture(**FOLDER_SHAPE))["packed"]
    assert compare(ours, theirs, inputs)["gradients"] > parity.TOLERANCES["fp32"]["gradients"]


def test_names_that_only_one_side_has_are_reported(folders):
    """When a folder is compared with a model that has another head."""
    with_head, with_pooler = folders["masked language model"], folders["encoder with pooler"]
    _, unknown = load_reference(with_head, load_model(with_pooler))
    _, missing = load_reference(with_pooler, load_model(with_head))
    head = {f"cls.predictions.transform.{name}" for name in ("dense.weight", "dense.bias", "LayerNorm.weight")}
    assert head <= set(unknown)
    assert head <= set(missing)
    for folder in folders.values():
        assert load_reference(folder, load_model(folder))[1] == []


@pytest.mark.parametrize(
    "kind, module, quantity",
    [
        ("masked language model", "bert.embeddings", "hidden states"),
        ("masked language model", "cls", "logits"),
        ("encoder with pooler", "pooler", "pooler"),
    ],
)
def test_the_worst_of_all_outputs_counts(folders, kind, module, quantity):
    ours = load_model(folders[kind], "matmul")
    theirs, _ = load_reference(folders[kind], ours)

    def change_one_number(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        change = torch.zeros(output.numel())
        change[0] = 1e-3 * output.abs().max()
        return output + change.view_as(output)

    theirs.get_submodule(module).register_forward_hook(change_one_number)
    inputs = make_inputs(Architecture(**FOLDER_SHAPE))["packed"]
    assert 0.2e-3 < compare(ours, theirs, inputs)[quantity] < 2e-3


@pytest.mark.parametrize("name", ["encoder.embeddings.word.weight", "encoder.layers.1.up.bias", "head.bias"])
def test_a_gradient_that_is_not_a_number_is_noticed(folders, name):
    ours = load_model(folders["masked language model"], "matmul")
    theirs, _ = load_reference(folders["masked language model"], ours)
    ours.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)
    inputs = make_inputs(Architecture(**FOLDER_SHAPE))["packed"]
    difference = compare(ours, theirs, inputs)["gradients"]
    assert not parity.Check("packed", "gradients", difference, 1e-5).ok


def test_weights_that_are_not_numbers_are_noticed(folder):
    change_weights(folder, lambda weights: weights | {"cls.predictions.bias": torch.full((600,), math.nan)})
    with pytest.raises(UserError, match=r"cls\.predictions\.bias holds values that are not finite"):
        failures(folder)


def test_a_difference_that_matters_is_noticed_in_bf16(folders, monkeypatch):
    change_reference(monkeypatch, "bert.encoder.layer.0.output.dense.weight", Tensor.neg_)
    failed = {(check.inputs, check.quantity) for check in failures(folders["masked language model"], "bf16")}
    assert {("padded", "logits"), ("padded", "gradients"), ("packed", "logits")} <= failed


OUR_KINDS = ["masked language model", "encoder with pooler", "encoder without pooler"]


@pytest.mark.parametrize("kind", OUR_KINDS)
def test_our_folder_is_the_same_after_transformers_loads_and_saves_it(tmp_path, kind):
    ours = make_ours(kind)
    (tmp_path / "ours").mkdir()
    save_model(ours, tmp_path / "ours")
    options = {"add_pooling_layer": False} if kind == "encoder without pooler" else {}
    auto = AutoModelForMaskedLM if kind == "masked language model" else AutoModel
    theirs, report = auto.from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert type(theirs) is (BertForMaskedLM if kind == "masked language model" else BertModel)
    assert not any(report.values()), report
    weights = dict(theirs.named_parameters())
    assert {name for names in weight_names(ours).values() for name in names} == set(weights)
    for name, names in weight_names(ours).items():
        assert torch.equal(ours.get_parameter(name), torch.cat([weights[their] for their in names])), name
    assert compare_weights(ours, theirs).ok
    assert failures(tmp_path / "ours") == []

    theirs.save_pretrained(tmp_path / "theirs")
    for source in ("ours", "theirs"):
        back = load_model(tmp_path / source)
        assert type(back) is type(ours)
        assert back.config == ours.config
        assert all(parameter.requires_grad for parameter in back.parameters())
        assert_same_weights(back, ours)


def test_every_setting_of_the_architecture_is_kept_by_transformers(tmp_path):
    settings = {
        **FOLDER_SHAPE,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.125,
        "initializer_range": 0.03,
        "pad_token_id": 5,
    }
    ours = make_ours(**settings)
    assert set(settings) == set(Architecture.model_fields)
    save_model(ours, tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert getattr(config, name) == value, name
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == ours.config


def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    ours, theirs = read_architecture(tmp_path), BertConfig.from_pretrained(tmp_path)
    for name in Architecture.model_fields:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_tensors_are_split_as_the_weights_are():
    ours = make_ours()
    numbered = {name: torch.arange(weight.numel()).view_as(weight) for name, weight in ours.named_parameters()}
    split = to_hf(ours, numbered)
    for name, names in weight_names(ours).items():
        assert torch.equal(torch.cat([split[their] for their in names]), numbered[name])


def rename_as_tensorflow_did(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }


def add_what_is_not_used(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {
        "bert.pooler.dense.weight": torch.ones(24, 24),
        "bert.pooler.dense.bias": torch.ones(24),
        "cls.seq_relationship.weight": torch.ones(2, 24),
        "cls.seq_relationship.bias": torch.ones(2),
        "bert.embeddings.position_ids": torch.arange(50)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 50, dtype=torch.long),
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone(),
    }


def keep_the_other_of_equal_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")
    weights["cls.predictions.decoder.weight"] = weights.pop(WORD)
    return weights


@pytest.mark.parametrize("change", [rename_as_tensorflow_did, add_what_is_not_used, keep_the_other_of_equal_tensors])
def test_folders_as_older_tools_wrote_them_are_read(folder, change):
    expected = load_model(folder)
    change_weights(folder, change)
    assert_same_weights(load_model(folder), expected)
    assert failures(folder) == []
    (folder / "out").mkdir()
    save_model(load_model(folder), folder / "out")
    assert_same_weights(BertForMaskedLM.from_pretrained(folder / "out"), make_theirs())


def test_an_encoder_saved_with_other_heads_keeps_its_pooler(tmp_path):
    model = make_theirs("pretraining")
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {n: w for n, w in weights.items() if "cls.predictions" not in n})
    encoder = load_model(tmp_path)
    assert isinstance(encoder, Encoder)
    assert torch.equal(encoder.pooler.dense.weight, model.bert.pooler.dense.weight)


@pytest.mark.parametrize("changes", [{"cls": BertForNextSentencePrediction}, {"tie_word_embeddings": False}])
def test_a_head_that_bertlite_lacks_is_left_out_for_fine_tuning(tmp_path, changes):
    """Next-sentence prediction alone, and a decoder of its own."""
    changes = dict(changes)
    theirs = randomize(changes.pop("cls", BertForMaskedLM)(BertConfig(**{**FOLDER_SHAPE, **changes})))
    theirs.save_pretrained(tmp_path)
    weights = load_weights_for(SequenceClassifier, ["a", "b"], tmp_path)
    assert torch.equal(weights["encoder.layers.1.up.weight"], theirs.bert.encoder.layer[1].intermediate.dense.weight)


def test_weights_in_several_files_are_read(folders, tmp_path):
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load_model(tmp_path), load_model(folders["masked language model"]))
    assert failures(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_read_as_fp32(tmp_path, dtype):
    theirs = make_theirs().to(dtype)
    theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["cls.predictions.bias"].dtype == dtype
    ours = load_model(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert compare_weights(ours, theirs.float()).ok
    assert failures(tmp_path) == []


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write_config(text: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_bytes(text)


def write_weights(text: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").write_bytes(text)


def write_index(text: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        remove_weights(folder)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def index_names(name: str) -> Callable[[Path], Any]:
    """Weights that are there, by a path that leaves the folder or not, and an index with that path."""

    def change(folder: Path) -> None:
        (folder / "part.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        write_index(json.dumps({"weight_map": {"cls.predictions.bias": name.format(folder=folder)}}))(folder)

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_config(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: change_config(folder, **changes)


def with_weight(name: str, tensor: Tensor) -> Callable[[Path], Any]:
    return lambda folder: change_weights(folder, lambda weights: weights | {name: tensor})


WORD = "bert.embeddings.word_embeddings.weight"

# How a folder is made unreadable, and what the message says of it.
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle alone": (only_a_pickle, r"(?s)pytorch_model\.bin is a pickle.*not read\n.*save_pretrained"),
    "no weights": (remove_weights, r"no model\.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no readable config\.json"),
    "config that is no JSON": (write_config(b'{"model_type": "bert",'), r"config\.json: not valid JSON"),
    "config that is no text": (write_config(b"\xff\xfe\x00{"), r"config\.json: not valid JSON"),
    "config that is no object": (write_config(b'["bert"]'), r"config\.json: model_type is None"),
    "deep config": (write_config(b"[" * 100_000), r"config\.json: not valid JSON"),
    "another model": (with_config(model_type="roberta"), r"model_type is 'roberta'"),
    "no model type": (
        with_config(model_type=None),
        r'model_type is None; the weights are those of bert: add "model_type": "bert"$',
    ),
    "relative positions": (
        with_config(position_embedding_type="relative_key"),
        r"position_embedding_type is 'relative_key'",
    ),
    "a decoder": (with_config(is_decoder=True), r"is_decoder is True"),
    "unknown activation": (with_config(hidden_act="silu"), r"hidden_act is 'silu'; bertlite has gelu"),
    "activation that is no name": (with_config(hidden_act=["gelu"]), r"hidden_act is \['gelu'\]"),
    "heads that do not divide": (with_config(num_attention_heads=5), r"num_attention_heads is 5.*hidden_size 24"),
    "size that is no number": (with_config(hidden_size="24"), r"config\.json: hidden_size "),
    "size below 1": (with_config(vocab_size=0), r"config\.json: vocab_size "),
    "more layers in the config": (
        with_config(num_hidden_layers=3),
        r"describes layers 0 to 2, the weights are those of layers \[0, 1\]",
    ),
    "fewer layers in the config": (
        with_config(num_hidden_layers=1),
        r"describes layers 0 to 0, the weights are those of layers \[0, 1\]",
    ),
    "another width in the config": (with_config(hidden_size=30), r"has shape \(600, 24\).*means \(600, 30\)"),
    "another vocabulary in the config": (
        with_config(vocab_size=601),
        rf"{WORD} has shape \(600, 24\).*means \(601, 24\)",
    ),
    "a vector of another shape": (
        with_weight("cls.predictions.bias", torch.ones(2)),
        r"cls\.predictions\.bias has shape \(2,\)",
    ),
    "an unknown weight": (
        with_weight("bert.adapter.weight", torch.ones(2)),
        r"1 are unknown, such as bert\.adapter\.weight",
    ),
    "an untied decoder": (
        with_weight("cls.predictions.decoder.weight", torch.ones(600, 24)),
        r"cls\.predictions\.decoder\.weight differs from bert\.embeddings\.word_embeddings\.weight",
    ),
    "an untied decoder bias": (
        with_weight("cls.predictions.decoder.bias", torch.ones(600)),
        r"cls\.predictions\.decoder\.bias differs from cls\.predictions\.bias",
    ),
    "empty weights": (write_weights(b""), r"model\.safetensors: damaged"),
    "weights that are something else": (write_weights(b"PK\x03\x04" * 100), r"model\.safetensors: damaged"),
    "truncated weights": (truncate, r"model\.safetensors: damaged"),
    "index that leaves the folder": (index_names("../x"), r"index\.json: it names a file outside its folder"),
    "index with a whole path": (index_names("{folder}/part.safetensors"), r"it names a file outside its folder"),
    "index that names the folder above": (index_names(".."), r"damaged|outside its folder"),
    "index of a file that is not there": (index_names("gone.safetensors"), r"gone\.safetensors"),
    "index that is no JSON": (write_index("{"), r"index\.json: not a valid index"),
    "index without a map": (write_index("{}"), r"index\.json: not a valid index"),
    "index that is no object": (write_index("[]"), r"index\.json: not a valid index"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(folder, how):
    spoil, reason = REFUSED[how]
    spoil(folder)
    with pytest.raises(UserError, match=reason) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(UserError, match=reason):
        check_parity(folder)


@pytest.mark.parametrize("has_pickle", [True, False])
def test_a_hub_name_without_safetensors_is_refused_by_that_name(folder, tmp_path_factory, monkeypatch, has_pickle):
    """In the hub's cache: pickles are not downloaded, but another program may have left one there."""
    hub = tmp_path_factory.mktemp("hub")
    repository = hub / "models--org--old"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(folder, repository / "snapshots" / "abc")
    only_a_pickle(repository / "snapshots" / "abc")
    if not has_pickle:
        (repository / "snapshots" / "abc" / "pytorch_model.bin").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    with pytest.raises(UserError) as caught:
        load_model(local_folder("org/old"))
    first, second = str(caught.value).splitlines()
    assert first.startswith("org/old: has no model.safetensors; pytorch_model.bin is a pickle")
    assert 'AutoModelForMaskedLM.from_pretrained("org/old").save_pretrained' in second


def test_every_weight_is_needed(folder):
    complete = load_file(folder / "model.safetensors")
    names = [name for names in weight_names(make_ours()).values() for name in names]
    assert set(names) == set(complete)
    for name in names:
        change_weights(folder, lambda _, name=name: {n: weight for n, weight in complete.items() if n != name})
        with pytest.raises(UserError, match=rf"1 weights are missing, such as {name}$"):
            load_model(folder)


@pytest.mark.parametrize("name", ["./nothing", "/nothing", "~nothing", "a/b/c"])
def test_the_path_of_a_missing_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(UserError, match=f"{name}: no such model folder"):
        local_folder(name)


def test_a_file_is_not_a_model_folder(folder):
    with pytest.raises(UserError, match=r"config\.json: no such model folder"):
        local_folder(str(folder / "config.json"))
    assert local_folder(str(folder)) == folder


def test_saturated_attention_passes_and_a_difference_in_it_is_noticed(tmp_path):
    """Large queries and keys leave gradients that fp32 cannot resolve; a real difference is still seen."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**FOLDER_SHAPE))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight *= 90
            layer.attention.self.key.weight *= 90
    model.save_pretrained(tmp_path)
    checks = check_parity(tmp_path)
    assert any(check.quantity == "gradients in fp64" for check in checks)
    assert all(check.ok for check in checks)
    order = [check.quantity.removesuffix(" in fp64") for check in checks[2:]]
    assert order == 3 * ["hidden states", "logits", "loss", "gradients"]

    ours = load_model(tmp_path).double()
    theirs, _ = load_reference(tmp_path, ours)
    with torch.no_grad():
        theirs.double().bert.encoder.layer[1].attention.self.query.weight[0, 0] += 1e-3
    assert compare(ours, theirs, make_inputs(ours.config)["packed"])["gradients"] > 1e-5
