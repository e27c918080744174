"""What a corpus holds, what was dropped, and whether the tokenizer fits the text."""

from collections import Counter
from dataclasses import dataclass, field

from bertlite.core.logging import logger
from bertlite.data.vocabulary import MAX_WORD_CHARACTERS, find_marked_letters

MAX_TOKENS_PER_WORD, MAX_UNKNOWN = 2.5, 0.02  # above these, the vocabulary does not fit the text
MAX_STRIPPED = 0.01  # of the letters; in English, one in a thousand has an accent
MARK_SAMPLE = 1 << 18  # letters in which marks are counted
MAX_BYTES_PER_WORD = 40  # above this, the text has no blanks, and a word has any number of tokens


@dataclass
class Summary:
    """Counts of what a corpus holds, and of what was dropped."""

    read: int = 0  # documents, of which these were dropped:
    empty: int = 0
    duplicates: int = 0
    too_short: int = 0
    too_long: int = 0
    documents: int = 0  # and these kept:
    tokens: int = 0
    unknown_tokens: int = 0
    words: int = 0
    bytes: int = 0
    long_word_bytes: int = 0  # in words that are unknown because of their length
    letters: int = 0  # of the first texts, and those of them that lose a mark such as an accent:
    stripped: dict[str, int] = field(default_factory=dict)
    source_documents: list[int] = field(default_factory=list)  # those kept of each source

    def describe(self) -> str:
        dropped = ", ".join(
            f"{getattr(self, name):,} {name.replace('_', ' ')}"
            for name in ("empty", "duplicates", "too_short", "too_long")
            if getattr(self, name)
        )
        return (
            f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB, {self.tokens:,} tokens, "
            f"{self.tokens / max(1, self.words):.2f} per word, {self.unknown_tokens / max(1, self.tokens):.2%} unknown"
            + (f"; dropped: {dropped}" if dropped else "")
        )

    def find_stripped(self) -> str:
        """Return what stripping accents removes from the text; "" if that is little."""
        total = sum(self.stripped.values())
        if total <= MAX_STRIPPED * self.letters:
            return ""
        examples = ", ".join(sorted(self.stripped, key=self.stripped.__getitem__, reverse=True)[:5])
        return f"strip_accents removes the marks of {total / self.letters:.0%} of the letters, such as {examples}"

    def find_problem(self) -> str:
        """Return why the vocabulary does not seem to fit the text; "" if it does."""
        cause = "the vocabulary is too small, or made for another text"
        if self.long_word_bytes > MAX_UNKNOWN * self.bytes:
            return (
                f"{self.long_word_bytes / self.bytes:.1%} of the text is unknown: words of more than "
                f"{MAX_WORD_CHARACTERS} characters, as in text without blanks"
            )
        if self.unknown_tokens > MAX_UNKNOWN * self.tokens:
            return f"{self.unknown_tokens / self.tokens:.1%} of the tokens are unknown; {cause}"
        has_words = self.bytes < MAX_BYTES_PER_WORD * self.words
        if self.tokens > MAX_TOKENS_PER_WORD * self.words and has_words:
            return f"{self.tokens / max(1, self.words):.1f} tokens per word, where 1 to 2 are usual; {cause}"
        return ""

    def count_marks(self, text: str) -> None:
        """Count the letters with marks that stripping removes, in the first texts."""
        if self.letters < MARK_SAMPLE:
            letters, marked = find_marked_letters(text[:MARK_SAMPLE])
            self.letters += letters
            self.stripped = dict(Counter(self.stripped) + marked)


def warn(summary: Summary, setting: str) -> None:
    """Warn if the tokenizer does not fit the text; settings of pretraining help only there."""
    problem, stripped = summary.find_problem(), summary.find_stripped()
    if problem:
        advice = (
            ": without tokenizer.path a vocabulary is trained on the text, tokenizer.vocab_size makes it larger, and "
            "tokenizer.extend adds words to another"
        )
        if summary.long_word_bytes > MAX_UNKNOWN * summary.bytes:
            advice = (
                ": without tokenizer.path a vocabulary is trained that divides them; or put blanks between the words, "
                "or set tokenizer.path to the tokenizer.json of a byte-level or SentencePiece tokenizer"
            )
        logger.warning(f"{setting}: warning: {problem}{advice if setting.startswith('data.') else ''}")
    if stripped:
        advice = "; a new tokenizer (without tokenizer.path) keeps them, unless tokenizer.strip_accents is true"
        logger.warning(f"{setting}: warning: {stripped}{advice if setting.startswith('data.') else ''}")
