"""The transformer against loops over plain numbers: losses, masking, the whole forward pass.

The letters are those of transformer.py: B sequences, T tokens, D width, H heads, V words of
the vocabulary, P word pairs, d columns of the document vector, M masked positions.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl import transformer
from minissl.training.machine import speed_up_on_cpu
from minissl.transformer import (
    FIRST_ORDINARY,
    IGNORE_INDEX,
    MASK,
    PAD,
    document_loss,
    mask_tokens,
    masked_language_model_loss,
)


V, D, H, WINDOW, d = 12, 8, 2, 6, 4
# Left and right token. Some neighbours in the texts below are a pair, and most are not.
PAIRS = [(2, 3), (3, 3), (4, 2), (7, 9), (9, 2)]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_model(dtype=torch.float32, pairs=PAIRS):
    """Two layers in which every parameter is random.

    The matrices that start at zero would hide whatever they multiply.
    """
    torch.manual_seed(0)
    keys = tensor([left * V + right for left, right in pairs], torch.int64)
    model = transformer.TextEncoder(V, keys, D, 2, H, WINDOW, d).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
        model.pair_embedding.weight[-1] = 0          # "no pair" is no parameter: it stays zero
    return model


def documents(*lengths):
    """Random ordinary tokens (B, T) with PAD behind each end, and the lengths (B,)."""
    lengths = tensor(lengths, torch.int64)
    shape = (len(lengths), int(lengths.max()))
    tokens = torch.randint(FIRST_ORDINARY, V, shape, generator=generator(1))
    is_padding = torch.arange(shape[1]) >= lengths[:, None]
    return tokens.masked_fill(is_padding, PAD), lengths


def softmax_by_hand(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def assert_equals(found, expected):
    """Equal but for the rounding of float64."""
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- the two losses

def test_masked_loss_and_its_gradient_are_the_formula():
    torch.manual_seed(0)
    logits = 2 * torch.randn(5, 7, dtype=torch.float64)
    logits.requires_grad_()
    targets = [0, 6, 3, 3, 1]
    loss = masked_language_model_loss(logits, torch.tensor(targets))
    loss.backward()

    value, gradient = 0, np.zeros((5, 7))
    for i in range(5):
        p = softmax_by_hand(logits[i].tolist())
        value -= math.log(p[targets[i]]) / 5         # −1/|M| Σ log softmax(y_i)[x_i]
        for w in range(7):
            is_target = float(w == targets[i])
            gradient[i, w] = (p[w] - is_target) / 5
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert_equals(logits.grad, gradient)


def test_document_loss_and_its_gradient_are_the_formula():
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 6, dtype=torch.float64)
    logits.requires_grad_()
    bag = torch.rand(4, 6, dtype=torch.float64)
    bag[1] = 0                                       # the second document has no words
    bag[2, :4] = 0
    loss = document_loss(logits, bag)
    loss.backward()

    value, gradient = 0, np.zeros((4, 6))
    for b in (0, 2, 3):
        p = softmax_by_hand(logits[b].tolist())
        for w in range(6):
            q = bag[b, w].item() / sum(bag[b].tolist())
            value -= q * math.log(p[w]) / 3          # −1/B Σ_b Σ_w q_w log softmax(y_b)[w]
            gradient[b, w] = (p[w] - q) / 3
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert_equals(logits.grad, gradient)


def test_both_losses_of_an_example_worked_by_hand():
    logits = tensor([[1, 2, 5], [1, 2, 5]]).log()    # probabilities 1/8, 2/8, 5/8
    loss = masked_language_model_loss(logits, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(8 / 5)) / 2)

    bag = tensor([[0, 0.5, 1.5]])                    # q = 0, 1/4, 3/4
    loss = document_loss(logits[:1], bag)
    assert loss.item() == pytest.approx(math.log(4) / 4 + math.log(8 / 5) * 3 / 4)


def test_document_loss_of_empty_bags_is_0_and_not_nan():
    logits = torch.randn(4, 6, requires_grad=True)
    loss = document_loss(logits, torch.zeros(4, 6))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_a_document_in_one_of_four_processes_counts_a_quarter():
    # Each process divides by the mean of the counts, 1/4, and the mean of the four losses is
    # then the loss of the one document.
    logits, bag = torch.randn(1, 6), torch.rand(1, 6)
    of_four = [document_loss(logits, bag, torch.tensor(0.25))]
    for _ in range(3):
        of_four.append(document_loss(logits, torch.zeros(1, 6), torch.tensor(0.25)))
    torch.testing.assert_close(sum(of_four) / 4, document_loss(logits, bag))


PRECISIONS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_masked_loss_of_uniform_logits_is_ln_V(dtype):
    # 9.0109 is no bfloat16 number: its neighbours there are 9 and 9.0625. So this also
    # shows that the logarithm is computed in float32.
    logits = torch.full((3, 8192), 0.5, dtype=dtype)
    loss = masked_language_model_loss(logits, torch.tensor([0, 5, 8191]))
    assert loss.item() == pytest.approx(math.log(8192), abs=1e-5)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_masked_loss_of_large_logits_does_not_overflow(dtype):
    large = tensor([[2**14, 0, -2**14], [2**14, 0, 0]], dtype)      # e^16384 is no number
    loss = masked_language_model_loss(large, torch.tensor([0, 1]))
    assert loss == (0 + 2**14) / 2


@pytest.mark.parametrize("loss_function", [masked_language_model_loss, document_loss])
def test_with_count_the_losses_of_parts_add_up(loss_function):
    # The parts have unequal sizes: the mean of their means would be another number
    # (transformers issue 24725).
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels, count = torch.tensor([0, 4, 2, 2, 1, 3]), 6
    if loss_function is document_loss:
        labels = torch.rand(6, 5, dtype=torch.float64)
        labels[1] = 0
        count = 5                                    # documents with a word
    whole = loss_function(logits, labels)
    total, gradient = 0, 0
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6)):
        part = loss_function(logits[rows], labels[rows], count)
        total = total + part
        gradient = gradient + torch.autograd.grad(part, logits)[0]
    assert_equals(total.detach(), whole.detach())
    assert_equals(gradient, torch.autograd.grad(whole, logits)[0])


# ---------------------------------------------------------------- masking

def test_exactly_the_share_of_each_sequence_is_masked():
    lengths = torch.arange(1, 301)
    is_padding = torch.arange(300) >= lengths[:, None]
    tokens = torch.full((300, 300), 5).masked_fill(is_padding, PAD)
    _, targets = mask_tokens(tokens, lengths, V, generator=generator(0))
    is_masked = targets != IGNORE_INDEX
    assert not (is_masked & is_padding).any()
    for row, T in enumerate(lengths.tolist()):
        expected = max(1, (15 * T + 50) // 100)      # ⌊0.15 T + ½⌋ in whole numbers
        assert is_masked[row].sum() == expected


def test_80_percent_are_hidden_10_random_and_10_stay():
    # There are only 4 ordinary tokens, so the shares would show a random token from a range
    # that is off by one.
    tokens = torch.randint(FIRST_ORDINARY, 6, (2000, 64), generator=generator(0))
    inputs, targets = mask_tokens(tokens, torch.full((2000,), 64), 6, generator=generator(1))
    is_masked = targets != IGNORE_INDEX
    shown, original = inputs[is_masked], targets[is_masked]
    n = len(original)
    assert n == 20000
    hidden = shown == MASK
    kept = shown == original
    random = ~hidden & ~kept
    assert set(shown[random].tolist()) == {2, 3, 4, 5}
    same = 0.1 / 4                                   # a random token is the old one once in 4
    for share, seen in [(0.8, hidden), (0.1 + same, kept), (0.1 - same, random)]:
        sigma = math.sqrt(share * (1 - share) / n)
        assert abs(seen.float().mean() - share) < 4 * sigma


def test_every_place_is_masked_equally_often():
    tokens = torch.full((2000, 64), 5)
    _, targets = mask_tokens(tokens, torch.full((2000,), 64), V, generator=generator(1))
    share = (targets != IGNORE_INDEX).float().mean(0)               # (64,)
    expected = 10 / 64                               # 10 of 64 tokens are chosen
    sigma = math.sqrt(expected * (1 - expected) / 2000)
    assert (share - expected).abs().max() < 5 * sigma               # 64 places are compared


def test_targets_are_the_original_tokens_or_minus_100():
    tokens, lengths = documents(1, 2, 30, 7, 30)
    _, targets = mask_tokens(tokens, lengths, V, share=0.4, generator=generator(3))
    assert targets.shape == tokens.shape
    assert targets.dtype == torch.int64
    asked = 0
    for token, target in zip(tokens.flatten(), targets.flatten(), strict=True):
        assert target in (token, -100)
        if target != -100:
            asked += 1
    assert asked == 1 + 1 + 12 + 3 + 12              # ⌊0.4 T + ½⌋, and at least one


def test_inputs_differ_only_where_targets_are_asked():
    tokens, lengths = documents(1, 2, 30, 7, 30)
    inputs, targets = mask_tokens(tokens, lengths, V, share=0.4, generator=generator(3))
    assert inputs.shape == tokens.shape
    changed = inputs != tokens
    assert changed.any()
    assert (targets[changed] != -100).all()


def test_masking_leaves_the_tokens_of_the_caller_alone():
    tokens, lengths = documents(1, 2, 30, 7, 30)
    before = tokens.clone()
    inputs, targets = mask_tokens(tokens, lengths, V, generator=generator(3))
    inputs.fill_(7)
    targets.fill_(7)
    assert torch.equal(tokens, before)


def test_each_generator_draws_its_own_mask():
    tokens, lengths = documents(1, 2, 30, 7, 30)
    first = mask_tokens(tokens, lengths, V, share=0.4, generator=generator(3))
    again = mask_tokens(tokens, lengths, V, share=0.4, generator=generator(3))
    other = mask_tokens(tokens, lengths, V, share=0.4, generator=generator(4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_copying_solves_the_textbook_trap_but_not_our_task():
    # The trap: targets for 15 % of the tokens, but the unmasked sequence as input. A model
    # that copies its input then gets everything right.
    size = 100
    tokens = torch.randint(FIRST_ORDINARY, size, (500, 64), generator=generator(0))
    lengths = torch.full((500,), 64)
    inputs, targets = mask_tokens(tokens, lengths, size, generator=generator(1))
    is_masked = targets != IGNORE_INDEX
    targets = targets[is_masked]

    def copy_of(sequence, scale=15.0):
        """Logits of a model that says what it sees. At [MASK] all words are alike to it."""
        shown = sequence[is_masked]
        logits = scale * F.one_hot(shown, size).double()
        logits[shown == MASK] = 0
        return logits

    assert masked_language_model_loss(copy_of(tokens), targets) < 1e-4
    assert (copy_of(tokens).argmax(1) == targets).all()
    wrong = (copy_of(inputs).argmax(1) != targets).double().mean()
    assert 0.88 < wrong < 0.92                       # 80 % hidden, 10 % replaced: 90 % ± 4 sigma

    # With the best scale s, where e^s = V − 1, the loss of copying is
    # 0.8 ln V + 0.2 ln(2V − 2) − 0.1 ln(V − 1) = 4.28. Compare ln V = 4.61.
    losses = []
    for scale in np.arange(0, 15, 0.25):
        loss = masked_language_model_loss(copy_of(inputs, scale), targets)
        losses.append(loss.item())
    assert 4.15 < min(losses) < 4.40


# ---------------------------------------------------------------- the encoder by hand

def norm_by_hand(x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in x])


def squared_relu(x):
    return np.array([max(0, value) ** 2 for value in x])


def rotate_by_hand(x, t):
    """Columns i and i + E/2 as a point in the plane, turned by t / 10000^(i / (E/2)) radians."""
    half = len(x) // 2
    turned = np.empty(len(x))
    for i in range(half):
        angle = t / 10000 ** (i / half)
        point = complex(x[i], x[i + half]) * np.exp(1j * angle)
        turned[i], turned[i + half] = point.real, point.imag
    return turned


def attention_by_hand(q, k, v):
    """One head: q, k and v hold T vectors each. Returns T vectors."""
    q = [rotate_by_hand(norm_by_hand(vector), t) for t, vector in enumerate(q)]
    k = [rotate_by_hand(norm_by_hand(vector), t) for t, vector in enumerate(k)]
    outputs = []
    for query in q:
        scores = [query @ key / math.sqrt(len(query)) for key in k]
        weights = softmax_by_hand(scores)
        outputs.append(sum(weights[t] * v[t] for t in range(len(v))))
    return outputs


def block_by_hand(weight, x):
    """x (T, D) -> (T, D); weight: the block's parameters by their names."""
    normed = [norm_by_hand(row) for row in x]
    query, key, value = np.split(weight["attention.query_key_value.weight"], 3)    # (D, D) each
    q = np.array([query @ row for row in normed])    # (T, D)
    k = np.array([key @ row for row in normed])
    v = np.array([value @ row for row in normed])
    y = np.zeros((len(x), D))
    for head in range(H):
        own = slice(head * D // H, (head + 1) * D // H)
        y[:, own] = attention_by_hand(q[:, own], k[:, own], v[:, own])
    x = x + [weight["attention.output.weight"] @ row for row in y]
    hidden = [squared_relu(weight["up.weight"] @ norm_by_hand(row)) for row in x]
    return x + [weight["down.weight"] @ row for row in hidden]


def encoder_by_hand(model, tokens):
    """The token vectors (T, D) of one sequence without padding, a list of T tokens."""
    weight = {name: p.detach().numpy() for name, p in model.named_parameters()}
    x = np.zeros((len(tokens), D))
    for t, token in enumerate(tokens):
        x[t] = weight["token_embedding.weight"][token]
        pair = tuple(tokens[t - 1:t + 1])
        if pair in PAIRS:                            # a pair belongs to its second token
            x[t, :d] += weight["pair_embedding.weight"][PAIRS.index(pair)]
    for block in model.blocks:
        weight = {name: p.detach().numpy() for name, p in block.named_parameters()}
        x = block_by_hand(weight, x)
    return x


TEXTS = torch.tensor([
    [2, 3, 3, 3, 5, 7],
    [4, 2, 11, 0, 0, 0],
    [9, 0, 0, 0, 0, 0],
    [7, 9, 2, MASK, 2, 0],
])
LENGTHS = torch.tensor([6, 3, 1, 5])


def test_forward_is_the_whole_transformer_by_hand():
    model = random_model(torch.float64)
    x = model(TEXTS, LENGTHS).detach()               # (B, T, D)
    for b, T in enumerate(LENGTHS.tolist()):
        expected = encoder_by_hand(model, TEXTS[b, :T].tolist())
        np.testing.assert_allclose(x[b, :T], expected, rtol=1e-10, atol=1e-12)
    without_lengths = model(TEXTS[:1])[0]            # means: there is no padding
    torch.testing.assert_close(without_lengths, x[0], rtol=1e-12, atol=1e-12)


def test_token_logits_are_the_tied_output_layer_by_hand():
    model = random_model(torch.float64)
    weight = {name: p.detach().numpy() for name, p in model.named_parameters()}
    h = torch.randn(5, D, dtype=torch.float64, generator=generator(0))
    logits = model.token_logits(h).detach()
    for m in range(5):                               # E g(h) + b
        dense = weight["token_dense.weight"] @ norm_by_hand(h[m].numpy())
        g = norm_by_hand(squared_relu(dense + weight["token_dense.bias"]))
        expected = weight["token_embedding.weight"] @ g + weight["token_bias"]
        np.testing.assert_allclose(logits[m], expected, rtol=1e-10, atol=1e-12)


def test_term_logits_are_the_document_layer_by_hand():
    model = random_model(torch.float64)
    x = torch.randn(4, 6, D, dtype=torch.float64, generator=generator(0))
    vector = model.document_vector(x, LENGTHS)
    logits = model.term_logits(vector.double()).detach()
    weight = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for b, T in enumerate(LENGTHS.tolist()):         # W z + c
        mean = sum(x[b, t, :d].numpy() for t in range(T)) / T
        np.testing.assert_allclose(vector[b], mean, rtol=1e-5, atol=1e-6)    # float32
        z = norm_by_hand(mean)
        expected = weight["term_head.weight"] @ z + weight["term_head.bias"]
        np.testing.assert_allclose(logits[b], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- padding and precision

def test_padding_changes_nothing_whatever_it_holds():
    model = random_model(torch.float64)
    tokens, lengths = documents(6, 1, 4, 2)
    x = model(tokens, lengths)
    rubbish = torch.where(tokens == PAD, 3, tokens)
    x_of_rubbish = model(rubbish, lengths)
    for b, T in enumerate(lengths):
        alone = model(tokens[b:b + 1, :T])[0]
        torch.testing.assert_close(x[b, :T], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_of_rubbish[b, :T], alone, rtol=1e-12, atol=1e-12)


def output_and_gradients(attention, x, visible, is_real):
    """Of the real tokens, in float32, for one square loss."""
    attention.zero_grad()
    y = attention(x, visible)[is_real]
    y.float().square().sum().backward()
    gradients = [p.grad.float() for p in attention.parameters()]
    return [y.detach().float(), *gradients]


@pytest.mark.parametrize("padded", [False, True])
def test_attention_by_hand_in_bfloat16_is_attention(padded, monkeypatch):
    torch.manual_seed(0)
    attention = transformer.Attention(16, 4)
    attention.output.weight.data.normal_(std=0.25)
    attention.bfloat16()                             # both have the same, rounded weights
    by_hand = speed_up_on_cpu(copy.deepcopy(attention))
    x = torch.randn(3, 9, 16).bfloat16()
    is_real, visible = torch.ones(3, 9, dtype=torch.bool), None
    if padded:
        is_real = torch.arange(9) < torch.tensor([[9], [4], [1]])
        visible = is_real[:, None, None]
    exact = output_and_gradients(attention.float(), x.float(), visible, is_real)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)     # it must do without
    rounded = output_and_gradients(by_hand, x, visible, is_real)
    for wanted, found in zip(exact, rounded, strict=True):     # a rounding to 8 bits is up to 0.4 %
        assert (wanted - found).abs().max() < 0.02 * wanted.abs().max()


def test_under_autocast_the_encoder_takes_attention_by_hand(monkeypatch):
    model = speed_up_on_cpu(random_model())
    tokens, lengths = documents(6, 3, 1)
    exact = model(tokens, lengths)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        x = model(tokens, lengths)
    assert x.dtype == torch.bfloat16
    for b, T in enumerate(lengths):
        error = (x[b, :T] - exact[b, :T]).abs().max()
        assert error < 0.05 * exact[b, :T].abs().max()


def test_bfloat16_knows_distant_positions_apart():
    x = torch.randn(1, 1, 600, D, generator=generator(0)).bfloat16()
    exact = transformer.rotate(x.float())
    torch.testing.assert_close(transformer.rotate(x).float(), exact, rtol=0.02, atol=0.03)


# ---------------------------------------------------------------- learning

def test_every_parameter_learns_from_the_two_losses():
    model = random_model()
    tokens, lengths = documents(6, 5, 6, 6, 4)
    tokens[0, :2] = torch.tensor([2, 3])             # two frequent pairs
    tokens[3, 4:] = torch.tensor([7, 9])
    inputs, targets = mask_tokens(tokens, lengths, V, generator=generator(0))
    is_masked = targets != IGNORE_INDEX
    x = model(inputs, lengths)
    masked = masked_language_model_loss(model.token_logits(x[is_masked]), targets[is_masked])
    bag = torch.rand(5, V + len(PAIRS), generator=generator(0))
    document = document_loss(model.term_logits(model.document_vector(x, lengths)), bag)
    (masked + document).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
    assert (model.pair_embedding.weight.grad[-1] == 0).all()         # "no pair" stays zero


def test_the_output_layer_is_tied_to_the_embedding():
    # The vectors come from elsewhere, so only the output layer can reach the embedding. It
    # reaches every row.
    model = random_model()
    model.token_logits(torch.randn(3, D)).square().sum().backward()
    gradient = model.token_embedding.weight.grad
    assert (gradient.abs().sum(1) > 0).all()


# ---------------------------------------------------------------- words and pairs

def test_term_weights_are_their_formula():
    counts = [0, 5e5, 40, 19, 20, 3e5, 100, 19, 20, 2000]            # 6 words, then 4 pairs
    expected = []
    for count in counts:
        frequency = count / sum(counts[:6])          # pairs are measured against words as well
        weight = 0
        if count >= 20:
            weight = min(1, math.sqrt(1e-4 / frequency))
        expected.append(weight)
    assert 0 < expected[1] < 0.02 and expected[2] == 1               # both sides of the minimum
    weights = transformer.weights_from_counts(tensor(counts, torch.float32), 6)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_both_output_layers_begin_with_the_frequencies():
    model = random_model()
    counts = [0, 0, 400, 100, 50, 30, 19, 0, 60, 21, 5, 7, 90, 10, 0, 25, 300]   # V + P
    model.init_from_counts(tensor(counts, torch.float32))
    weights = transformer.weights_from_counts(tensor(counts), V)
    np.testing.assert_allclose(model.term_weights, weights, rtol=1e-5)

    words = np.array(counts[:V]) + 1
    without_context = model.token_bias.detach().softmax(0)
    np.testing.assert_allclose(without_context, words / words.sum(), rtol=1e-5)

    terms = np.array(counts) * weights.numpy() + 0.5
    without_context = model.term_head.bias.detach().softmax(0)
    np.testing.assert_allclose(without_context, terms / terms.sum(), rtol=1e-5)


@pytest.mark.parametrize("pairs", [PAIRS, []])
def test_counts_of_words_and_pairs_are_a_loop(pairs):
    model = random_model(pairs=pairs)
    # A hidden token is PAD: neither 9 PAD 2 nor 2 PAD 3 is a pair. The last has no token.
    tokens = torch.tensor([
        [2, 3, 3, 3, 7, 9, PAD, 2],
        [2, PAD, 3, 11, PAD, PAD, PAD, PAD],
        [9, 2, 3, PAD, PAD, PAD, PAD, PAD],
        [PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
    ])
    expected = np.zeros((4, V + len(pairs)))
    for b, row in enumerate(tokens.tolist()):
        for t, token in enumerate(row):
            if token != PAD:
                expected[b, token] += 1
            pair = tuple(row[t - 1:t + 1])
            if pair in pairs:
                expected[b, V + pairs.index(pair)] += 1
    np.testing.assert_array_equal(model.count_terms(tokens), expected)


def test_a_bag_is_the_counts_times_the_term_weights():
    model = random_model()
    model.term_weights.copy_(torch.arange(V + len(PAIRS)) / 10)
    bag = model.bag_of_terms(torch.tensor([[3, 3, 3, PAD, 5]]))
    expected = np.zeros((1, V + len(PAIRS)))
    expected[0, 3] = 3 * 0.3
    expected[0, 5] = 0.5
    expected[0, V + PAIRS.index((3, 3))] = 2 * 1.3
    np.testing.assert_allclose(bag, expected, rtol=1e-6)


@pytest.mark.parametrize("pairs", [PAIRS, []])
def test_no_pair_crosses_a_row_or_a_masked_token(pairs):
    model = random_model(pairs=pairs)
    P = len(pairs)
    pair_3_3 = pairs.index((3, 3)) if pairs else P
    ids = model.pair_ids(torch.tensor([[3, 3, MASK, 3, 2], [3, 9, MASK, PAD, PAD]]))
    assert ids.tolist() == [[P, pair_3_3, P, P, P], [P] * 5]


@pytest.mark.parametrize("pairs", [PAIRS, []])
def test_with_zero_blocks_encode_is_the_mean_of_embeddings(pairs):
    model = random_model(pairs=pairs)
    fresh = transformer.TextEncoder(V, model.pairs, D, 2, H, WINDOW, d)
    model.blocks = fresh.blocks                      # as at the beginning: zero
    tokens, lengths = documents(6, 1, 2, 4, 5)
    tokens[0, :4] = torch.tensor([2, 3, 3, 3])
    without_blocks = model.mean_of_embeddings(model.count_terms(tokens))
    encoded = model.encode(tokens, lengths)
    torch.testing.assert_close(without_blocks, encoded, rtol=1e-5, atol=1e-6)


def test_the_document_vector_has_at_most_all_columns():
    no_pairs = torch.empty(0, dtype=torch.int64)
    model = transformer.TextEncoder(V, no_pairs, width=8, layers=1, heads=2, document_columns=64)
    assert model.encode(torch.full((2, 5), 7), torch.tensor([5, 3])).shape == (2, 8)


def test_a_width_that_the_heads_cannot_share_is_refused():
    no_pairs = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="width must be a multiple of 6, but is 32"):
        transformer.TextEncoder(V, no_pairs, width=32, heads=3)
