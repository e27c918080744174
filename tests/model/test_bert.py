"""The encoder against transformers.BertModel: in training and evaluation mode, with and without dropout, packed."""

# Shapes: B batch, T tokens, D hidden size, V vocabulary, P predictions of a sequence.
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SHAPE, TOLERANCES, assert_close_to_scale, make_segments, make_sequences
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from bertlite.config.settings import Architecture
from bertlite.core.errors import UserError
from bertlite.model.architectures import build_encoder
from bertlite.model.attention import KERNELS
from bertlite.model.bert import Embeddings
from bertlite.model.encoder import gather_positions
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.huggingface import weight_names
from bertlite.model.initialization import initialize, parameter_count
from bertlite.model.layers import ACTIVATIONS

KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "masked language model": (MaskedLanguageModel, BertForMaskedLM),
    "encoder": (partial(build_encoder, pooler=True), BertModel),
}


def architecture(**changes: Any) -> Architecture:
    return Architecture(**{**SHAPE, **changes})


def make_pair(
    kernel: str = "matmul", kind: str = "masked language model", dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Any, Any]:
    """Our model and transformers', in training mode, with the same random weights; no bias is 0, no scale 1.

    In fp64, so that a difference comes from the formulas, not from a processor's rounding.
    """
    our_class, their_class = KINDS[kind]
    ours = our_class(architecture(**changes), kernel)
    attention = "sdpa" if kernel == "sdpa" else "eager"
    theirs = their_class(BertConfig(**{**SHAPE, **changes}, attn_implementation=attention))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(parameter.ndim == 1, 0.3, generator=generator)
    weights = dict(theirs.named_parameters())
    ours.load_state_dict({name: torch.cat([weights[their] for their in names])
                          for name, names in weight_names(ours).items()})  # fmt: skip
    return ours.to(dtype).train(), theirs.to(dtype).train()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_of_all_layers_are_those_of_transformers(kernel, activation, training):
    ours, theirs = make_pair(kernel, "encoder", hidden_act=activation)
    ours.train(training)
    theirs.train(training)
    tokens = input_ids, _, document_ids = make_sequences([[16], [9], [1]], 16)
    segments = make_segments(input_ids.shape)

    states = ours.hidden_states(*tokens, segments)
    expected = theirs(input_ids, document_ids, segments, output_hidden_states=True)

    real = document_ids > 0
    assert len(states) == len(expected.hidden_states) == SHAPE["num_hidden_layers"] + 1
    for state, reference in zip(states, expected.hidden_states, strict=True):
        assert_close_to_scale(state[real], reference[real])
    assert torch.equal(ours(*tokens, segments), states[-1])
    chosen = torch.tensor([[3, 0], [8, 1], [0, 0]])
    for depth in (1, 2):
        assert torch.equal(ours(*tokens, segments, depth=depth), states[depth])
        assert_close_to_scale(ours(*tokens, segments, chosen, depth), gather_positions(states[depth], chosen))
    assert_close_to_scale(ours.pooler(states[-1]), expected.pooler_output)


