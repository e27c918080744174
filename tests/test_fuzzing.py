"""Damaged and hostile input of every kind ends in success or in an error of a line or two, in bounded memory."""

import bz2
import gzip
import json
import lzma
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from tiny_tasks import make_records

import bertlite
from bertlite.config.finetune_settings import FinetuneConfig, TaskSettings
from bertlite.config.loading import load_config
from bertlite.config.settings import DataLocation, PretrainConfig, Source
from bertlite.core.errors import Failure, UserError
from bertlite.data.sources import read_documents
from bertlite.data.tables import read_records
from bertlite.data.tokenizer import load_tokenizer
from bertlite.finetuning.splits import select_examples
from bertlite.finetuning.tasks import TASKS

pytestmark = pytest.mark.slow

MAX_GROWTH_KB = 500_000  # of the peak memory, by all inputs of a test together


def fuzz(inputs: int):
    """Settings for a test: the same inputs in each run, ten seconds for each."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=inputs, deadline=10_000, derandomize=True, suppress_health_check=health)


@pytest.fixture(autouse=True)
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KB


def check(read: Callable[[], Any], most_lines: int = 2) -> None:
    """Read an input: there is no other exception than those with a message for the user, of one or two lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except (UserError, Failure) as error:
        assert 1 <= len(str(error).splitlines()) <= most_lines, str(error)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "repeat", "cut"]),
        st.floats(0, 1),
        st.one_of(
            st.binary(max_size=8),
            st.sampled_from(
                [b"\0", b"\xff\xfe", b"\n", b'"', b"[", b"{", b"&a ", b"*a", b"1e999", b"NaN", b"\t", b":"]
            ),
        ),
    ),
    min_size=1,
    max_size=6,
)


def damage(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for change, share, piece in changes:
        at = int(share * len(content))
        before, after = content[:at], content[at:]
        content = {
            "insert": before + piece + after,
            "replace": before + piece + after[len(piece) :],
            "delete": before + after[len(piece) + 1 :],
            "repeat": before + after[:40] * 3 + after,
            "cut": before or piece,
        }[change]
    return content


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([-1, 0, 1 << 31, 1 << 63, 10**30, 1e-300, "", "a" * 5000, "\u202e", "\ud800", "../x", "\x1b[2J"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "delete", "add"]), VALUES), min_size=1, max_size=3
)


def edit(value: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """Change values anywhere in JSON."""
    value = json.loads(json.dumps(value))
    for number, kind, new in edits:
        places: list[tuple[Any, Any]] = []
        pending = [value]
        while pending:
            container = pending.pop()
            for key in container if isinstance(container, dict) else range(len(container)):
                if len(places) < 3000:
                    places.append((container, key))
                if isinstance(container[key], dict | list):
                    pending.append(container[key])
        if not places:
            break
        container, key = places[number % len(places)]
        if kind == "set":
            container[key] = new
        elif kind == "delete":
            del container[key]
        elif isinstance(container, dict):
            container["type" if number % 2 else str(new)[:9]] = new
        else:
            container.insert(key, new)
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


@fuzz(400)
@given(st.sampled_from(CONFIGS), CHANGES)
def test_damaged_yaml(tmp_path, path, changes):
    kind = FinetuneConfig if b"\ntask" in path.read_bytes() else PretrainConfig
    (tmp_path / "config.yaml").write_bytes(damage(path.read_bytes(), changes))
    check(lambda: load_config(kind, tmp_path / "config.yaml"), most_lines=5)  # one for each mistake


@fuzz(200)
@given(st.sampled_from(CONFIGS), EDITS)
def test_other_values_in_yaml(tmp_path, path, edits):
    kind = FinetuneConfig if b"\ntask" in path.read_bytes() else PretrainConfig
    write_json(tmp_path / "config.yaml", edit(yaml.safe_load(path.read_text()), edits))
    check(lambda: load_config(kind, tmp_path / "config.yaml"), most_lines=5)


@pytest.fixture(scope="module")
def folders(every_head, tmp_path_factory) -> dict[str, Path]:
    """Copies of model folders, whose files are damaged in turn."""
    copies = tmp_path_factory.mktemp("folders")
    return {name: Path(shutil.copytree(folder, copies / name)) for name, folder in every_head.items()}


@fuzz(250)
@given(st.integers(0, 10**6), EDITS)
def test_other_values_in_the_configuration_of_a_model(folders, number, edits):
    folder = list(folders.values())[number % len(folders)]
    original = (folder / "config.json").read_bytes()
    try:
        write_json(folder / "config.json", edit(json.loads(original), edits))
        check(lambda: bertlite.load(str(folder)))
    finally:
        (folder / "config.json").write_bytes(original)


@fuzz(150)
@given(st.integers(0, 10**6), CHANGES)
def test_damaged_weights(folders, number, changes):
    folder = list(folders.values())[number % len(folders)]
    original = (folder / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(original[:8], "little")
    try:  # the header in half of the cases
        damaged = damage(original[:size], changes) + original[size:] if number % 2 else damage(original, changes)
        (folder / "model.safetensors").write_bytes(damaged)
        check(lambda: bertlite.load(str(folder)))
    finally:
        (folder / "model.safetensors").write_bytes(original)


@fuzz(300)
@given(EDITS)
def test_other_values_in_a_tokenizer(folders, edits):
    folder = next(iter(folders.values()))
    original = (folder / "tokenizer.json").read_bytes()
    content = json.loads(original)
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:40])  # so that other places are changed
    try:
        write_json(folder / "tokenizer.json", edit(content, edits))
        check(lambda: load_tokenizer(str(folder)))
    finally:
        (folder / "tokenizer.json").write_bytes(original)


