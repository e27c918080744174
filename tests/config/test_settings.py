"""The YAML: the contract's defaults, what people write, and that every mistake is named."""

from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bertlite.config.fields import Section
from bertlite.config.finetune_settings import FinetuneConfig, SweepConfig
from bertlite.config.loading import choose, diff_configs, dump_config, load_config
from bertlite.config.settings import (
    DataSettings,
    MaskingSettings,
    ModelSettings,
    PretrainConfig,
    Source,
    TokenizerSettings,
    TrainSettings,
)
from bertlite.core.errors import UserError
from bertlite.training.run_folder import MAY_DIFFER_ON_RESUME

# The contract of design.md, word for word but for the files.
CONTRACT = """
model:      {hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 1024}
tokenizer:  {path: null, vocab_size: 30522, lowercase: true}    # path: a folder, vocab.txt, tokenizer.json or hub name
data:       {train: [sample], sequence_length: 128, document: blank-line,   # or: line
             cache_dir: null}
masking:    {strategy: token, rate: 0.15}
train:
  max_steps: 1200
  global_batch_size: 32         # rows of sequence_length per optimizer step, over all ranks and accumulation steps
  per_device_train_batch_size: null   # sets accumulation; null: as large as fits
  gradient_checkpointing: false
  optim: adamw
  learning_rate: 4e-4
  weight_decay: 0.01
  warmup_ratio: 0.06
  lr_scheduler_type: linear
  max_grad_norm: 1.0
  precision: auto               # auto | fp32 | bf16
  compile: auto                 # auto | true | false
  seed: 0
  logging_steps: 10
  eval_steps: 200
  save_steps: 200
  save_total_limit: 3
output_dir: runs/mini           # --out overrides
"""
SHORTEST = "data: {train: [sample]}\n"


@pytest.fixture
def load(tmp_path):
    """Load YAML text with overrides."""

    def load_text(text, *overrides):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(PretrainConfig, path, overrides)

    return load_text


@pytest.fixture
def complaint(load, tmp_path):
    """The message about YAML text with overrides. It begins with the file or the override, and is short."""

    def message(text, *overrides):
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        lines = str(caught.value).splitlines()
        assert lines and len(lines) <= 5
        for line in lines:
            assert line.startswith((f"{tmp_path / 'mine.yaml'}:", "--set "))
            assert "pydantic" not in line and "Traceback" not in line and len(line) < 400
        return str(caught.value)

    return message


def test_shortest_config_has_the_contracts_values(load):
    shortest, contract = load(SHORTEST), load(CONTRACT)
    assert list(diff_configs(shortest, contract)) == []
    assert shortest == contract


def test_contracts_model_settings_have_hugging_faces_defaults(load):
    """Those that the contract names without a value; dropout alone is 0 in pretraining."""
    from transformers import BertConfig

    model, bert = load(SHORTEST).model, BertConfig()
    for name in ("hidden_act", "max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps"):
        assert getattr(model, name) == getattr(bert, name)
    assert (model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (0, 0)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", ".1e-3", "0.0001", "100e-6"])
def test_numbers_are_read_as_people_write_them(load, text):
    assert load(SHORTEST + f"train: {{learning_rate: {text}}}").train.learning_rate == 1e-4
    assert load(SHORTEST, f"train.learning_rate={text}").train.learning_rate == 1e-4


@pytest.mark.parametrize(
    "name", ["1e4", "12E3", "null", "true", "1.5", "2024-01-01", "a: b", "# a", "Ünïcode 文", "*a"]
)
def test_quoted_words_stay_words(load, name):
    config = load(f"data: {{train: ['{name}']}}\noutput_dir: '{name}'")
    assert config.data.train == [Source(path=name)] and config.output_dir == name


def test_one_file_needs_no_list(load):
    config = load("data: {train: sample, validation: valid.txt}")
    assert config.data.train == [Source(path="sample")] and config.data.validation == [Source(path="valid.txt")]


def test_a_byte_order_mark_is_dropped(load):
    assert load("\ufeff" + SHORTEST) == load(SHORTEST)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps=7", {"train": {"max_steps": 7}}),
        ("train.learning_rate=3e-5", {"train": {"learning_rate": 3e-5}}),
        ("train.compile=false", {"train": {"compile": False}}),
        ("train.compile=auto", {"train": {"compile": "auto"}}),
        ("train.per_device_train_batch_size=null", {"train": {"per_device_train_batch_size": None}}),
        ("data.train=[b.txt, c d.txt]", {"data": {"train": [Source(path="b.txt"), Source(path="c d.txt")]}}),
        ("data.train=b.txt", {"data": {"train": [Source(path="b.txt")]}}),
        ("data.validation=[]", {"data": {"validation": []}}),
        ("tokenizer.path=a=b", {"tokenizer": {"path": "a=b"}}),
        ("output_dir=runs/other", {"output_dir": "runs/other"}),
        ("masking={rate: 0.3}", {"masking": {"rate": 0.3}}),
        (" train.seed = 5", {"train": {"seed": 5}}),
    ],
)
def test_set_overrides_the_file(load, override, expected):
    text = yaml.safe_dump(
        {
            "data": {"train": ["a.txt"], "validation": ["v.txt"]},
            "train": {"max_steps": 3, "learning_rate": 1.0, "compile": True, "per_device_train_batch_size": 4},
            "masking": {"rate": 0.2},
            "tokenizer": {"path": "vocab.txt"},
            "output_dir": "runs/one",
        }
    )
    before, after = load(text), load(text, override)
    changed = diff_configs(before, after)
    assert len(changed) == 1
    for section, values in expected.items():
        if isinstance(values, dict):
            assert {name: getattr(getattr(after, section), name) for name in values} == values
        else:
            assert getattr(after, section) == values