@pytest.mark.parametrize("hidden, attention", [(0.2, 0.0), (0.0, 0.2), (0.1, 0.3)])
@pytest.mark.parametrize("kernel", ["matmul", "sdpa"])
def test_dropout_falls_where_that_of_transformers_does(kernel, hidden, attention):
    """Both draw random numbers in the order of the layers, so that one seed gives both the same."""
    rates = {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention}
    ours, theirs = make_pair(kernel, **rates)
    tokens = input_ids, _, document_ids = make_sequences([[16], [9]], 16)
    all_positions = torch.arange(16).expand_as(input_ids)
    torch.manual_seed(0)
    scores = ours(*tokens, all_positions)
    torch.manual_seed(0)
    expected = theirs(input_ids, document_ids).logits
    real = document_ids > 0
    assert_close_to_scale(scores[real], expected[real])


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_at_the_prediction_positions_are_those_of_transformers_there(kernel):
    ours, theirs = make_pair(kernel)
    tokens = input_ids, _, document_ids = make_sequences([[16], [9]], 16)
    segments = make_segments(input_ids.shape)
    positions = torch.tensor([[15, 0, 3, 3, 7], [8, 1, 0, 0, 0]])
    scores = ours(*tokens, positions, segments)
    expected = theirs(input_ids, document_ids, segments).logits
    assert scores.shape == (2, 5, SHAPE["vocab_size"])
    assert_close_to_scale(
        scores, torch.stack([logits[chosen] for logits, chosen in zip(expected, positions, strict=True)])
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_loss_and_gradients_are_those_of_transformers(kernel):
    ours, theirs = make_pair(kernel)
    tokens = input_ids, _, document_ids = make_sequences([[16], [9]], 16)
    segments = make_segments(input_ids.shape)
    positions = torch.tensor([[1, 4, 12], [0, 3, 8]])
    targets = torch.tensor([[5, 6, 7], [8, 9, 10]])
    loss = F.cross_entropy(ours(*tokens, positions, segments).flatten(0, 1), targets.flatten())
    labels = torch.full_like(input_ids, -100).scatter(1, positions, targets)
    expected = theirs(input_ids, document_ids, segments, labels=labels).loss
    assert_close_to_scale(loss, expected)
    loss.backward()
    expected.backward()
    references = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    names = weight_names(ours)
    for name, parameter in ours.named_parameters():
        assert_close_to_scale(parameter.grad, torch.cat([references[their] for their in names[name]]))


def test_without_segments_all_tokens_are_in_the_first():
    ours, _ = make_pair(kind="encoder")
    tokens = make_sequences([[16], [9]], 16)
    assert_close_to_scale(ours(*tokens), ours(*tokens, torch.zeros_like(tokens[0])))


PACKED = {"one document each": [[7], [4], [5]], "packed": [[7, 4, 5]], "packed and padded": [[4, 7, 3], [1, 9]]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sequences", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_document_in_a_packed_sequence_gets_what_it_gets_alone(kernel, training, sequences, dtype):
    """In fp64, and in bf16 by autocast against fp32."""
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    ours, theirs = make_pair(kernel, "encoder", exact)
    ours.train(training)
    theirs.train(training)
    tokens = input_ids, _, document_ids = make_sequences(sequences, 18)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        packed = ours(*tokens)
    for index, documents in enumerate(sequences):
        for number in range(1, len(documents) + 1):
            of_document = document_ids[index] == number
            alone = input_ids[None, index, of_document]
            expected = theirs(alone).last_hidden_state[0]
            assert_close_to_scale(packed[index, of_document].to(exact), expected, TOLERANCES[dtype])
            length = alone.shape[1]
            our_alone = ours(alone, torch.arange(length)[None], torch.ones(1, length).long())
            assert_close_to_scale(our_alone[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_chosen_positions_of_packed_sequences_get_what_they_get_among_all(kernel, training, dtype):
    """Outputs and gradients, also where a position is chosen twice; in fp64, and in bf16 by autocast."""
    ours, _ = make_pair(kernel, "encoder", torch.float32 if dtype == torch.bfloat16 else dtype)
    ours.train(training)
    tokens = make_sequences([[7, 4, 5], [1, 9]], 18)
    chosen = torch.tensor([[0, 6, 8, 15], [0, 1, 9, 0]])
    results = []
    for chosen_alone in (True, False):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = ours(*tokens, output_positions=chosen) if chosen_alone else gather_positions(ours(*tokens), chosen)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        output.tanh().sum().backward()
        gradients = [parameter.grad for name, parameter in ours.named_parameters() if "pooler" not in name]
        results.append([output, *gradients])
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 0.1}[dtype]
    for alone, among_all in zip(*results, strict=True):
        assert (alone - among_all).norm() <= tolerance * among_all.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_documents_and_padding_change_nothing_bit_for_bit(kernel):
    ours, _ = make_pair(kernel, "encoder", torch.float32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    input_ids, position_ids, document_ids = make_sequences([[6, 5]], 16)
    others, _, _ = make_sequences([[16]], 16, seed=9)
    first = document_ids == 1
    torch.manual_seed(0)
    before = ours(input_ids, position_ids, document_ids)[first]
    torch.manual_seed(0)
    after = ours(torch.where(first, input_ids, others), position_ids, document_ids)[first]
    assert torch.equal(before, after)


RATES = ["hidden_dropout_prob", "attention_probs_dropout_prob"]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_is_active_in_training_and_off_in_eval_mode_and_at_rate_0(kernel, rate):
    tokens = make_sequences([[16], [9]], 16)
    dropping, _ = make_pair(kernel, "encoder", num_hidden_layers=1, **{rate: 0.1})
    dropping.embeddings.dropout.p = 0.0
    plain, _ = make_pair(kernel, "encoder", num_hidden_layers=1)
    for positions in (None, torch.tensor([[0, 3], [8, 0]])):
        dropped = [dropping.train()(*tokens, output_positions=positions) for _ in range(2)]
        expected = plain(*tokens, output_positions=positions)
        assert not torch.equal(*dropped)
        assert torch.equal(plain(*tokens, output_positions=positions), expected)
        assert torch.equal(dropping.eval()(*tokens, output_positions=positions), expected)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_hidden_dropout_drops_units_of_the_embeddings_at_its_rate_and_scales_up_the_rest(rate):
    config = architecture(hidden_size=120, hidden_dropout_prob=rate)
    embeddings = Embeddings(config)
    initialize(embeddings, 0.02, seed=0)
    input_ids, position_ids, _ = make_sequences([[20]] * 40, 20)
    torch.manual_seed(0)
    dropped = embeddings(input_ids, position_ids)
    expected = embeddings.eval()(input_ids, position_ids)
    kept = dropped != 0
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs((~kept).float().mean() - rate) < 5 * deviation
    assert_close_to_scale(dropped[kept], expected[kept] / (1 - rate))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(kernel, dropout):
    rates = dict.fromkeys(RATES, dropout)
    ours, _ = make_pair(kernel, **rates)
    tokens = make_sequences([[7, 4], [9]], 16)
    positions = torch.tensor([[0, 6, 10], [0, 3, 8]])
    results = []
    for enabled in (False, True):
        ours.encoder.gradient_checkpointing = enabled
        ours.zero_grad()
        torch.manual_seed(0)
        loss = ours(*tokens, positions).logsumexp(-1).sum()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in ours.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_keeps_less_for_the_backward_pass_in_training_alone(training):
    ours, _ = make_pair(kind="encoder")
    ours.train(training)
    tokens = make_sequences([[16]], 16)
    sizes = []
    for enabled in (False, True):
        ours.gradient_checkpointing = enabled
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor), lambda _: None):
            ours(*tokens)
        sizes.append(sum(tensor.numel() for tensor in kept))
    assert sizes[1] < sizes[0] if training else sizes[1] == sizes[0]


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match=r"model\.hidden_act is 'gleu'.*Did you mean gelu"):
        build_encoder(architecture(hidden_act="gleu"))


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initialization_is_that_of_bert(std):
    model = MaskedLanguageModel(architecture(vocab_size=3000, hidden_size=120, intermediate_size=300))
    initialize(model, std, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # A normal distribution truncated at two deviations has 0.8796 of its deviation.
            assert parameter.abs().max() <= 2 * std, name
            assert abs(parameter.mean()) < 5 * std / parameter.numel() ** 0.5, name
            assert abs(parameter.std() / std - 0.8796) < 5 / parameter.numel() ** 0.5, name
        else:
            assert (parameter == float(name.endswith("norm.weight"))).all(), name


def weights_of_seed(seed: int) -> dict[str, Tensor]:
    model = MaskedLanguageModel(architecture())
    initialize(model, 0.02, seed)
    return dict(model.named_parameters())


def test_initialization_follows_from_the_seed_alone():
    torch.manual_seed(1)
    first = weights_of_seed(7)
    torch.manual_seed(2)
    again, other = weights_of_seed(7), weights_of_seed(8)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other[name]), name


def test_initialization_gives_no_two_matrices_the_same_numbers():
    matrices = [parameter for parameter in weights_of_seed(0).values() if parameter.ndim > 1]
    for first, second in itertools.combinations(matrices, 2):
        assert not torch.equal(first.flatten()[:20], second.flatten()[:20])


# Layers and hidden size, as google-research/bert sized them.
GOOGLE_SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", GOOGLE_SIZES)
def test_parameter_counts_of_the_google_sizes_are_those_of_transformers(size, kind):
    layers, hidden = GOOGLE_SIZES[size]
    shape = {
        "vocab_size": 30522,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    our_class, their_class = KINDS[kind]
    with torch.device("meta"):
        ours: nn.Module = our_class(Architecture(**shape))
        theirs = their_class(BertConfig(**shape))
    theirs.tie_weights()  # which older versions do not do there
    assert parameter_count(ours) == sum(parameter.numel() for parameter in theirs.parameters())
