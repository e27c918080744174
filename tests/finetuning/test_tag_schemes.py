"""Schemes of tags, against seqeval."""

import pytest
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities

from bertlite.core.errors import UserError
from bertlite.finetuning.tag_schemes import UNNAMED, collect_labels, convert_to_iob2, marks_entities

TAGS = {
    IOB1: "I-A I-A O I-A B-A I-B O I-B B-B I-A",
    IOB2: "B-A I-A O B-A B-A B-B O B-B B-B B-A",
    IOBES: "B-A E-A O S-A S-A B-B I-B E-B S-B B-A I-A I-A E-A",
    BILOU: "B-A L-A O U-A U-A B-B I-B L-B U-B B-A I-A I-A L-A",
}


@pytest.mark.parametrize("scheme", TAGS)
def test_tags_of_every_scheme_become_iob2(scheme):
    tags = TAGS[scheme].split()
    expected = [entity.to_tuple()[1:] for entity in Entities([tags], scheme).entities[0]]
    forms = [tags, [tag.replace("I-", "M-") for tag in tags]] if scheme is IOBES else [tags]  # BMES has M for I
    for form in forms:
        converted = convert_to_iob2(form)
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
        assert convert_to_iob2(tags.split()) == expected.split()


def test_tags_without_kinds_are_entities_of_one_kind():
    for scheme, tags in TAGS.items():
        prefixes = [tag.split("-")[0] for tag in tags.split()]
        of_one_kind = [tag if tag == "O" else f"{tag}-{UNNAMED}" for tag in prefixes]
        expected = [entity.to_tuple()[1:] for entity in Entities([of_one_kind], scheme).entities[0]]
        found = get_entities(convert_to_iob2(prefixes))
        assert [(kind, start, end + 1) for kind, start, end in found] == expected


# Tags of sentences, the labels of a model of them, and what is said about them.
RECOGNIZED = {
    "B-PER I-PER O, O B-LOC": (
        ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"],
        "tags: IOB2, with 2 kinds of entity: LOC, PER",
    ),
    "I-PER I-PER O, O B-PER": (["O", "B-PER", "I-PER"], "tags: IOB2 (tags with I that start an entity, read as B: 1)"),
    "I-PER B-PER O I-PER": (["O", "B-PER", "I-PER"], "tags: IOB1, read as IOB2, with 1 kind of entity: PER"),
    "I-PER I-PER O": (["O", "B-PER", "I-PER"], "tags: IOB1, read as IOB2, with 1 kind of entity: PER"),
    "B-PER L-PER U-LOC O": (["O", "B-LOC", "I-LOC", "B-PER", "I-PER"], "tags: BILOU, read as IOB2"),
    "B-PER E-PER S-LOC O": (["O", "B-LOC", "I-LOC", "B-PER", "I-PER"], "tags: BIOES, read as IOB2"),
    "B-PER M-PER E-PER O": (["O", "B-PER", "I-PER"], "tags: BMES, read as IOB2"),
    "B-a-work I-a-work O": (["O", "B-a-work", "I-a-work"], "tags: IOB2"),
    "B I O O": (["O", f"B-{UNNAMED}", f"I-{UNNAMED}"], "tags: IOB2"),
    "B M E S": (["O", f"B-{UNNAMED}", f"I-{UNNAMED}"], "tags: BMES, read as IOB2"),  # segmented Chinese
    "DET NOUN VERB": (["DET", "NOUN", "VERB"], "tags: one per word, 3 of them: DET, NOUN, VERB"),
    "PER PER O LOC": (["LOC", "O", "PER"], "tags: one per word, 3 of them: LOC, O, PER"),
    "10 0 9": (["0", "9", "10"], "tags: one per word, 3 of them: 0, 9, 10 (task.label_names"),
    "E S X": (["E", "S", "X"], "tags: one per word"),
}


@pytest.mark.parametrize("tags", RECOGNIZED)
def test_what_tags_mean_is_recognized_and_described(tags):
    labels, description = RECOGNIZED[tags]
    sentences = [("here", sentence.split()) for sentence in tags.split(", ")]
    found, line = collect_labels(sentences, None, None)
    assert found == labels and line.startswith(description)
    assert marks_entities(labels, None) == ("one per word" not in description)


def test_a_single_tag_of_another_scheme_is_named_with_its_place():
    nouns = [("train:1", ["DET", "NOUN"]), ("train:4", ["DET", "B-X"])]
    with pytest.raises(
        UserError, match="train:4: the tag 'B-X' marks an entity, and other tags do not; correct it, or"
    ):
        collect_labels(nouns, None, None)
    labels, line = collect_labels(nouns, "none", None)
    assert labels == ["B-X", "DET", "NOUN"] and "one per word" in line
    entities = [("train:1", ["B-X", "I-X", "O"]), ("train:4", ["B-X", "NOUN"])]
    with pytest.raises(UserError, match="train:4: the tag 'NOUN' marks no entity, as B-KIND does"):
        collect_labels(entities, None, None)
    with pytest.raises(UserError, match="train:1: the tag 'DET' marks no entity"):
        collect_labels([("train:1", ["DET"])], "entities", None)
    assert not marks_entities(["B-X", "I-X"], "none")


def test_names_of_numbers_are_the_labels():
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    labels, line = collect_labels([("here", ["B-PER", "O"])], None, names)
    assert labels == names and line == "tags: IOB2, with 2 kinds of entity: PER, LOC"
    assert collect_labels([("here", ["X"])], None, ["X", "VERB", "ADJ"])[0] == ["X", "VERB", "ADJ"]


@pytest.mark.parametrize("tag, message", [("O", "all tags are O"), ("X", "all words have the tag 'X'")])
def test_one_tag_alone_is_an_error(tag, message):
    with pytest.raises(UserError, match=message):
        collect_labels([("here", [tag, tag])], None, None)