def test_the_last_set_counts_and_missing_sections_appear(load):
    config = load(SHORTEST, "train.max_steps=1", "train.max_steps=2", "masking.rate=0.4")
    assert config.train.max_steps == 2 and config.masking.rate == 0.4


def test_set_may_give_the_whole_config(load):
    assert load("", "data.train=[sample]") == load(SHORTEST)


PATHS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20),
        st.sampled_from(
            ["1e4", "7E10", "1e-5", ".5e1", "on", "~", "null", "0x1f", "1_000", "2024-01-01", "- a", "<<", "="]
        ),
    ),
    min_size=1,
    max_size=3,
)
FRACTION = st.floats(0, 1, exclude_min=True, exclude_max=True)
COUNT = st.integers(1, 2**40)
CONFIGS = st.builds(
    PretrainConfig,
    model=st.builds(
        ModelSettings,
        hidden_size=st.integers(1, 100).map(lambda heads: heads * 12),
        num_attention_heads=st.sampled_from([1, 2, 3, 4, 6, 12]),
        max_position_embeddings=st.integers(512, 10_000),
        hidden_dropout_prob=FRACTION,
        layer_norm_eps=FRACTION,
    ),
    tokenizer=st.builds(
        TokenizerSettings, path=st.none() | PATHS.map(lambda paths: paths[0]), vocab_size=st.integers(6, 10**6)
    ),
    data=st.builds(
        DataSettings,
        train=PATHS,
        validation=PATHS,
        validation_split=FRACTION,
        sequence_length=st.integers(8, 512),
        document=st.sampled_from(["blank-line", "line"]),
        cache_dir=st.none() | PATHS.map(lambda paths: paths[0]),
    ),
    masking=st.builds(MaskingSettings, rate=FRACTION),
    train=st.builds(
        TrainSettings,
        max_steps=COUNT,
        per_device_train_batch_size=st.none() | COUNT,
        learning_rate=st.floats(0, 1e30, exclude_min=True),
        gradient_checkpointing=st.booleans(),
        compile=st.sampled_from([True, False, "auto"]),
        seed=st.integers(0, 2**32 - 1),
    ),
    output_dir=PATHS.map(lambda paths: paths[0]),
)


