"""The training loop against transformers and against itself, and the effect of every setting."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_runs import crash_after, metrics, pretrain, traces, weights
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import BertForMaskedLM

from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig
from bertlite.core.distributed import leave_process_group
from bertlite.core.errors import Failure, UserError
from bertlite.core.runtime import initialize_runtime
from bertlite.core.signals import Stopped, stop_request
from bertlite.data.batches import Batch
from bertlite.model.huggingface import load_model, load_tokenizer_of
from bertlite.pretraining.prepare import prepare, training_batches
from bertlite.pretraining.pretrain import new_trainer, standard_callbacks
from bertlite.training.optim import OPTIMIZERS
from bertlite.training.run_folder import read_metrics
from bertlite.training.trainer import Callback, Step, Trainer, evaluate


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def test_losses_equal_those_of_transformers_trained_on_the_same_batches(write_config):
    path = write_config(train__logging_steps=1, train__max_grad_norm=0.5)
    folder = pretrain(path)
    untrained = pretrain(path, "train.max_steps=0", f"output_dir={folder}-untrained")

    config = load_config(PretrainConfig, path)
    batches = training_batches(config, prepare(config))
    reference = BertForMaskedLM.from_pretrained(untrained / "model", attn_implementation="sdpa").train()
    decayed = [weight for weight in reference.parameters() if weight.ndim > 1]
    others = [weight for weight in reference.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    expected = []
    for line in (line for line in metrics(folder) if "loss" in line):
        batch = batches.training(8 * (line["step"] - 1), 8)
        labels = torch.full_like(batch.input_ids, -100)
        for row in range(8):
            scored = batch.labels[row] != -100
            labels[row, batch.prediction_positions[row, scored]] = batch.labels[row, scored]
        loss = reference(
            input_ids=batch.input_ids,
            attention_mask=(batch.document_ids[:, :, None] == batch.document_ids[:, None, :])[:, None],
            position_ids=batch.position_ids,
            labels=labels,
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert len(expected) == 12
    assert losses(folder) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_accumulation_is_exact(write_config, rows):
    whole = pretrain(write_config("whole", train__per_device_train_batch_size=8))
    parts = pretrain(write_config("parts", train__per_device_train_batch_size=rows))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, atol=2e-4, rtol=0)


def test_the_loss_is_the_mean_over_all_predictions_since_the_previous_line(write_config):
    each = pretrain(write_config("each", train__logging_steps=1))
    fourth = pretrain(write_config("fourth", train__logging_steps=4))
    config = load_config(PretrainConfig, write_config())
    batches = training_batches(config, prepare(config))
    counts = [int((batches.training(8 * step, 8).labels != -100).sum()) for step in range(4)]
    mean = sum(count * loss for count, loss in zip(counts, losses(each)[:4], strict=True)) / sum(counts)
    assert losses(fourth)[0] == pytest.approx(mean, abs=1e-6)
    tokens = sum(batches.training(8 * step, 8).tokens() for step in range(4))
    assert metrics(fourth)[0]["tokens"] == tokens


def test_at_one_step_the_order_is_train_then_evaluation_and_the_last_does_all(write_config):
    folder = pretrain(write_config(train__max_steps=11, train__logging_steps=5, train__eval_steps=5))
    kinds = [(line["step"], "eval" if "eval_loss" in line else "train") for line in metrics(folder)]
    assert kinds == [(s, kind) for s in (5, 10, 11) for kind in ("train", "eval")]
    assert (folder / "checkpoints" / "step-00000011").is_dir()


def test_a_run_of_no_steps_leaves_a_model_that_predicts_token_frequencies(write_config):
    path = write_config(train__max_steps=0)
    config = load_config(PretrainConfig, path)
    folder = pretrain(path)
    (line,) = metrics(folder)
    assert line["step"] == 0
    batches = training_batches(config, prepare(config))
    # The validation text is another than that of the frequencies.
    assert line["eval_loss"] == pytest.approx(batches.unigram_entropy(), abs=0.4)
    assert line["eval_loss"] < math.log(len(batches.tokenizer)) - 0.5
    model = load_model(folder / "model")
    _ = load_tokenizer_of(folder / "model", model.config)
    counts = batches.token_counts + 1
    torch.testing.assert_close(model.head.bias, torch.from_numpy(np.log(counts / counts.sum())).float())


def test_the_model_learns(write_config):
    path = write_config(
        train__max_steps=150, train__global_batch_size=32, train__eval_steps=75, train__learning_rate=5e-3
    )
    evaluations = [line["eval_loss"] for line in metrics(pretrain(path)) if "eval_loss" in line]
    assert evaluations[1] < evaluations[0] < 6.0, "the frequencies of tokens alone give 6.05"


FIFTY_STEPS = {"train__max_steps": 50, "train__logging_steps": 1, "train__global_batch_size": 16}


# bf16 has 8 bits: one loss of a batch is off by about 2**-8 / sqrt(predictions), which the training then follows.
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_bf16_training_follows_fp32(write_config, optim):
    plain = losses(pretrain(write_config("plain", **FIFTY_STEPS, train__optim=optim)))
    bf16 = losses(pretrain(write_config("bf16", **FIFTY_STEPS, train__optim=optim, train__precision="bf16")))
    assert bf16 == pytest.approx(plain, abs=3e-2) and bf16 != plain


def test_compiled_training_follows_uncompiled_training_and_resumes_bit_for_bit(write_config, tmp_path, capsys):
    changes = {
        "model__num_hidden_layers": 1,
        "train__logging_steps": 1,
        "train__save_steps": 5,
    }  # few kernels to compile
    torch.compiler.reset()  # what an earlier test compiled would be used again
    counters.clear()
    path = write_config("compiled", **changes, train__compile=True)
    compiled = pretrain(path)
    assert counters["stats"]["unique_graphs"] > 0
    log = capsys.readouterr().err
    assert log.count("compiled in the first step") == log.count("compiling the evaluation") == 1
    first, *others = [line["tokens_per_second"] for line in read_metrics(compiled) if "loss" in line]
    assert first is None and min(others) > 0, "the time of compiling counts as throughput"
    plain = pretrain(write_config("plain", **changes))
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)  # the order of sums differs
    cut = crash_after(compiled, 5, tmp_path / "cut")
    pretrain(path, f"output_dir={cut}", resume=True)
    assert traces(cut) == traces(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 3e-2)])
def test_long_compiled_training_follows_plain_fp32(write_config, precision, tolerance):
    plain = losses(pretrain(write_config("plain", **FIFTY_STEPS)))
    torch.compiler.reset()
    compiled = {"train__compile": True, "train__precision": precision}
    assert losses(pretrain(write_config("compiled", **FIFTY_STEPS, **compiled))) == pytest.approx(plain, abs=tolerance)


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bf16_where_that_is_fast(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert initialize_runtime("auto").dtype == (torch.bfloat16 if fast else torch.float32)


def dropped_units(path: Path, *overrides: str) -> list[bytes]:
    """Which units of the embeddings are dropped in each micro-batch of a run, in their order."""
    config = load_config(PretrainConfig, path, list(overrides))
    prepared, runtime = prepare(config), initialize_runtime("fp32")
    Path(config.output_dir).mkdir(exist_ok=True)
    trainer = new_trainer(config, prepared, runtime, standard_callbacks(config, prepared, runtime, start=0.0)[:-1])
    units: list[bytes] = []
    trainer.model.encoder.embeddings.dropout.register_forward_hook(
        lambda module, _, output: units.append((output == 0).numpy().tobytes()) if module.training else None
    )
    trainer.train()
    return units


def test_dropout_differs_between_steps_micro_batches_and_seeds(write_config):
    """A resumed run would be the same bit for bit with the same units missing in every step."""
    path = write_config(
        model__hidden_dropout_prob=0.5, train__max_steps=3, train__eval_steps=1, train__per_device_train_batch_size=4
    )
    one, again, other = dropped_units(path), dropped_units(path), dropped_units(path, "train.seed=1")
    assert one == again and len(one) == 6 and len({*one, *other}) == 12


@pytest.mark.parametrize("enabled", [False, True])
def test_gradient_checkpointing_follows_its_setting(write_config, monkeypatch, enabled):
    calls = []
    monkeypatch.setattr("bertlite.model.encoder.checkpoint", lambda *a, **b: calls.append(1) or checkpoint(*a, **b))
    pretrain(write_config(train__gradient_checkpointing=enabled, train__max_steps=2))
    assert bool(calls) == enabled


def test_a_signal_ends_an_evaluation_unless_other_ranks_would_wait(tmp_path):
    def count(model, batch):
        return {"count": torch.tensor(len(batch))}

    batches = Batch(*torch.zeros(5, 4, 8).long())
    arguments = (torch.nn.Identity(), count, lambda first, size: batches, 4, 4, initialize_runtime("fp32"))
    stop_request.number = 15
    try:
        with pytest.raises(Stopped):
            evaluate(*arguments)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert evaluate(*arguments) == {}
    finally:
        stop_request.number = 0
        leave_process_group()


class StopAfterStep2(Callback):
    """What a signal during the third step does."""

    def on_step(self, trainer: Trainer, step: Step) -> None:
        stop_request.number = 15 * (trainer.progress.step == 2)


@pytest.mark.parametrize("saves", [True, False])
def test_an_interrupted_training_names_its_checkpoint_if_it_saves_any(write_config, capsys, saves):
    config = load_config(PretrainConfig, write_config())
    folder = Path(config.output_dir)
    folder.mkdir()
    prepared, runtime = prepare(config), initialize_runtime("fp32")
    callbacks = standard_callbacks(config, prepared, runtime, start=0.0) if saves else []
    try:
        with pytest.raises(Stopped):
            new_trainer(config, prepared, runtime, [*callbacks, StopAfterStep2()]).train()
    finally:
        stop_request.number = 0
    assert ("saved step 2" in capsys.readouterr().err) == (folder / "checkpoints").exists() == saves


def test_without_a_compiler_the_model_runs_uncompiled_unless_it_must_not(monkeypatch, capsys):
    assert initialize_runtime("fp32", "auto").compile and initialize_runtime("fp32", True).compile  # here there is one
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not initialize_runtime("fp32", "auto").compile
    assert (
        "the model runs uncompiled, which is slower: torch.compile needs a C++ compiler (no-such-"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"train\.compile is true, but that needs a C\+\+ compiler"):
        initialize_runtime("fp32", True)
    monkeypatch.undo()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(UserError, match="Python's headers"):
        initialize_runtime("fp32", True)


def test_training_that_diverges_ends_with_advice(write_config):
    with pytest.raises(Failure, match=r"(?s)not finite at step \d+.*learning_rate"):
        pretrain(write_config(train__learning_rate=1e30, train__warmup_ratio=0.0))


# A value for every setting that differs from what `write_config` sets; None where another test shows the effect.
CHANGED = {
    "model.hidden_size": 48,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 96,
    "model.hidden_act": "relu",
    "model.hidden_dropout_prob": 0.1,
    "model.attention_probs_dropout_prob": 0.1,
    "model.max_position_embeddings": 64,
    "model.type_vocab_size": 1,
    "model.initializer_range": 0.05,
    "model.layer_norm_eps": 1e-5,
    "model.initialization": "normal",
    "model.init_from": None,  # test_continue.py
    "tokenizer.path": None,  # test_tokenizer.py, test_cli.py
    "tokenizer.vocab_size": 900,
    "tokenizer.lowercase": False,
    "tokenizer.strip_accents": True,
    "tokenizer.special_tokens": ["[E1]"],
    "tokenizer.train_characters": 20000,
    "tokenizer.pad_to_multiple_of": 64,
    "tokenizer.extend": None,  # test_continue.py
    "data.train": ["sample"],
    "data.validation": [],
    "data.validation_split": None,  # test_batches.py
    "data.sequence_length": 32,
    "data.document": "line",
    "data.min_characters": 4000,
    "data.max_characters": 20000,
    "data.remove_duplicates": None,  # test_sources.py
    "data.segmenter": None,  # test_batches.py
    "data.cache_dir": None,  # test_corpus.py
    "masking.strategy": "whole-word",
    "masking.rate": 0.3,
    "train.max_steps": 5,
    "train.budget": "300 tokens",
    "train.global_batch_size": 4,
    "train.per_device_train_batch_size": 1,
    "train.gradient_checkpointing": None,  # the same numbers; above and test_model.py
    "train.optim": "muon",
    "train.learning_rate": 2e-3,
    "train.muon_learning_rate": None,  # test_optim.py
    "train.weight_decay": 0.1,
    "train.adam_beta1": 0.5,
    "train.adam_beta2": 0.9,
    "train.adam_epsilon": 1e-4,
    "train.warmup_ratio": 0.5,
    "train.lr_scheduler_type": "cosine",
    "train.max_grad_norm": 0.1,
    "train.precision": "bf16",
    "train.compile": None,  # above
    "train.seed": 7,
    "train.logging_steps": 1,
    "train.eval_steps": 2,
    "train.save_steps": 2,
    "train.save_minutes": None,  # test_faults.py
    "train.save_total_limit": 1,
    "train.on_nonfinite_loss": None,  # test_faults.py
    "output_dir": None,
}


def fields(section, prefix: str = "") -> set[str]:
    names = set()
    for name, value in section:
        names |= fields(value, f"{name}.") if hasattr(value, "model_dump") else {prefix + name}
    return names


def test_every_setting_is_in_the_list(write_config):
    assert set(CHANGED) == fields(load_config(PretrainConfig, write_config()))


@pytest.fixture(scope="module")
def unchanged():
    return {}


@pytest.mark.parametrize("setting", [name for name, value in CHANGED.items() if value is not None])
def test_every_setting_changes_something(write_config, unchanged, setting):
    short = {"train__max_steps": 4}
    if "traces" not in unchanged:
        # Not config.json, which repeats the settings of the model.
        unchanged["traces"] = traces(pretrain(write_config("before", **short, train__save_steps=1)))[:3]
        unchanged["again"] = traces(pretrain(write_config("again", **short, train__save_steps=1)))[:3]
    assert unchanged["traces"] == unchanged["again"]
    path = write_config("after", **short, train__save_steps=1)
    assert traces(pretrain(path, f"{setting}={json.dumps(CHANGED[setting])}"))[:3] != unchanged["traces"]
