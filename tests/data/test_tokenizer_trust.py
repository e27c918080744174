"""Tokenizers of strangers: every real one loads, and those that would run out of memory, hang or crash do not."""

import base64
import json
import struct
from pathlib import Path

import pytest
import transformers
from tiny_tokenizers import make_tokenizer
from transformers import AutoTokenizer

from bertlite.core.errors import UserError
from bertlite.data.tokenizer import load_tokenizer
from bertlite.data.tokenizer_trust import KNOWN_REGEXES, PLAIN_REGEX, check_tokenizer
from bertlite.data.vocabulary import SPECIAL_TOKENS

CLASSES = [
    "BertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "RobertaTokenizer",
    "XLMRobertaTokenizer",
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "MPNetTokenizer",
    "AlbertTokenizer",
    "GPT2Tokenizer",
    "CamembertTokenizer",
    "BigBirdTokenizer",
    "T5Tokenizer",
    "FunnelTokenizer",
    "LayoutLMTokenizer",
    "RemBertTokenizer",
    "XLNetTokenizer",
    "BarthezTokenizer",
    "MBartTokenizer",
    "CLIPTokenizer",
    "NllbTokenizer",
    "Qwen2Tokenizer",
    "Qwen3_5Tokenizer",
    "LlamaTokenizer",
    "GemmaTokenizer",
    "ReformerTokenizer",
    "SeamlessM4TTokenizer",
    "XGLMTokenizer",
]


def charsmap(longest: int) -> str:
    return base64.b64encode(struct.pack("<I", 4) + b"\0\0\0\0" + b"a\0" + b"b" * longest + b"\0").decode()


@pytest.fixture
def folder(tmp_path) -> Path:
    make_tokenizer([*SPECIAL_TOKENS, "a", "b", "c"]).save_pretrained(tmp_path)
    change(tmp_path, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return tmp_path


def change(folder: Path, name: str = "tokenizer.json", **changes) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


@pytest.mark.parametrize("name", [name for name in CLASSES if hasattr(transformers, name)])
def test_tokenizers_that_transformers_builds_are_allowed(name, tmp_path):
    getattr(transformers, name)().save_pretrained(tmp_path)
    check_tokenizer(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)


def split(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TEMPLATE = {"type": "TemplateProcessing", "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}}}
A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
CLS = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 34}}, "normalizer: 34 in a row; at most 16"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 16}}, "normalizer: makes a text up to 65,536"),
        ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 16}}, "decoder: makes a text up to 65,536 times"),
        ({"normalizer": REPLACE | {"content": "a" * 65}}, "normalizer: makes a text up to 65 times as long"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(65)}}, "up to 65 times as long"),
        ({"normalizer": {"type": "Unheard"}}, "normalizer: Unheard is unknown; bertlite allows BertNormalizer"),
        ({"pre_tokenizer": split(r"(a+)+$")}, r"pre_tokenizer: the regular expression '\(a\+\)\+\$' may take forever"),
        ({"pre_tokenizer": split(r"a*a*a*b")}, "pre_tokenizer: the regular expression"),
        ({"normalizer": REPLACE | {"pattern": {"Regex": "(a|aa)+b"}}}, "normalizer: the regular expression"),
        ({"post_processor": TEMPLATE | {"single": [A] * 2000, "pair": [A, B]}}, "single should hold A once"),
        ({"post_processor": TEMPLATE | {"single": [CLS, A], "pair": [CLS, A, B, B]}}, "pair should hold A and B once"),
        ({"added_tokens": [{"id": n, "content": f"x{n}"} | ADDED for n in range(8, 20_000)]}, "added_tokens: .*10000"),
        ({"added_tokens": [{"id": 8, "content": "x" * 1001} | ADDED]}, "added_tokens.0.content: .* 1000 characters"),
        ({"model": {"type": "WordLevel", "vocab": {"x" * 1001: 0}, "unk_token": "x"}}, "at most 1000 characters"),
        ({"padding": {"strategy": {"Fixed": 1 << 40}}}, "padding.strategy"),
        ({"truncation": {"max_length": 8, "stride": 9}}, "truncation: stride should be less"),
    ],
)  # fmt: skip
def test_what_could_take_all_memory_or_time_is_refused(folder, changes, message):
    change(folder, **changes)
    for name in (folder, folder / "tokenizer.json"):
        with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
            load_tokenizer(str(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": [f"x{number}" for number in range(10_001)]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"8": {"content": "x" * 1001}}}),
        ("special_tokens_map.json", {"mask_token": "x" * 1001}),
        ("added_tokens.json", {f"x{number}": number for number in range(10_001)}),
    ],
)
def test_tokens_in_the_other_files_are_bounded(folder, name, changes):
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    change(folder, name, **changes)
    with pytest.raises(UserError, match=name):
        load_tokenizer(str(folder))


def test_lines_of_a_vocabulary_are_bounded(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "x" * 9000]))
    with pytest.raises(UserError, match=r"vocab\.txt:6: the file is too long or the token is"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_occurs_twice_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("{", '{"normalizer": null, ', 1))
    with pytest.raises(UserError, match="the name 'normalizer' occurs twice"):
        load_tokenizer(str(folder))


def test_ids_beyond_the_vocabulary_are_refused(folder):
    special = {"[CLS]": {"id": "[CLS]", "ids": [1500], "tokens": ["[CLS]"]}}
    change(folder, post_processor=TEMPLATE | {"single": [CLS, A], "pair": [CLS, A, B], "special_tokens": special})
    with pytest.raises(UserError, match="post_processor: adds the id 1500; the vocabulary has 8 tokens"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "regex", [" {2,}", r"\n", r"[\n\r\t]", r"\s+", r"\s{2,}|[\n\r\t]", r"\p{N}{1,3}", "[一-龥]+", r"\S{1,100}"]
)
def test_plain_regular_expressions_are_allowed(regex):
    assert PLAIN_REGEX.fullmatch(regex)


@pytest.mark.parametrize(
    "regex", ["(a+)+$", "a*a", "a+b", "(?:a)+", "a{1,100000}", "(a|b)", r"(a)\1", "a*", "a??", "[a"]
)
def test_others_are_not(regex):
    assert not PLAIN_REGEX.fullmatch(regex) and regex not in KNOWN_REGEXES