def parquet(records: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def read_table(kind: str, path: Path, on_bad_example: str) -> list[Any]:
    task = TaskSettings.model_validate({"type": kind, "train": str(path), "on_bad_example": on_bad_example})
    records = read_records(DataLocation(path=str(path)), task, "task.train")
    TASKS[kind].output_labels(records, task)
    return select_examples(records, TASKS[kind], task, "task.train", [])


@pytest.mark.parametrize("kind", sorted(TASKS))
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_tables_that_are_not_damaged_are_read(tmp_path, kind, ending):
    """Else the inputs below would be refused for another reason than their damage."""
    (tmp_path / f"table{ending}").write_bytes(encode_table(kind, ending))
    assert len(read_table(kind, tmp_path / f"table{ending}", "error")) == 20


def encode_table(kind: str, ending: str) -> bytes:
    records = make_records(kind)[:20]
    lines = {
        ".jsonl": [json.dumps(record) for record in records],
        ".json": [json.dumps(records, indent=1)],
        ".csv": ["text,label", *(f'"{record.get("text")}",{record.get("label")}' for record in records)],
        ".tsv": ["text\tlabel", *(f"{record.get('text')}\t{record.get('label')}" for record in records)],
        ".conll": ["Ada B-PER\nspoke O\n" for _ in records],
        ".train": [f"__label__{number % 3} {record.get('text')}" for number, record in enumerate(records)],
    }
    return parquet(records) if ending == ".parquet" else "\n".join(lines[ending]).encode()


@fuzz(400)
@given(
    st.sampled_from(sorted(TASKS)),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".conll", ".train", ".parquet"]),
    CHANGES,
    st.sampled_from(["error", "skip"]),
)
def test_damaged_tables(tmp_path, kind, ending, changes, on_bad_example):
    path = tmp_path / f"table{ending}"
    path.write_bytes(damage(encode_table(kind, ending), changes))
    check(lambda: read_table(kind, path, on_bad_example))


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
ENCODINGS = ["utf-8", "utf-16", "gb18030", "shift_jis", "latin-1"]


@fuzz(300)
@given(
    st.text(max_size=200), st.sampled_from(sorted(COMPRESS)), CHANGES, st.booleans(), st.sampled_from(ENCODINGS),
    st.sampled_from(ENCODINGS),
)  # fmt: skip
def test_damaged_text(tmp_path, text, ending, changes, inside, written, read):
    content = text.encode(written, "replace") or b"x"
    compress = COMPRESS[ending]
    path = tmp_path / f"text.txt{ending}"
    path.write_bytes(compress(damage(content, changes)) if inside else damage(compress(content), changes))
    for document in ("line", "blank-line"):
        check(lambda: list(read_documents(Source(path=str(path), encoding=read), document, "data.train")))  # noqa: B023