@settings(deadline=None)
@given(config=CONFIGS)
@example(config=PretrainConfig(data=DataSettings(train=["sample"]), output_dir="1e4"))
def test_what_is_dumped_loads_to_an_equal_object(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(PretrainConfig, path)
    assert again == config
    assert type(again.train.compile) is type(config.train.compile)
    assert dump_config(again) == dump_config(config)


def test_dump_is_complete(load):
    dumped = yaml.safe_load(dump_config(load(SHORTEST)))
    assert set(yaml.safe_load(CONTRACT)) <= set(dumped)
    for section, values in yaml.safe_load(CONTRACT).items():
        if isinstance(values, dict):
            assert set(values) <= set(dumped[section])


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        # unknown keys: where they were probably meant to go
        ("dat: {train: [a]}", ["dat is not a setting", "Did you mean data?"]),
        ("data: {train: [a]}\ntrian: {max_steps: 3}", ["trian is not a setting", "Did you mean train?"]),
        ("data: {train: [a]}\ntrain: {learning_rat: 1}", ["train.learning_rat", "Did you mean train.learning_rate?"]),
        (
            "data: {train: [a]}\nmodel: {dropout_prob: 0}",
            ["model.dropout_prob", "Did you mean model.hidden_dropout_prob?"],
        ),
        ("data: {train: [a]}\nlearning_rate: 1e-4", ["learning_rate is not", "Did you mean train.learning_rate?"]),
        ("data: {train: [a]}\nmax_steps: 4", ["max_steps is not", "Did you mean train.max_steps?"]),
        (
            "data: {train: [a]}\ntrain: {sequence_length: 4}",
            ["train.sequence_length", "Did you mean data.sequence_length?"],
        ),
        ("data: {train: [a], qqqqqqqq: 4}", ["data.qqqqqqqq is not a setting"]),
        # wrong types: nothing is converted in silence
        ("data: {train: [a]}\ntrain: {max_steps: many}", ["train.max_steps is 'many'", "integer"]),
        ("data: {train: [a]}\ntrain: {max_steps: 1.5}", ["train.max_steps is 1.5", "integer"]),
        ("data: {train: [a]}\ntrain: {max_steps: '5'}", ["train.max_steps is '5'", "integer"]),
        ("data: {train: [a]}\ntrain: {max_steps: true}", ["train.max_steps is true", "integer"]),
        ("data: {train: [a]}\ntrain: {max_steps: null}", ["train.max_steps is null", "integer"]),
        ("data: {train: [a]}\ntrain: {learning_rate: fast}", ["train.learning_rate is 'fast'", "number"]),
        ("data: {train: [a]}\ntrain: {learning_rate: [1]}", ["train.learning_rate is [1]", "number"]),
        ("data: {train: [a]}\ntrain: {compile: maybe}", ["train.compile is 'maybe'", "auto"]),
        ("data: {train: [a]}\ntrain: {precision: fp16}", ["train.precision is 'fp16'", "bf16"]),
        ("data: {train: [a]}\ntokenizer: {lowercase: 1}", ["tokenizer.lowercase is 1", "boolean"]),
        ("data: {train: [a]}\noutput_dir: 3", ["output_dir is 3", "string"]),
        ("data: {train: [a, 3]}", ["data.train is 3", "section"]),
        ("data: {train: 3}", ["data.train is 3", "section"]),
        ("data: {train: [a], document: lines}", ["data.document is 'lines'", "'blank-line'", "'line'"]),
        ("data: {train: [{path: a, weights: 2}]}", ["data.train.0.weights is not", "Did you mean data.train.weight?"]),
        ("data: {train: [{column: x}]}", ["data.train.path: name either a path or a dataset"]),
        ("data: {train: [{path: a, split: dev}]}", ["data.train.split is 'dev', but belongs to a dataset"]),
        ("task: {train: a}\noutput_dir: x", ["does not read the section task", "bertlite finetune reads this file"]),
        # sections
        ("data: {train: [a]}\ntrain: 5", ["train is 5", "section"]),
        ("data: {train: [a]}\ntrain:", ["train is null", "section"]),
        ("data: {train: [a]}\nmodel: [1, 2]", ["model is [1, 2]", "section"]),
        ("data: corpus.txt", ["data is 'corpus.txt'", "section"]),
        ("", ["data", "missing"]),
        ("data: {}", ["data.train", "missing"]),
        ("data: {train: []}", ["data.train is []"]),
        ("[1, 2]", ["list"]),
        ("5", ["int"]),
        ("just words", ["str"]),
        ("data: {train: [a]}\n5: 3", ["5", "string"]),
        ("data: {train: [a]}\n? [a, b]\n: 3", ["line 2"]),
        # ranges
        ("data: {train: [a]}\nmasking: {rate: 0}", ["masking.rate is 0", "greater than 0"]),
        ("data: {train: [a]}\nmasking: {rate: 1.0}", ["masking.rate is 1.0", "less than 1"]),
        ("data: {train: [a]}\nmasking: {rate: -0.15}", ["masking.rate is -0.15"]),
        ("data: {train: [a]}\nmasking: {rate: .nan}", ["masking.rate is nan"]),
        ("data: {train: [a], validation_split: 1}", ["data.validation_split is 1"]),
        ("data: {train: [a]}\ntrain: {learning_rate: 0}", ["train.learning_rate is 0"]),
        ("data: {train: [a]}\ntrain: {learning_rate: -1e-4}", ["train.learning_rate is -0.0001"]),
        ("data: {train: [a]}\ntrain: {learning_rate: .nan}", ["train.learning_rate is nan"]),
        ("data: {train: [a]}\ntrain: {learning_rate: .inf}", ["train.learning_rate is inf"]),
        ("data: {train: [a]}\ntrain: {warmup_ratio: 1.1}", ["train.warmup_ratio is 1.1"]),
        ("data: {train: [a]}\ntrain: {weight_decay: -1}", ["train.weight_decay is -1"]),
        ("data: {train: [a]}\ntrain: {max_steps: -1}", ["train.max_steps is -1"]),
        ("data: {train: [a]}\ntrain: {global_batch_size: 0}", ["train.global_batch_size is 0"]),
        ("data: {train: [a]}\ntrain: {seed: -1}", ["train.seed is -1"]),
        ("data: {train: [a]}\ntrain: {seed: 4294967296}", ["train.seed is 4294967296"]),
        ("data: {train: [a]}\ntrain: {logging_steps: 0}", ["train.logging_steps is 0"]),
        ("data: {train: [a]}\nmodel: {hidden_dropout_prob: 1}", ["model.hidden_dropout_prob is 1"]),
        ("data: {train: [a]}\nmodel: {num_hidden_layers: 0}", ["model.num_hidden_layers is 0"]),
        ("data: {train: [a], sequence_length: 7}", ["data.sequence_length is 7"]),
        ("data: {train: [a]}\ntokenizer: {vocab_size: 5}", ["tokenizer.vocab_size is 5"]),
        ("data: {train: [a]}\ntokenizer: {vocab_size: -1}", ["tokenizer.vocab_size is -1"]),
        # settings that do not fit each other
        ("data: {train: [a]}\nmodel: {hidden_size: 10}", ["model.num_attention_heads is 4", "hidden_size 10"]),
        (
            "data: {train: [a], sequence_length: 513}",
            ["data.sequence_length is 513", "model.max_position_embeddings 512"],
        ),
        ("data: {train: [a]}\nmodel: {max_position_embeddings: 64}", ["sequence_length is 128", "embeddings 64"]),
        # not YAML
        ("data: {train: [a]\ntrain: 3", ["not valid YAML"]),
        ("data:\n  train: [a]\n\tmax_steps: 3", ["line 3", "not valid YAML"]),
        ("data: {train: [a]}\ndata: {train: [b]}", ["line 2", "data is given twice"]),
        ("data:\n  train: [a]\n  train: [b]", ["line 3", "train is given twice"]),
        ("data: {train: [a]}\ntrain: {seed: 1, 'seed': 2}", ["line 2", "seed is given twice"]),
        ("data: {train: *nowhere}", ["line 1", "not valid YAML"]),
        ("data: !!python/object:os.system {}", ["line 1", "not valid YAML"]),
        ("data: {train: [a]}\noutput_dir: 2001-02-30", ["not valid YAML"]),
        ("a\x00b: 3", ["not valid YAML"]),
        ("{" * 5000, ["not valid YAML"]),
        (
            "a: &a [x, x]\n"
            + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 10)}]\n" for p, c in pairwise("abcdefghijkl")),
            ["line 1", "its aliases make more than 100,000 values"],
        ),
        ("a: &a [*a]", ["line 1", "its aliases make more than"]),
        ("# " + "x" * (1 << 20), ["larger than 1,048,576 bytes"]),
    ],
)
def test_a_mistake_in_the_file_is_named(complaint, text, fragments):
    message = complaint(text)
    assert "mine.yaml" in message and "--set" not in message
    for fragment in fragments:
        assert fragment in message


