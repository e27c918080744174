"""The picture of a confusion matrix: labels are plain text in any script, never mathematics or markup."""

from pathlib import Path

from bertlite.core.logging import logger
from bertlite.finetuning.labels import in_one_line, list_some

MAX_NAMES = 100  # labels that can be read in one picture


def draw_confusion_matrix(path: Path, references: list[int], predictions: list[int], labels: list[str]) -> None:
    """Draw how often each label is predicted for each reference label, as a share of the reference label's examples.

    A label that no installed font can show appears as its number, and is logged.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    names = list(map(in_one_line, labels)) if len(labels) <= MAX_NAMES else []
    fonts, missing = find_fonts("".join(names))
    unknown = [name for name in names if missing & set(name)]
    if unknown:
        logger.warning(f"{path}: no installed font shows {list_some(unknown)}; the picture has the numbers of these")
    shown = [str(index) if name in unknown else name for index, name in enumerate(names)]
    size = min(4 + 0.35 * len(labels), 40)  # inches
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "font.family": fonts}):
        figure = Figure(figsize=(size, size), layout="constrained")
        display = ConfusionMatrixDisplay.from_predictions(
            references, predictions, labels=range(len(labels)), display_labels=shown or None, normalize="true",
            include_values=len(labels) <= 20, values_format=".2f", xticks_rotation="vertical", cmap="Blues",
            colorbar=False, ax=figure.subplots(),
        )  # fmt: skip
        if not names:
            display.ax_.set(xticks=[], yticks=[])
        figure.savefig(path)


def find_fonts(text: str) -> tuple[list[str], set[str]]:
    """Return families of installed fonts for a text, the default one first, and the characters that none shows."""
    import matplotlib
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    families = list(matplotlib.rcParams["font.family"])
    missing = {character for character in text if not character.isspace()}
    missing -= set(map(chr, get_font(findfont(FontProperties(family=families))).get_charmap()))
    for family in sorted({entry.name for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")}):
        if not missing:
            break
        font = get_font(findfont(family))
        shown = missing & set(map(chr, font.get_charmap()))
        if shown and font.scalable:  # a bitmap font, as there are of emoji, is not
            families.append(family)
            missing -= shown
    return families, missing
