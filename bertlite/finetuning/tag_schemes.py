"""Schemes of tags: which tags mark entities (B-PER, I-PER, O), and which stand for themselves (NOUN, VERB)."""

from collections import Counter
from collections.abc import Sequence

from bertlite.core.errors import UserError
from bertlite.core.logging import count
from bertlite.finetuning.labels import list_some, sort_labels

PREFIXES = ("B", "I", "M", "E", "S", "L", "U")
UNNAMED = "ENTITY"  # the kind of the entities of tags without kinds: B, I and O

# What the prefixes of all tags say about their scheme, the first one that has all of them.
SCHEMES = {"IOB": "BI", "BILOU": "BILU", "BIOES": "BIES", "BMES": "BMES"}

Sentence = tuple[str, list[str]]  # its location, for messages, and its tags


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag that marks an entity into prefix and kind, both empty for a tag that does not."""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind) if prefix in PREFIXES and kind else ("", "")


def marks_entities(labels: Sequence[str], scheme: str | None) -> bool:
    """Return whether the labels of a model mark entities, in IOB2; `scheme` is that of the settings."""
    return scheme != "none" and all(label == "O" or label.startswith(("B-", "I-")) for label in labels)


def recognize(sentences: list[Sentence], scheme: str | None) -> bool:
    """Return whether tags mark entities: all but O have a prefix and a kind, or all of them are a prefix alone.

    `scheme` is that of the settings. Raises UserError, naming a sentence, if only some of the tags do.
    """
    counts = Counter(tag for _, tags in sentences for tag in tags)
    counts.pop("O", None)
    with_kind = {tag for tag in counts if split_tag(tag)[0]}
    bare = not with_kind and set(counts) <= set(PREFIXES) and bool(set(counts) & {"B", "I"})
    if scheme == "none" or not (counts and (with_kind or bare or scheme)):
        return False
    others = set() if bare else set(counts) - with_kind
    if others:
        fewer = min(others, with_kind or others, key=lambda tags: sum(counts[tag] for tag in tags))
        example = min(fewer)
        location = next(location for location, tags in sentences if example in tags)
        marks = "marks an entity, and other tags do not" if fewer is with_kind else "marks no entity, as B-KIND does"
        raise UserError(
            f"{location}: the tag {example!r} {marks}; correct it, or set task.tag_scheme: none if each tag stands for "
            "itself"
        )
    return True


def describe(sentences: list[Sentence], kinds: list[str]) -> str:
    """Describe tags that mark entities, for the log: their scheme and kinds."""
    prefixes = {split_tag(tag)[0] or tag for _, tags in sentences for tag in tags} - {"O"}
    names = [name for name, letters in SCHEMES.items() if prefixes <= set(letters)]
    name = "mixed prefixes" if not names else names[0]
    num_changed, is_iob1 = compare_with_iob1([tags for _, tags in sentences])
    if name == "IOB":
        name = "IOB1" if num_changed and is_iob1 else "IOB2"
    read_as = "" if name == "IOB2" else ", read as IOB2"
    if name == "IOB2" and num_changed:
        read_as = f" (tags with I that start an entity, read as B: {num_changed:,})"
    return f"tags: {name}{read_as}, with {count(len(kinds), 'kind')} of entity: {list_some(kinds)}"


def compare_with_iob1(sentences: list[list[str]]) -> tuple[int, bool]:
    """Return how many entities start with I, and whether all that start with B follow an entity of their kind, as in
    IOB1 (Ramshaw and Marcus 1995)."""
    num_changed, is_iob1 = 0, True
    for tags in sentences:
        converted = convert_to_iob2(tags)
        for tag, new, previous in zip(tags, converted, ["O", *converted], strict=False):
            num_changed += tag[:1] == "I" and new[:1] == "B"
            is_iob1 = is_iob1 and (tag[:1] != "B" or new[2:] == previous[2:])
    return num_changed, is_iob1


def convert_to_iob2(tags: list[str]) -> list[str]:
    """Convert the tags of a sentence from IOB1, IOB2, BMES or BILOU, with kinds or without, to IOB2.

    A tag starts an entity if its prefix is B, S or U, if it follows an entity of another kind, or if it follows a tag
    that ends one (E, S, L, U). Example: I-PER I-PER O U-LOC U-LOC → B-PER I-PER O B-LOC B-LOC.
    """
    converted, open_kind = [], ""  # open_kind: the kind of the entity that the next tag may continue
    for tag in tags:
        prefix, kind = (tag, UNNAMED) if tag in PREFIXES else split_tag(tag)
        if not kind:  # O, and tags that find_label_indices finds no label for
            converted.append(tag)
            open_kind = ""
            continue
        starts = prefix in ("B", "S", "U") or kind != open_kind
        converted.append(f"{'B' if starts else 'I'}-{kind}")
        open_kind = "" if prefix in ("E", "S", "L", "U") else kind
    return converted


def entity_labels(kinds: list[str]) -> list[str]:
    """Return the labels of a model of entities: O, and two for each kind."""
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def collect_labels(sentences: list[Sentence], scheme: str | None, names: list[str] | None) -> tuple[list[str], str]:
    """Return the labels of tags, and a line that describes them. `names` are those that the settings list.

    Raises UserError for tags of which there is but one.
    """
    if names is not None:
        sentences = [*sentences, ("task.label_names", names)]
    tags = sort_labels({tag for _, tags in sentences for tag in tags})
    if tags == ["O"]:
        raise UserError("task.train: all tags are O; there is no entity to learn from")
    if not recognize(sentences, scheme):
        if len(tags) < 2:
            raise UserError(f"task.train: all words have the tag {tags[0]!r}; there should be two")
        hint = " (task.label_names gives numbers names)" if all(map(str.isdecimal, tags)) else ""
        return names or tags, f"tags: one per word, {len(tags)} of them: {list_some(tags)}{hint}"
    kinds = list(dict.fromkeys(tag[2:] for tag in convert_to_iob2(names or tags) if tag != "O"))
    if names is None:
        kinds.sort()
    return entity_labels(kinds), describe(sentences, kinds)