def test_aliases_and_merge_keys_repeat_sections(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "data: {train: &files [a.txt], validation: *files}\nmodel: &small {hidden_size: 64}\n"
        "train: {<<: {max_steps: 7}, seed: 3}\n"
    )
    config = load_config(PretrainConfig, tmp_path / "mine.yaml")
    assert config.data.validation == config.data.train and (config.train.max_steps, config.train.seed) == (7, 3)


def test_several_mistakes_are_named_together(complaint):
    message = complaint("data: {train: [a]}\ntrain: {max_steps: x, sead: 1}\nmasking: {rate: 2}")
    for fragment in ("train.max_steps is 'x'", "Did you mean train.seed?", "masking.rate is 2"):
        assert fragment in message


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.max_steps=many", ["train.max_steps is 'many'", "integer"]),
        ("train.learning_rat=1", ["train.learning_rat is not a setting", "Did you mean train.learning_rate?"]),
        ("learning_rate=1", ["learning_rate is not a setting", "Did you mean train.learning_rate?"]),
        ("masking.rate=1.5", ["masking.rate is 1.5"]),
        ("train=5", ["train is 5", "section"]),
        ("train={max_steps: x}", ["train.max_steps is 'x'"]),
        ("data.train=[]", ["data.train is []"]),
        ("data.train.0=b.txt", ["data.train"]),
        ("output_dir=1e4", ["output_dir is 10000.0", "string"]),
        ("model.hidden_size=10", ["model.num_attention_heads is 4", "hidden_size 10"]),
        ("data.sequence_length=1000", ["data.sequence_length is 1000", "model.max_position_embeddings 512"]),
        ("model.max_position_embeddings=100", ["data.sequence_length is 128", "model.max_position_embeddings 100"]),
        ("tokenizer.vocab_size=3", ["tokenizer.vocab_size is 3"]),
        ("train.max_steps", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        ("train.max_steps=[1", ["not valid YAML"]),
        ("train.max_steps=!!bool x", ["train.max_steps"]),
        ("train.seed={a: 1, a: 2}", ["train.seed"]),
        ("train.max_steps.more=1", ["train.max_steps"]),
        ("train..seed=1", ["train."]),
        (".=1", []),
    ],
)
def test_a_mistake_in_an_override_names_the_override(complaint, override, fragments):
    message = complaint(SHORTEST, override)
    assert message.startswith(f"--set {override}: ")
    for fragment in fragments:
        assert fragment in message


