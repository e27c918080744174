"""The picture of the confusion matrix, with labels of any script and signs."""

import warnings

import matplotlib.font_manager as fonts
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from bertlite.finetuning import confusion
from bertlite.finetuning.confusion import draw_confusion_matrix, find_fonts


@pytest.fixture
def texts_of(tmp_path, monkeypatch):
    """Draw a matrix, and return the matrix and the texts that are in the picture, by their labels' order."""
    drawn, matrices = [], []
    draw, plot = Text.draw, ConfusionMatrixDisplay.plot
    monkeypatch.setattr(Text, "draw", lambda self, *a: (drawn.append(self._preprocess_math(self.get_text())),
                                                        draw(self, *a)))  # fmt: skip
    monkeypatch.setattr(ConfusionMatrixDisplay, "plot", lambda self, **o: matrices.append(self.confusion_matrix)
                        or plot(self, **o))  # fmt: skip

    def call(references: list[int], predictions: list[int], labels: list[str]) -> tuple[np.ndarray, list]:
        drawn.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_confusion_matrix(tmp_path / "a.png", references, predictions, labels)
        with Image.open(tmp_path / "a.png") as picture:
            assert min(picture.size) > 100
        return matrices[-1], drawn

    return call


def test_the_matrix_and_its_labels(texts_of, monkeypatch):
    matrix, texts = texts_of([0, 0, 1, 2], [1, 1, 2, 2], ["a", "b", "c"])
    assert np.array_equal(matrix, [[0, 1, 0], [0, 0, 1], [0, 0, 1]])
    assert {"a", "b", "c"} <= {text for text, _ in texts}
    monkeypatch.setattr(confusion, "MAX_NAMES", 2)
    assert not {"a", "b", "c"} & {text for text, _ in texts_of([0, 1], [0, 1], ["a", "b", "c"])[1]}


def test_labels_are_text_whatever_signs_they_hold(texts_of, capsys):
    labels = ["price_$0_$50", "$x^2$", "$", "a_b^c", "<b>|`*#", "\\frac{", "two\nlines", "{}%&~", "é ß λ Ж"]
    numbers = list(range(len(labels)))
    _, texts = texts_of(numbers, numbers, labels)
    expected = {(label.replace("\n", " "), False) for label in labels}  # False: not mathematics
    assert expected <= set(texts) and capsys.readouterr().err == ""


def test_labels_that_no_font_shows_are_numbers(texts_of, capsys):
    hieroglyph = "\U00013000"
    _, texts = texts_of([0, 1], [0, 1], ["plain", f"x{hieroglyph}"])
    assert {"plain", "1"} <= {text for text, _ in texts} and hieroglyph not in str(texts)
    assert f"a.png: no installed font shows x{hieroglyph}; the picture has the numbers" in capsys.readouterr().err


def test_fonts_are_found_among_the_installed():
    default = set(fonts.get_font(fonts.findfont("DejaVu Sans")).get_charmap())
    stix = set(fonts.get_font(fonts.findfont("STIXGeneral")).get_charmap())
    character = chr(min(code for code in stix - default if code > 0x100))
    families, missing = find_fonts("abc" + character)
    assert not missing and len(families) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure()
        figure.text(0.5, 0.5, "abc" + character, family=families)
        figure.canvas.draw()
    assert find_fonts("abc é") == (["sans-serif"], set())
