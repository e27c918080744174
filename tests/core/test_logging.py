"""Texts of strangers on a terminal."""

from bertlite.core.logging import printable


def test_control_characters_are_escaped_and_all_other_text_stays():
    assert printable("\x1b[31mred\x1b[0m \r\x07 \x9b2J \u202e<lmth>") == (
        "\\x1b[31mred\\x1b[0m \\r\\x07 \\x9b2J \\u202e<lmth>"
    )
    text = "Grüße, 中文, हिन्दी, العربية, 👩‍🚀\n\ttab"
    assert printable(text) == text