def test_a_right_override_is_not_blamed_for_the_file(complaint):
    message = complaint(SHORTEST + "masking: {rate: 2}", "train.max_steps=3")
    assert "mine.yaml: masking.rate is 2" in message and "--set" not in message


def test_files_that_cannot_be_read_are_named(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"data: {train: [caf\xe9.txt]}")
    for path, reason in [
        (tmp_path / "nowhere.yaml", "no such configuration file"),
        (tmp_path / "no" / "where.yaml", "no such configuration file"),
        (tmp_path, "directory"),
        (latin, "UTF-8"),
        (latin / "below.yaml", "directory"),
        (Path("nul\0.yaml"), "cannot be read"),
    ]:
        with pytest.raises(UserError) as caught:
            load_config(PretrainConfig, path)
        assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_settings_never_change(load):
    config = load(SHORTEST)
    for section, name, value in [(config.train, "max_steps", 3), (config, "output_dir", "x")]:
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, value)


@pytest.mark.parametrize("config", [PretrainConfig, SweepConfig])
def test_every_setting_is_described(config):
    """The list of settings for people is made of these descriptions."""

    def undescribed(section):
        for name, field in section.model_fields.items():
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, Section):
                    assert part.__doc__ and part.__doc__ != Section.__doc__
                    yield from undescribed(part)
                    break
            else:
                if not field.description:
                    yield f"{section.__name__}.{name}"

    assert list(undescribed(config)) == []


def test_differences_are_dotted_names(load):
    first = load(SHORTEST)
    second = load(SHORTEST, "train.seed=1", "model.hidden_size=512", "output_dir=b", "data.train=[a, b]")
    assert list(diff_configs(first, first)) == []
    assert sorted(diff_configs(first, second)) == ["data.train", "model.hidden_size", "output_dir", "train.seed"]
    assert sorted(diff_configs(second, first)) == sorted(diff_configs(first, second))


