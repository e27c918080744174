"""Multi-head attention as a layer by itself, against torch.nn.MultiheadAttention."""

# Shapes: B batch, Q query tokens, T key tokens, D hidden size, H heads, K = D // H.
import pytest
import torch
from tiny_models import assert_close_to_scale
from torch import Tensor, nn

from bertlite.model.attention import KERNELS, MultiHeadAttention, best_kernel

B, Q, T, D, H = 2, 5, 7, 12, 3

DOCUMENTS = torch.tensor([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 3, 3, 3]])

# Masks that broadcast to (B,H,T,T), in which every query may attend somewhere; the first Q rows are for Q queries.
MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "padding": (torch.arange(T) < torch.tensor([[T - 3], [T]]))[:, None, None, :],
    "causal": torch.ones(T, T).tril().bool(),
    "documents": (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :])[:, None],
    "each head its own": torch.rand(B, H, T, T, generator=torch.Generator().manual_seed(0)) + torch.eye(T) > 0.5,
}

# Which of query, key and value are one tensor.
SOURCES = {
    "self": "xxx",
    "cross": "qmm",
    "value of its own": "qkv",
    "query is key": "xxv",
    "query is value": "xkx",
}


def make_inputs(source: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Leaf tensors by letter, and query, key and value among them; the tensor of letter q has Q tokens, others T."""
    generator = torch.Generator().manual_seed(1)
    leaves = {
        letter: torch.randn(B, Q if letter == "q" else T, D, generator=generator).to(dtype).requires_grad_()
        for letter in sorted(set(SOURCES[source]))
    }
    return leaves, [leaves[letter] for letter in SOURCES[source]]


def make_mask(name: str, queries: int) -> Tensor | None:
    return None if MASKS[name] is None else MASKS[name][..., :queries, :]


def make_pair(kernel: str, dropout: float = 0.0) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """Our layer and torch's, with the same random weights; no bias is 0."""
    ours = MultiHeadAttention(D, H, dropout, kernel)
    theirs = nn.MultiheadAttention(D, H, dropout, batch_first=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight, reference in same_parameters(ours, theirs):
            weight.normal_(std=0.5, generator=generator)
            reference.copy_(weight)
    return ours, theirs


def same_parameters(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor]]:
    return [
        (ours.qkv.weight, theirs.in_proj_weight),
        (ours.qkv.bias, theirs.in_proj_bias),
        (ours.out.weight, theirs.out_proj.weight),
        (ours.out.bias, theirs.out_proj.bias),
    ]


def torch_mask(mask: Tensor | None, queries: int) -> Tensor | None:
    """Our mask as torch takes it: (B·H,Q,T), True = may not attend."""
    return None if mask is None else ~mask.expand(B, H, queries, T).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_weights_and_gradients_are_those_of_torch(kernel, source, mask_name, training, dtype):
    ours, theirs = make_pair(kernel, dropout=0.0 if training else 0.5)
    ours.to(dtype).train(training)
    theirs.to(dtype).train(training)
    leaves, (query, key, value) = make_inputs(source, dtype)
    queries = query.shape[1]
    mask = make_mask(mask_name, queries)

    output = ours(query, key, value, mask)
    expected, weights = theirs(
        query, key, value, attn_mask=torch_mask(mask, queries), need_weights=True, average_attn_weights=False
    )

    assert_close_to_scale(output, expected)
    assert_close_to_scale(ours.weights(query, key, mask), weights)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    our_parameters, their_parameters = zip(*same_parameters(ours, theirs), strict=True)
    gradients = torch.autograd.grad((output * direction).sum(), [*leaves.values(), *our_parameters])
    references = torch.autograd.grad((expected * direction).sum(), [*leaves.values(), *their_parameters])
    for gradient, reference in zip(gradients, references, strict=True):
        assert_close_to_scale(gradient, reference)


@pytest.mark.parametrize("mask_name", MASKS)
def test_weights_sum_to_1_and_are_0_where_the_mask_forbids(mask_name):
    ours, _ = make_pair("matmul", dropout=0.5)
    _, (query, key, _) = make_inputs("cross")
    mask = make_mask(mask_name, Q)
    weights = ours.weights(query, key, mask)
    assert weights.shape == (B, H, Q, T)
    assert_close_to_scale(weights.sum(-1), torch.ones(B, H, Q))
    if mask is not None:
        assert (weights[~mask.expand_as(weights)] == 0).all()


def dropped_weights(kernel: str, rate: float, training: bool = True) -> Tensor:
    """Weights after dropout (H,Q,T), all equal before it; the value of each key is 1 in two dimensions, else 0."""
    heads, keys = 4, 64
    hidden_size = heads * 2 * keys
    layer = MultiHeadAttention(hidden_size, heads, rate, kernel).train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qkv.weight[-hidden_size:] = torch.eye(hidden_size)
        layer.out.weight.copy_(torch.eye(hidden_size))
        values = torch.eye(keys).repeat(1, 2 * heads)[None]
        torch.manual_seed(0)
        weights, same_weights = layer(values, values, values)[0].unflatten(-1, (heads, 2, keys)).unbind(2)
    assert torch.equal(weights, same_weights)
    return weights.transpose(0, 1)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_single_weights_at_its_rate_and_scales_up_the_rest(kernel, rate):
    weights = dropped_weights(kernel, rate)
    dropped = weights == 0
    deviation = (rate * (1 - rate) / dropped.numel()) ** 0.5
    assert abs(dropped.float().mean() - rate) < 5 * deviation
    kept = weights[~dropped]
    assert_close_to_scale(kept, torch.full_like(kept, 1 / (1 - rate) / weights.shape[-1]))
    # If whole queries, keys or heads were dropped together, their shares would differ more.
    for dimension in range(3):
        shares = dropped.float().mean(dimension)
        expected = (rate * (1 - rate) / dropped.shape[dimension]) ** 0.5
        assert 0.8 * expected < shares.std() < 1.2 * expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_is_off_in_eval_mode_and_at_rate_0(kernel):
    for weights in (dropped_weights(kernel, 0.5, training=False), dropped_weights(kernel, 0.0)):
        assert_close_to_scale(weights, torch.full_like(weights, 1 / weights.shape[-1]))


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_keeps_the_expected_output(kernel, mask_name):
    layer, _ = make_pair(kernel, dropout=0.3)
    repeats = 4000
    _, inputs = make_inputs("cross")
    mask = make_mask(mask_name, Q)
    masks = None if mask is None else mask.expand(B, H, Q, T).repeat(repeats, 1, 1, 1)
    with torch.no_grad():
        expected = layer.eval()(*inputs, mask)
        torch.manual_seed(0)
        outputs = layer.train()(*(x.repeat(repeats, 1, 1) for x in inputs), masks).view(repeats, B, Q, D)
    deviation = outputs.std(0)
    assert (deviation > 0.01).all()
    assert ((outputs.mean(0) - expected).abs() < 5 * deviation / repeats**0.5).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_keeps_the_same_weights_in_the_backward_pass(kernel):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, 4, generator=generator, requires_grad=True) for _ in range(3))
    torch.manual_seed(1)
    output = KERNELS[kernel](q, k, v, None, 0.5)
    direction = torch.randn(output.shape, generator=generator)
    total = (output * direction).sum()
    (gradient,) = torch.autograd.grad(total, v)
    assert_close_to_scale((gradient * v).sum(), total)  # the output is linear in v


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_never_reaches_real_tokens(kernel, training):
    layer, _ = make_pair(kernel, dropout=0.2)
    layer.train(training)
    mask = (torch.arange(T) < 4).view(1, 1, 1, T)
    results = []
    for padding in (0.0, 1e3):
        _, (x, _, _) = make_inputs("self")
        x = x.detach().clone()
        x[:, 4:] = padding
        x.requires_grad_()
        torch.manual_seed(0)
        output = layer(x, x, x, mask)[:, :4]
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert (gradient[:, 4:] == 0).all()
        results.append((output, gradient[:, :4]))
    for before, after in zip(*results, strict=True):
        assert_close_to_scale(after, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_may_attend_to_nothing_gives_finite_numbers(kernel):
    layer, _ = make_pair(kernel)
    leaves, (x, _, _) = make_inputs("self")
    mask = torch.ones(B, 1, T, T).bool()
    mask[0, :, 2:] = False
    output = layer(x, x, x, mask)
    gradients = torch.autograd.grad(output[:, :2].sum(), [*leaves.values(), *layer.parameters()])
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))
    assert layer.weights(x, x, mask).isfinite().all()


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_is_close_to_fp32(kernel, mask_name):
    layer, _ = make_pair(kernel)
    _, inputs = make_inputs("cross")
    mask = make_mask(mask_name, Q)
    expected = layer(*inputs, mask)
    output = layer.bfloat16()(*(x.bfloat16() for x in inputs), mask)
    assert output.dtype == torch.bfloat16
    assert_close_to_scale(output, expected.bfloat16())


def test_heads_that_do_not_divide_the_hidden_size_are_refused():
    with pytest.raises(ValueError, match="num_heads 5 does not divide hidden_size 12"):
        MultiHeadAttention(12, 5)


def test_the_best_kernel_is_named_for_each_device():
    assert best_kernel(torch.device("cpu")) == "matmul" and best_kernel(torch.device("cuda")) == "sdpa"
