"""Text of languages whose letters have marks, or whose words have no blanks between, survives a new tokenizer."""

import random
import unicodedata

import pytest
from tiny_tokenizers import make_tokenizer
from transformers import AutoTokenizer, BertTokenizer

from bertlite.config.loading import load_config
from bertlite.config.settings import DataSettings, PretrainConfig, TokenizerSettings
from bertlite.data.corpus import prepare_corpus
from bertlite.data.tokenizer import prepare_tokenizer
from bertlite.data.vocabulary import SPECIAL_TOKENS
from bertlite.data.words import mark_word_starts
from bertlite.training.run_folder import keep_former_defaults

WORDS = {
    "Hindi": "हम हिन्दी में लिखते हैं और दिल्ली बहुत अच्छी है कल बाज़ार से सेब लाए थे",
    "Thai": "เมื่อวานนี้ ฉัน ไปซื้อ ผลไม้ ที่ตลาด น้ำ ม้า ไม่ ใหม่ ไหม้",
    "Vietnamese": "má mà mả mã ma Hôm qua tôi đi chợ Việt Nam học đại học rượu",
    "Japanese": "がっこう かっこう ばら はら パン ハン 学校 へ いきます プール",
    "Arabic": "ذَهَبَ الوَلَدُ إِلَى المَدْرَسَةِ وَقَرَأَ الدَّرْسَ ثُمَّ عَادَ",
    "German": "Möchte mochte fällt fallt schön schon Straße Übung müsste Bär",
    "Turkish": "İstanbul ılık Isparta iğne çok güzel şeker",
}


def write_text(words: str, blank: str = " ") -> list[str]:
    """Twenty documents of random words of a language."""
    chance = random.Random(0)
    return [blank.join(chance.choices(words.split(), k=200)) for _ in range(20)]


def train(documents: list[str], cache, **settings):
    chosen = TokenizerSettings(**{"vocab_size": 400, **settings})
    return prepare_tokenizer(chosen, None, lambda: documents, [documents, settings], cache)


