"""The house: imports in one direction, nothing heavy for --help, no pickle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bertlite"

# A module imports only from modules above its own.
ORDER = """
errors signals philox
config files runtime
config_file
attention masking optim words sources metrics
tokenizer model corpus tables plateau
batches hf
parity checkpoint inference tasks
run_folder embed scoring export_onnx
train card
pretrain fill export
evaluate bench finetune
plan predict sweep
api
cli
__main__
""".strip().splitlines()
ROW = {module: number for number, row in enumerate(ORDER) for module in row.split()}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bertlite"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bertlite.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_come_from_rows_above(path):
    if path.stem == "__init__":
        assert imported(path) <= {"api"}, "for type checkers; see that --help imports nothing heavy"
        return
    wrong = {name for name in imported(path) if ROW[name] >= ROW[path.stem]}
    assert not wrong, f"{path.name} (row {ROW[path.stem]}) imports {wrong}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_pickle(path):
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            used.add(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            used.add("pickle")
    parts = {part for name in used for part in name.split(".")}
    assert not parts & {"pickle", "read_pickle", "to_pickle", "marshal", "shelve", "dill", "joblib"}
    assert not used & {"torch.load", "torch.save"}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['bertlite', '--help']\n"
        "from bertlite.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
