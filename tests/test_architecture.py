"""The house: imports in one direction, nothing heavy for --help, no pickle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PACKAGE

# A module imports only from packages above its own and, within its package, from modules to its left.
ORDER = {
    "core": "errors packages distributed logging signals random files trust runtime",
    "config": "budget fields settings finetune_settings loading",
    "data": "masking words compression encodings formats sources vocabulary tokenizer_trust tokenizer summary"
    " corpus columns conll tables packing batches cooccurrence",
    "model": "layers attention encoder bert architectures heads initialization counted weight_files huggingface"
    " sentence_transformers",
    "training": "progress muon optim memory checkpoint run_folder trainer callbacks plateau budget",
    "inference": "batching embed fill",
    "pretraining": "losses starting_model prepare pretrain scoring evaluate bench estimate",
    "export": "parity onnx model_card formats",
    "finetuning": "metrics answer_metrics labels label_lists confusion examples batches losses decoding answers choices"
    " spans tag_schemes tags tasks inputs splits results compare evaluate experiment finetune predict sweep",
    "pages": "report",
    "": "api terminal options cli __main__",
}
MODULES = [".".join(filter(None, (package, name))) for package, names in ORDER.items() for name in names.split()]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bertlite":
            inside = [f"{node.module}.{alias.name}".removeprefix("bertlite.") for alias in node.names]
            names |= {name if name in MODULES else name.rpartition(".")[0] for name in inside}
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("bertlite.") for alias in node.names if "bertlite." in alias.name}
    return names - {""}  # bertlite.__version__


def test_every_module_has_its_place():
    files = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    assert {".".join(path.parts) for path in files} == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_above(module):
    names = imported(PACKAGE / f"{module.replace('.', '/')}.py")
    package = module.rpartition(".")[0]
    through_init = {name for name in names if name in ORDER} - {package}  # from bertlite.model import …
    assert not through_init, f"{module} imports {through_init}; name the module"
    wrong = {name for name in names if MODULES.index(name) >= MODULES.index(module)}
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_nothing_by_themselves(package):
    allowed = {"": {"api"}, "model": {"model.attention"}, "finetuning": {"core.packages"}}  # for people, for pip
    assert imported(PACKAGE / package.replace(".", "/") / "__init__.py") <= allowed.get(package, set())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
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
