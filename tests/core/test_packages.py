"""`pip install bertlite` alone is enough for all but fine-tuning and some formats, and what is missing is named."""

import os
import subprocess
import sys

import pytest

from bertlite.core.errors import UserError
from bertlite.core.packages import require

# What the extras install, what that brings along, and what only some formats of data need.
OPTIONAL = """sklearn seqeval matplotlib optuna jieba onnx onnxruntime onnxscript sentence_transformers
pandas pyarrow datasets"""
RUN = """
import sys
sys.modules.update(dict.fromkeys({optional!r}.split()))  # importing one of them raises ModuleNotFoundError
from bertlite.cli import main
def run(*arguments):
    sys.argv = ["bertlite", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
config, out = sys.argv[1:]
assert run("pretrain", config, "--out", f"{{out}}/run", "--set", "train.max_steps=2") == 0
assert run("evaluate", f"{{out}}/run", "--data", config) == 0
assert run("fill", f"{{out}}/run", "The [MASK].") == 0
assert run("embed", f"{{out}}/run", config, "--out", f"{{out}}/vectors.npy") == 0
assert run("verify", f"{{out}}/run") == 0
assert run("export", f"{{out}}/run", f"{{out}}/exported") == 0
assert run("predict", f"{{out}}/run", "a text") == 2
with open(f"{{out}}/task.yaml", "w") as file:
    file.write("task: {{train: sample, validation: sample}}")
assert run("finetune", f"{{out}}/task.yaml", "--model", f"{{out}}/run") == 2
"""


def test_optional_packages_are_not_needed(write_config, tmp_path):
    code = RUN.format(optional=OPTIONAL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code, write_config(), tmp_path], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    message = "needs scikit-learn, seqeval, matplotlib, which are not installed: pip install 'bertlite[finetune]'"
    assert "the model is not fine-tuned" in ended.stderr  # predict needs none of them
    assert ended.stderr.count(message) == 1 and "Traceback" not in ended.stderr


def test_a_missing_package_is_named_with_what_to_install():
    require("bertlite finetune", "bertlite[finetune]", "json", "sklearn")
    expected = r"^bertlite finetune needs no_such_package, which is not installed: pip install 'bertlite\[finetune\]'$"
    with pytest.raises(UserError, match=expected):
        require("bertlite finetune", "bertlite[finetune]", "json", "no_such_package")
