"""Token classification: tags of every scheme, and entities."""

import numpy as np
import pytest
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities
from tiny_tasks import SENTENCES

from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.tags import convert_to_iob2, group_entities

TAGS = {
    IOB1: "I-A I-A O I-A B-A I-B O I-B B-B I-A",
    IOB2: "B-A I-A O B-A B-A B-B O B-B B-B B-A",
    IOBES: "B-A E-A O S-A S-A B-B I-B E-B S-B B-A I-A I-A E-A",
    BILOU: "B-A L-A O U-A U-A B-B I-B L-B U-B B-A I-A I-A L-A",
}


def iob2(tags: list[str]) -> list[str]:
    return convert_to_iob2(tags, "here")


@pytest.mark.parametrize("scheme", TAGS)
def test_tags_of_every_scheme_become_iob2(scheme):
    tags = TAGS[scheme].split()
    expected = [entity.to_tuple()[1:] for entity in Entities([tags], scheme).entities[0]]
    forms = [tags, [tag.replace("I-", "M-") for tag in tags]] if scheme is IOBES else [tags]  # BMES has M for I
    for form in forms:
        converted = iob2(form)
        assert {tag[0] for tag in converted} <= set("BIO")
        assert [(kind, start, end + 1) for kind, start, end in get_entities(converted)] == expected
        assert [entity.to_tuple()[1:] for entity in Entities([converted], IOB2).entities[0]] == expected


@pytest.mark.parametrize("last, single", ["ES", "LU"])
def test_last_and_single_tags_end_an_entity_even_if_its_tags_break_their_scheme(last, single):
    for tags, expected in {
        f"B-A {last}-A I-A": "B-A I-A B-A",
        f"{single}-A I-A": "B-A B-A",
        f"B-A I-A {single}-A": "B-A I-A B-A",
    }.items():
        assert iob2(tags.split()) == expected.split()


def test_tags_are_grouped_into_entities_as_in_seqeval(vocabulary):
    tokenizer = load_tokenizer(str(vocabulary))
    labels = ["O", "B-a-work", "I-a-work", "B-B", "I-B"]  # WNUT17 has a kind with a hyphen
    text = SENTENCES[3][1]
    encoding = tokenizer(text).encodings[0]
    words = sorted({word for word in encoding.word_ids if word is not None})
    spans = [encoding.word_to_chars(word) for word in words]
    assert len(encoding.ids) - 2 > len(words) > 15
    generator = np.random.default_rng(0)
    for _ in range(50):
        chosen = generator.integers(0, 5, len(words))
        scores = generator.random((len(encoding.ids), 5), np.float32)  # later tokens of a word do not count
        for word, label in zip(words, chosen, strict=True):
            scores[encoding.word_ids.index(word), label] = 2.0
        entities = group_entities(scores, encoding, text, labels)
        expected = [
            (kind, spans[first][0], spans[last][1])
            for kind, first, last in get_entities([labels[label] for label in chosen])
        ]
        assert [(entity["entity_group"], entity["start"], entity["end"]) for entity in entities] == expected
        assert all(entity["word"] == text[entity["start"] : entity["end"]] for entity in entities)
        assert all(entity["score"] == 2 for entity in entities)