def comparable(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("language", WORDS)
def test_text_is_read_back_with_all_its_marks(language, form, lowercase, tmp_path):
    """Either form of Unicode is read in the other one, and saved folders do the same in transformers."""
    documents = [unicodedata.normalize(form, text) for text in write_text(WORDS[language])]
    tokenizer = train(documents, tmp_path, lowercase=lowercase)
    expected = documents[0].lower() if lowercase else documents[0]
    tokenizer.save_pretrained(tmp_path / "saved")
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = reader(documents[0])["input_ids"]
        assert reader.unk_token_id not in ids
        assert comparable(reader.decode(ids, skip_special_tokens=True)) == comparable(expected)
    if form == "NFD":
        assert tokenizer(unicodedata.normalize("NFC", documents[0]))["input_ids"] == ids


def test_words_without_special_needs_keep_the_class_of_bert(tmp_path):
    """The files are a BertTokenizer with strip_accents false, and a cased one is as before there was this setting."""
    documents = write_text(WORDS["German"])
    train(documents, tmp_path)
    (folder,) = tmp_path.glob("tokenizers/[!.]*")
    assert not BertTokenizer.from_pretrained(folder).strip_accents
    assert AutoTokenizer.from_pretrained(folder).tokenize("MÖCHTE") == ["möchte"]
    cased = train(documents, tmp_path, lowercase=False).backend_tokenizer
    assert cased.normalizer.strip_accents is None


def test_accents_are_stripped_where_that_is_set(tmp_path):
    stripping = train(write_text(WORDS["German"]), tmp_path, strip_accents=True)
    assert stripping("möchte")["input_ids"] == stripping("mochte")["input_ids"]
    cased = train(write_text(WORDS["German"]), tmp_path, strip_accents=True, lowercase=False)
    assert cased("Übung")["input_ids"] == cased("Ubung")["input_ids"] != cased("ubung")["input_ids"]


@pytest.mark.parametrize("blank", ["", "x"])
@pytest.mark.parametrize("language", ["Thai", "Arabic"])
def test_text_without_blanks_is_divided(language, blank, tmp_path, capfd):
    documents = write_text(WORDS[language], blank)
    tokenizer = train(documents, tmp_path)
    assert "are divided" in capfd.readouterr().err
    ids = tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert comparable(tokenizer.decode(ids)) == comparable(documents[0])
    starts = mark_word_starts(tokenizer.backend_tokenizer)[ids]
    parts = tokenizer.decode(ids).split()
    assert starts.sum() == len(parts) and max(map(len, parts)) <= 100
    assert not any(unicodedata.category(part[0]) == "Mn" for part in parts)


def prepare(text: str, tokenizer, folder, capfd) -> str:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    data = DataSettings.model_validate({"train": [str(folder / "text.txt")], "cache_dir": str(folder / "cache")})
    prepare_corpus(data.train, tokenizer, data, "data.train")
    return capfd.readouterr().err


@pytest.mark.parametrize("language", ["Vietnamese", "Hindi"])
def test_marks_that_a_loaded_tokenizer_strips_are_told(language, tmp_path, capfd):
    """Counted again with a plain loop over clusters."""
    text = " ".join(write_text(WORDS[language]))
    tokenizer = make_tokenizer([*SPECIAL_TOKENS, *sorted({*text.lower(), *(f"##{c}" for c in text.lower())})])
    log = prepare(text, tokenizer, tmp_path, capfd)
    decomposed = unicodedata.normalize("NFD", text)
    letters = [at for at, sign in enumerate(decomposed) if unicodedata.category(sign)[0] == "L"]
    marked = [at for at in letters if unicodedata.category(decomposed[at + 1 : at + 2] or " ") == "Mn"]
    assert f"strip_accents removes the marks of {len(marked) / len(letters):.0%} of the letters, such as" in log
    assert "tokenizer.strip_accents" in log


def test_english_with_a_few_accents_is_not_warned_of(tmp_path, capfd):
    text = "the text of a plain page with words and no marks at all " * 50 + "a café"
    assert "strip_accents" not in prepare(text, make_tokenizer([*SPECIAL_TOKENS, "the"]), tmp_path, capfd)


def test_long_words_are_named_as_the_reason(tmp_path, capfd):
    """One [UNK] stands for a long word, so few tokens are unknown, but much text is."""
    tokenizer = make_tokenizer([*SPECIAL_TOKENS, "a", "##a", "##c", "##g", "##t"])
    log = prepare("a a a a a a a a\n" * 100 + "acgt" * 100, tokenizer, tmp_path, capfd)
    assert f"{400 / 2000:.1%}" in log and "words of more than 100 characters" in log and "too small" not in log


def test_a_run_of_an_earlier_version_keeps_its_tokenizer(tmp_path):
    """Its config.yaml has all settings but strip_accents, which then meant: as lowercase."""
    run = tmp_path / "run"
    run.mkdir()
    former = "{path: null, vocab_size: 99, special_tokens: [], lowercase: true, train_characters: 9, extend: 0}"
    (run / "config.yaml").write_text(f"tokenizer: {former}\ndata: {{train: [sample]}}\n")
    copied = f"tokenizer: {former}\ndata: {{train: [sample]}}\n"
    (tmp_path / "copied.yaml").write_text(copied)  # of a configuration that listed all settings
    assert load_config(PretrainConfig, tmp_path / "copied.yaml").tokenizer.strip_accents is None
    cased = load_config(PretrainConfig, run / "config.yaml", ["tokenizer.lowercase=false"])
    assert cased.tokenizer.strip_accents is False
    (tmp_path / "mine.yaml").write_text("data: {train: [sample]}\n")
    mine = load_config(PretrainConfig, tmp_path / "mine.yaml")
    assert load_config(PretrainConfig, run / "config.yaml").tokenizer.strip_accents is True
    assert mine.tokenizer.strip_accents is None
    assert keep_former_defaults(run, mine).tokenizer.strip_accents is True
    assert keep_former_defaults(tmp_path / "other", mine) == mine