def test_what_may_differ_on_resume_is_the_contracts_list_and_exists(load):
    assert {
        f"train.{name}"
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "per_device_train_batch_size",
                     "save_minutes", "on_nonfinite_loss")
    } | {"output_dir", "sweep.trials"} == MAY_DIFFER_ON_RESUME  # fmt: skip
    words = {"output_dir": "other", "train.on_nonfinite_loss": "skip"}
    names = MAY_DIFFER_ON_RESUME - {"sweep.trials"}  # of another kind of configuration
    changes = [f"{name}={words.get(name, 17)}" for name in names]
    assert set(diff_configs(load(SHORTEST), load(SHORTEST, *changes))) == names


def test_choose_names_setting_choices_and_the_one_probably_meant():
    table = {"adamw": 1, "muon": 2}
    assert choose(table, "muon", "train.optim") == 2
    with pytest.raises(UserError, match=r"train.optim is 'adam'.*adamw, muon.*Did you mean adamw\?"):
        choose(table, "adam", "train.optim")
    with pytest.raises(UserError, match=r"train.optim is 'zzz'.*adamw, muon$"):
        choose(table, "zzz", "train.optim")


# Whatever a file holds, the answer is a configuration or a UserError.
SETTINGS = yaml.safe_load(CONTRACT)
ODD_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=10),
        st.dates(),
        st.binary(max_size=5),
        st.sampled_from([0, -1, 2**32, 2**64, 10**400, 1e-300, "auto", "sample", "line", "", "\x00", "1e4", "[a", "~"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
ODD_SECTIONS = {
    name: ODD_VALUES
    | st.fixed_dictionaries(
        {}, optional=dict.fromkeys([*values, "unknown"], ODD_VALUES) if isinstance(values, dict) else {}
    )
    for name, values in SETTINGS.items()
}
ODD_FILES = st.one_of(
    st.text(max_size=60),
    st.text("abdtrin: {}[]-?!&*<>|%@`#'\"\\\n\t01.e~=,", max_size=60),
    st.fixed_dictionaries({}, optional=ODD_SECTIONS).map(lambda values: yaml.dump(values, allow_unicode=True)),
    st.fixed_dictionaries({}, optional=ODD_SECTIONS).map(
        lambda values: SHORTEST + yaml.dump(values, allow_unicode=True)
    ),
)


@settings(max_examples=200, deadline=None)
@given(text=ODD_FILES, override=st.none() | st.text(max_size=20) | st.text("train.max_steps=[{!&*?: 1", max_size=30))
@example(text="? [a, b]\n: 1", override=None)
@example(text="a: !!bool x", override=None)
@example(text="a: !!timestamp x", override=None)
@example(text="a: !!int ''", override=None)
@example(text=SHORTEST + f"train: {{seed: 0x{'f' * 5000}}}", override=None)
@example(text=SHORTEST, override="train.seed=!!bool x")
@example(text=SHORTEST, override="train.seed=!!int ''")
@example(text="a: &a [*a]", override=None)
@example(text="data: &data {train: *data}", override=None)
@example(text="<<: [3]", override=None)
@example(text='data: {train: ["\\ud800"]}', override=None)
@example(text="!!set {a, b}", override=None)
@example(text="--- 1\n--- 2", override=None)
def test_no_file_or_override_ends_in_anything_but_a_user_error(text, override, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(PretrainConfig, path, [] if override is None else [override])
    except UserError as error:
        assert str(error).startswith((f"{path}:", "--set "))
    else:
        assert isinstance(config, PretrainConfig)


@pytest.mark.parametrize("sign", [" ", "\t", "|", ";", "#", ",", "-", ">", "*", "\\t"])
def test_a_delimiter_by_set_is_the_sign_itself(tmp_path, sign):
    path = tmp_path / "task.yaml"
    path.write_text("task: {train: a.txt}")
    task = load_config(FinetuneConfig, path, [f"task.delimiter={sign}"]).task
    assert task is not None and task.delimiter == {"\\t": "\t"}.get(sign, sign)
    assert load_config(FinetuneConfig, path, ["task.delimiter=~"]).task.delimiter is None
    with pytest.raises(UserError, match=r"task\.delimiter is 'ab': string should have at most 1 character"):
        load_config(FinetuneConfig, path, ["task.delimiter=ab"])


def test_a_setting_without_its_section_is_that_of_task(tmp_path):
    (tmp_path / "a.yaml").write_text("text: body\n")
    with pytest.raises(UserError, match=r"text is not a setting\. Did you mean task\.text\?"):
        load_config(FinetuneConfig, tmp_path / "a.yaml")
