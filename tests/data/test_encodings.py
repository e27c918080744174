"""Encodings: guessed from bytes, decoded as Python decodes them, and doubted where the text looks like another one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bertlite.core.errors import UserError
from bertlite.data.encodings import EAST_ASIAN, LATIN, NOT_LATIN, guess_encodings, iconv_name
from bertlite.data.formats import read_lines

CHINESE = "人工智能是计算机科学的一个分支，它企图了解智能的实质，并生产出一种新的智能机器。"
TAIWANESE = "人工智慧是計算機科學的一個分支，它企圖了解智慧的實質，並生產出一種新的機器。"
JAPANESE = "人工知能とは、計算という概念とコンピュータという道具を用いて知能を研究する学問である。"
KOREAN = "인공지능은 인간의 학습능력과 추론능력을 인공적으로 구현하려는 컴퓨터 과학의 한 분야이다."
RUSSIAN = "Искусственный интеллект — свойство систем выполнять творческие функции человека."
GREEK = "Η τεχνητή νοημοσύνη αναφέρεται στον κλάδο της πληροφορικής που ασχολείται με τη σχεδίαση."
ARABIC = "الذكاء الاصطناعي هو سلوك وخصائص معينة تتسم بها البرامج الحاسوبية تجعلها تحاكي القدرات."
THAI = "ปัญญาประดิษฐ์คือความสามารถของเครื่องจักรในการเรียนรู้และแก้ปัญหาด้วยตนเอง"
GERMAN = "Künstliche Intelligenz ist ein Teilgebiet der Informatik, das sich mit Lösungen für Rätsel beschäftigt."
TEXTS = {
    "gb18030": CHINESE, "big5": TAIWANESE, "shift_jis": JAPANESE, "euc_jp": JAPANESE, "cp949": KOREAN,
    "cp1251": RUSSIAN, "koi8_r": RUSSIAN.replace("—", "-"), "cp1253": GREEK, "cp1256": ARABIC, "tis_620": THAI,
    "cp1252": GERMAN, "utf-16": CHINESE, "utf-16le": GERMAN, "utf-16be": GERMAN, "utf-8": CHINESE,
}  # fmt: skip


@pytest.mark.parametrize("encoding", TEXTS)
def test_encodings_are_told_apart(encoding):
    sample = (TEXTS[encoding] * 3).encode(encoding)
    assert sample.decode(guess_encodings(sample)[0]) == TEXTS[encoding] * 3
    short = TEXTS[encoding][:20].encode(encoding)
    assert TEXTS[encoding][:20] in [short.decode(guess, "ignore") for guess in guess_encodings(short)]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="without iconv")
@pytest.mark.parametrize(
    "encoding",
    [*EAST_ASIAN, *NOT_LATIN, *LATIN, "utf-16", "utf-16le", "utf_16_le", "UTF-16BE", "latin-1", "iso8859_1", "euc_kr"],
)
def test_iconv_knows_the_advised_names(encoding):
    text = "text".encode(encoding)
    result = subprocess.run(["iconv", "-f", iconv_name(encoding), "-t", "UTF-8"], input=text, stdout=subprocess.PIPE)
    assert result.returncode == 0 and result.stdout == b"text"


@pytest.mark.parametrize("encoding", [*TEXTS, "latin-1", "utf-8-sig"])
def test_lines_are_those_that_python_reads(encoding, tmp_path):
    """Also where bytes 0x0A belong to other characters, as in UTF-16."""
    text = TEXTS.get(encoding, GERMAN)
    more = "\u0a0a\u0a00\ufeffx" if "16" in encoding else "x"
    (tmp_path / "a.txt").write_bytes(f"{text}\r\n\n{more}\n{text}".encode(encoding))
    with (tmp_path / "a.txt").open(encoding=encoding) as file:
        expected = [line.removesuffix("\n") for line in file]
    assert list(read_lines(tmp_path / "a.txt", encoding=encoding)) == expected == [text, "", more, text]


def write(folder: Path, text: str, encoding: str) -> Path:
    (folder / "a.txt").write_bytes(text.encode(encoding))
    return folder / "a.txt"


@pytest.mark.parametrize(
    ("written", "read", "suspected"),
    [
        ("gb18030", "latin-1", "gb18030"),
        ("utf-8", "latin-1", "utf-8"),
        ("cp1251", "latin-1", "cp1251"),
        ("shift_jis", "cp437", "shift_jis"),
        ("gb18030", "gbk", None),
        ("cp1252", "latin-1", None),
        ("cp1252", "cp1250", None),
        ("cp949", "euc_kr", None),
        ("utf-16le", "utf-16le", None),
    ],
)
def test_a_text_that_looks_like_another_encoding_is_doubted_once(written, read, suspected, tmp_path, caplog):
    path = write(tmp_path, "\n".join([TEXTS[written]] * 5), written)
    for _ in range(2):
        list(read_lines(path, encoding=read))
    doubts = [record.getMessage() for record in caplog.records]
    assert doubts == ([f"{path}: read as {read}, but it looks like {suspected}"] if suspected else [])


def test_bytes_that_an_encoding_does_not_have_are_named(tmp_path):
    path = write(tmp_path, f"{CHINESE}\n" * 3, "gb18030")
    path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(UserError, match=r"a\.txt:4: not gb18030 \(byte 0xff\); .* iconv -c -f GB18030"):
        list(read_lines(path, encoding="gb18030"))
    with pytest.raises(UserError, match=r"a\.txt:1: not cp1252 \(byte 0x90\); it looks like shift_jis"):
        list(read_lines(write(tmp_path, JAPANESE * 3, "shift_jis"), encoding="cp1252"))
    path.write_bytes("\u0a0a\u0a0a\n\u0a0a".encode("utf-16le") + b"\x00\xdc\n\0")  # a half of a surrogate pair
    with pytest.raises(UserError, match=r"a\.txt:2: not utf-16le \(byte 0x00\); .* iconv -c -f UTF-16LE"):
        list(read_lines(path, encoding="utf-16le"))
