"""Pseudo-perplexity and minimal pairs against transformers computing the same, one masked copy at a time."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

import bertlite.inference.batching
from bertlite.config.settings import Source
from bertlite.core.errors import UserError
from bertlite.core.runtime import Runtime
from bertlite.inference.batching import prepare_for_inference
from bertlite.model.huggingface import load_model, load_tokenizer_of
from bertlite.pretraining.scoring import minimal_pairs, pseudo_log_likelihoods, pseudo_perplexity, read_pairs

RUNTIME = Runtime(torch.device("cpu"), torch.float32, compile=False)
SENTENCES = ["The state of the union.", "a", "Of the people, by the people and for the people."]
PAIRS = [
    ("The people are here.", "The people is here.", "agreement", "a1"),
    ("The state is here.", "The state are here.", "agreement", "a1"),
    ("They were there.", "They was there.", "agreement", "a2"),
    ("No one ever came.", "Someone ever came.", "polarity", "p1"),
    ("Same.", "Same.", "polarity", "p1"),
]


@cache
def load_theirs(folder: Path):
    return AutoTokenizer.from_pretrained(folder), BertForMaskedLM.from_pretrained(folder).eval()


def reference(folder: Path, sentence: str) -> float:
    """The sum of Salazar et al. (2020), section 2: each token hidden, one forward pass each, without padding."""
    tokenizer, model = load_theirs(folder)
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    total = 0.0
    for place in range(1, ids.shape[1] - 1):
        hidden = ids.clone()
        hidden[0, place] = tokenizer.mask_token_id
        with torch.inference_mode():
            total += model(input_ids=hidden).logits[0, place].log_softmax(-1)[ids[0, place]].item()
    return total


@pytest.fixture
def model(every_head):
    model = load_model(every_head["BertForMaskedLM"])
    tokenizer = load_tokenizer_of(every_head["BertForMaskedLM"], model.config)
    return prepare_for_inference(model, RUNTIME), tokenizer


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    keys = ("sentence_good", "sentence_bad", "linguistics_term", "UID")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(dict(zip(keys, p, strict=True))) + "\n" for p in PAIRS))
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize("positions", [1, 30, 1024])
def test_scores_are_those_of_transformers(every_head, model, monkeypatch, positions):
    monkeypatch.setitem(bertlite.inference.batching.TOKENS_PER_BATCH, "cpu", positions)
    scores = pseudo_log_likelihoods(*model, model[1](SENTENCES)["input_ids"])
    expected = [reference(every_head["BertForMaskedLM"], sentence) for sentence in SENTENCES]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def test_decisions_on_pairs_are_those_of_transformers(every_head, model, pairs_file):
    result = minimal_pairs(*model, read_pairs([str(pairs_file)]))
    folder = every_head["BertForMaskedLM"]
    right = [reference(folder, good) > reference(folder, bad) for good, bad, *_ in PAIRS]
    assert result["pairs_accuracy"] == sum(right) / 5
    assert result["phenomena"]["agreement"]["accuracy"] == sum(right[:3]) / 3
    assert result["phenomena"]["agreement"]["paradigms"] == {
        "a1": {"accuracy": sum(right[:2]) / 2, "pairs": 2},
        "a2": {"accuracy": float(right[2]), "pairs": 1},
    }
    assert not right[4] and result["phenomena"]["polarity"]["pairs"] == 2  # what is the same is not preferred
    assert 0 < sum(right) < 4


# Pairs with all the keys of a file of BLiMP, one paradigm a file.
PARADIGMS = {
    "determiner_noun_agreement": [
        ("These people are there.", "This people are there."),
        ("That state is large.", "Those state is large."),
        ("Those states were here.", "That states were here."),
    ],
    "anaphor_gender_agreement": [
        ("The woman knew herself.", "The woman knew himself."),
        ("The man saw himself.", "The man saw herself."),
        ("The people saw themselves.", "The people saw itself."),
    ],
    "npi_present": [
        ("No state has ever changed.", "A state has ever changed."),
        ("Nobody said anything at all.", "Somebody said anything at all."),
        ("The people often voted.", "The people ever voted."),
    ],
    "wh_island": [
        ("Who did the people elect?", "Who did the people wonder who elects?"),
        ("What did they see?", "What did they ask who saw?"),
        ("What had the state built?", "What had the state asked who built?"),
    ],
    "passive": [
        ("The law was passed by the states.", "The law was arrived by the states."),
        ("The star is seen at night.", "The star is slept at night."),
        ("The book was read.", "The book was smiled."),
    ],
}


def test_decisions_on_blimp_are_those_of_transformers(every_head, model, tmp_path):
    for number, (paradigm, sentences) in enumerate(PARADIGMS.items()):
        shared = {"field": "syntax", "linguistics_term": f"term {number % 2}", "UID": paradigm}
        shared |= {"simple_LM_method": True, "one_prefix_method": False, "lexically_identical": False}
        lines = [
            json.dumps({"sentence_good": good, "sentence_bad": bad, **shared, "pairID": str(place)})
            for place, (good, bad) in enumerate(sentences)
        ]
        (tmp_path / f"{paradigm}.jsonl").write_text("\n".join(lines) + "\n")
    pairs = list(read_pairs([str(tmp_path)]))
    assert len(pairs) == 15
    folder = every_head["BertForMaskedLM"]
    right = [reference(folder, pair.good) > reference(folder, pair.bad) for pair in pairs]
    for pair, choice in zip(pairs, right, strict=True):
        assert minimal_pairs(*model, [pair])["pairs_accuracy"] == choice


def test_pseudo_perplexity_is_that_of_all_tokens(every_head, model, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(SENTENCES))
    source = Source(path=str(tmp_path / "text.txt"))
    total = sum(reference(every_head["BertForMaskedLM"], sentence) for sentence in SENTENCES)
    count = sum(len(ids) - 2 for ids in model[1](SENTENCES)["input_ids"])
    assert pseudo_perplexity(*model, [source], "blank-line", 50) == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_long_documents_are_split(every_head, model, tmp_path):
    words = "the state of the union and the people"
    (tmp_path / "text.txt").write_text(words)
    ids = model[1](words, add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + 4] for start in range(0, len(ids), 4)]
    rows = [[model[1].cls_token_id, *piece, model[1].sep_token_id] for piece in pieces]
    total = pseudo_log_likelihoods(*model, rows).sum().item()
    found = pseudo_perplexity(*model, [Source(path=str(tmp_path / "text.txt"))], "line", 6)
    assert found == pytest.approx(math.exp(-total / len(ids)))


def test_one_pair_without_names_takes_those_of_its_file(model, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"sentence_good": "A state.", "sentence_bad": "State a.", "UID": null}\n\n')
    assert list(minimal_pairs(*model, read_pairs([str(tmp_path)]))["phenomena"]) == ["mine"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"sentence_good": "a", "sentence_bad": "b"}\nnothing', r"p\.jsonl:2: not valid JSON"),
        ('{"sentence_good": "a"}', r"p\.jsonl:1: not a JSON object"),
        ('{"sentence_good": "a", "sentence_bad": 3}', r"p\.jsonl:1: not a JSON object"),
        ("[1]", r"p\.jsonl: object 1: not a JSON object"),
        ("", r"p\.jsonl is empty"),
        ("\n\n", r"--pairs: the files contain no pair"),
        ("[" * 100_000, r"p\.jsonl: not valid JSON"),
        ('{"sentence_good": "a", "sentence_bad": ""}', r"0 tokens, not 1 to 48"),
        (json.dumps({"sentence_good": "a", "sentence_bad": "b " * 49}), r"49 tokens, not 1 to 48.*'b b b"),
    ],
)
def test_an_invalid_pair_is_named(model, tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        minimal_pairs(*model, read_pairs([str(tmp_path / "p.jsonl")]))
