"""Folders of sentence-transformers: vectors as that library computes them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bertlite import load
from bertlite.core.errors import UserError
from bertlite.training.run_folder import model_folder

pytest.importorskip("sentence_transformers")
TEXTS = ["The state.", "A much longer sentence, of the people and for the people of the Union.", "b", "b " * 90]


def reference(folder: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def make_folder(every_head, tmp_path):
    """Save a model by sentence-transformers, with a pooling and perhaps normalization; returns its folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    def make(pooling: str = "cls", normalize: bool = True) -> Path:
        parts = [modules.Transformer(str(every_head["BertModel"])), modules.Pooling(24, pooling_mode=pooling)]
        parts += [modules.Normalize()] * normalize
        SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "model"), create_model_card=False)
        return tmp_path / "model"

    return make


def make_old(folder: Path, pooling: str, out: Path) -> Path:
    """Copy a folder into the layout of the library's first versions, with a transformer in a folder of its own."""
    out.mkdir()
    shutil.copytree(folder, out / "0_Transformer", ignore=shutil.ignore_patterns("*_*", "modules.json"))
    for name in ("sentence_bert_config.json", "tokenizer_config.json"):
        shutil.copy(folder / name, out / "0_Transformer" / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "BertNormalizer", "lowercase": False, "clean_text": True,
                               "handle_chinese_chars": True, "strip_accents": None}  # fmt: skip
    change(out / "0_Transformer/tokenizer_config.json", do_lower_case=False)
    (out / "0_Transformer/tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "0_Transformer/sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": true}')
    (out / "1_Pooling").mkdir(), (out / "2_Normalize").mkdir()
    modes = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}
    (out / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 24, **modes}))
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]
    (out / "modules.json").write_text(json.dumps(entries))
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_the_folders_own_pooling_and_normalization_are_the_default(pooling, normalize, make_folder, tmp_path):
    folder = make_folder(pooling, normalize)
    expected = reference(folder)
    np.testing.assert_allclose(load(folder).encode(TEXTS), expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1) == normalize
    other = "cls" if pooling == "mean" else "mean"
    changed = load(folder).encode(TEXTS, pooling=other, normalize=not normalize)
    plain = load(shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("modules.json")))
    np.testing.assert_allclose(changed, plain.encode(TEXTS, pooling=other, normalize=not normalize), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_folders_of_older_versions(pooling, make_folder, tmp_path):
    folder = make_old(make_folder(), pooling, tmp_path / "old")
    expected = reference(folder)
    vectors = load(folder).encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(load(folder).encode(TEXTS, sequence_length=32) - vectors).max() > 1e-3  # 12 tokens count
    assert model_folder(str(folder)) == folder / "0_Transformer"
    np.testing.assert_allclose(load(folder / "0_Transformer").encode(TEXTS), expected, atol=1e-5)


def test_the_command_has_the_same_vectors_and_counts_truncated_texts(make_folder, bertlite, tmp_path):
    folder = make_folder()
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    code, _, err = bertlite("embed", folder, tmp_path / "a.txt", "--out", tmp_path / "v.npy")
    assert code == 0 and "1 of 4 texts have more than 32 tokens and were truncated" in err
    assert "pooling cls" in err and "normalize True" in err
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), reference(folder), atol=1e-5)
    bertlite("embed", folder, tmp_path / "a.txt", "--out", tmp_path / "v.npy", "--no-normalize", "--pooling", "max")
    expected = load(folder).encode(TEXTS, normalize=False, pooling="max")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-6)


def test_what_bertlite_does_not_have_is_refused_by_name(make_folder, tmp_path):
    folder = make_folder()
    modules = json.loads((folder / "modules.json").read_text())
    dense = [*modules[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    change(folder / "config_sentence_transformers.json", default_prompt_name="query")
    for path, content, message in [
        ("modules.json", modules, "default_prompt_name is 'query', but bertlite adds no prompts"),
        ("modules.json", dense, "no model of Transformer, Pooling, Dense"),
        ("modules.json", modules[:1], "no model of Transformer, but"),
        ("modules.json", [modules[0], {"path": "../other", "type": "Pooling"}], "modules.json: .*does not name"),
        ("modules.json", [*modules[:1], "Pooling"], "modules.json: Pooling does not name"),
        ("modules.json", {}, "modules.json: should hold a list"),
    ]:
        (folder / path).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load(folder).encode(TEXTS)
    (folder / "modules.json").write_text(json.dumps(modules))
    change(folder / "config_sentence_transformers.json", default_prompt_name=None)
    change(folder / "1_Pooling/config.json", pooling_mode="weightedmean")
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: pooling_mode is \['weightedmean'\]; .*--pooling"):
        load(folder).encode(TEXTS)
    assert load(folder).encode(TEXTS, pooling="mean").shape == (4, 24)
    (folder / "1_Pooling/config.json").unlink()
    (folder / "1_Pooling/config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="a link that leaves its folder"):
        load(folder).encode(TEXTS)
