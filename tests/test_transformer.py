"""The transformer against loops over plain numbers: losses, masking, the whole forward pass, documents of any length.

Letters as in transformer.py: B sequences, T tokens, D width, H heads, V vocabulary, N word pairs, d document columns.
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl import datasets, evaluation, transformer
from minissl.transformer import FIRST_ORDINARY, MASK, PAD, document_loss, mask_tokens, masked_language_model_loss

V, D, H, WINDOW, d = 12, 8, 2, 6, 4
PAIRS = [(2, 3), (3, 3), (4, 2), (7, 9), (9, 2)]       # left, right; some neighbours below are a pair and most are not


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def random_model(dtype=torch.float32, pairs=PAIRS):
    """Two layers with every parameter random: the matrices that start at zero would hide whatever they multiply."""
    torch.manual_seed(0)
    pairs = tensor([left * V + right for left, right in pairs], torch.int64)
    model = transformer.TextEncoder(V, pairs, D, 2, H, WINDOW, d).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
        model.pair_embedding.weight[-1] = 0            # "no pair" is no parameter: it stays zero
    return model


def documents(*lengths):
    """Random ordinary tokens (B, T) with PAD behind each end, and the lengths (B,)."""
    lengths = tensor(lengths, torch.int64)
    tokens = torch.randint(FIRST_ORDINARY, V, (len(lengths), int(lengths.max())), generator=generator(1))
    return tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], PAD), lengths


def generator(seed):
    return torch.Generator().manual_seed(seed)


def softmax_by_hand(row):
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


# ---------------------------------------------------------------- the two losses

def test_masked_loss_is_its_formula_by_value_and_by_gradient():
    torch.manual_seed(0)
    logits, targets = (2 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_(), [0, 6, 3, 3, 1]
    loss = masked_language_model_loss(logits, torch.tensor(targets))
    loss.backward()
    value, gradient = 0, np.zeros((5, 7))
    for i in range(5):
        p = softmax_by_hand(logits[i].tolist())
        value -= math.log(p[targets[i]]) / 5                             # −1/|M| Σ log softmax(y_i)[x_i]
        for w in range(7):
            gradient[i, w] = (p[w] - (w == targets[i])) / 5
    assert loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-12, atol=1e-15)


def test_both_losses_of_examples_worked_by_hand():
    logits = tensor([[1, 2, 5], [1, 2, 5]]).log()                        # probabilities 1/8, 2/8, 5/8
    loss = masked_language_model_loss(logits, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(8 / 5)) / 2)
    loss = document_loss(logits[:1], tensor([[0, 0.5, 1.5]]))            # q = 0, 1/4, 3/4
    assert loss.item() == pytest.approx(math.log(4) / 4 + math.log(8 / 5) * 3 / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_masked_loss_of_uniform_logits_is_ln_V_and_large_ones_do_not_overflow_in_any_precision(dtype):
    # 9.0109 is no bfloat16 number: its neighbours there are 9 and 9.0625, so this shows where the log-sum-exp is taken.
    loss = masked_language_model_loss(torch.full((3, 8192), 0.5, dtype=dtype), torch.tensor([0, 5, 8191]))
    assert loss.item() == pytest.approx(math.log(8192), abs=1e-5)
    large = tensor([[2**14, 0, -2**14], [2**14, 0, 0]], dtype)           # e^16384 is no number: it must not be formed
    assert masked_language_model_loss(large, torch.tensor([0, 1])) == (0 + 2**14) / 2


def test_with_count_the_parts_of_a_step_add_up_to_the_whole():
    # Parts of unequal size: the mean of their means would be another number (transformers issue 24725).
    torch.manual_seed(0)
    bag = torch.rand(6, 5, dtype=torch.float64)
    bag[1] = 0                                                           # 5 documents have a bag
    targets = torch.tensor([0, 4, 2, 2, 1, 3])
    for loss, labels, count in [(masked_language_model_loss, targets, 6), (document_loss, bag, 5)]:
        logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        whole = loss(logits, labels)
        parts = [loss(logits[part], labels[part], count) for part in (slice(0, 1), slice(1, 2), slice(2, 6))]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(part, logits)[0] for part in parts]
        torch.testing.assert_close(sum(gradients), torch.autograd.grad(whole, logits)[0], rtol=1e-12, atol=1e-15)


def test_document_loss_is_its_formula_by_value_and_by_gradient_and_an_empty_bag_adds_nothing():
    torch.manual_seed(0)
    logits, bag = (2 * torch.randn(4, 6, dtype=torch.float64)).requires_grad_(), torch.rand(4, 6, dtype=torch.float64)
    bag[1], bag[2, :4] = 0, 0
    loss = document_loss(logits, bag)
    loss.backward()
    value, gradient = 0, np.zeros((4, 6))
    for b in (0, 2, 3):                                                  # 3 documents: the second's bag is empty
        p = softmax_by_hand(logits[b].tolist())
        for w in range(6):
            q = bag[b, w].item() / sum(bag[b].tolist())
            value -= q * math.log(p[w]) / 3                              # −1/B Σ_b Σ_w q_w log softmax(y_b)[w]
            gradient[b, w] = (p[w] - q) / 3
    assert loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-12, atol=1e-15)
    logits.grad = None
    nothing = document_loss(logits, torch.zeros_like(bag))               # all bags empty: 0, not 0/0
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()


def test_term_weights_are_their_formula():
    counts = [0, 5e5, 40, 19, 20, 3e5, 100, 19, 20, 2000]               # 6 words, then 4 pairs
    expected = []
    for count in counts:
        frequency = count / sum(counts[:6])                              # pairs, too, are measured against the words
        expected.append(min(1, math.sqrt(1e-4 / frequency)) if count >= 20 else 0)
    assert 0 < expected[1] < 0.02 and expected[2] == 1                   # both sides of the minimum are in the example
    np.testing.assert_allclose(transformer.term_weights(tensor(counts, torch.float32), 6), expected, rtol=1e-6)


def test_both_output_layers_start_at_what_needs_no_context():
    # V words, N pairs
    model, counts = random_model(), [0, 0, 400, 100, 50, 30, 19, 0, 60, 21, 5, 7, 90, 10, 0, 25, 300]
    weights = model.start_at(tensor(counts, torch.float32))
    words = [count + 1 for count in counts[:V]]
    np.testing.assert_allclose(model.token_bias.detach().softmax(0), np.array(words) / sum(words), rtol=1e-5)
    expected = [count * float(weight) + 0.5
                for count, weight in zip(counts, transformer.term_weights(tensor(counts), V))]
    np.testing.assert_allclose(model.term_head.bias.detach().softmax(0), np.array(expected) / sum(expected), rtol=1e-5)
    np.testing.assert_allclose(weights, transformer.term_weights(tensor(counts), V), rtol=1e-5)


# ---------------------------------------------------------------- masking

def test_exactly_the_share_of_each_sequence_is_masked_and_never_padding_or_nothing():
    lengths = torch.arange(1, 301)
    tokens = torch.full((300, 300), 5).masked_fill(torch.arange(300) >= lengths[:, None], PAD)
    _, positions, _ = mask_tokens(tokens, lengths, V, generator=generator(0))
    assert positions.tolist() == sorted(set(positions.tolist()))         # in order, each once
    rows, columns = positions // 300, positions % 300
    assert (columns < lengths[rows]).all()
    for row, T in enumerate(lengths.tolist()):
        assert (rows == row).sum() == max(1, (15 * T + 50) // 100)        # ⌊0.15 T + ½⌋ in whole numbers


def test_of_the_masked_80_percent_are_hidden_10_become_any_ordinary_token_and_10_stay():
    # Only 4 ordinary tokens, so that a random one from a range that is off by one would show in the shares.
    tokens = torch.randint(FIRST_ORDINARY, 6, (2000, 64), generator=generator(0))
    inputs, positions, targets = mask_tokens(tokens, torch.full((2000,), 64), 6, generator=generator(1))
    shown, n, same = inputs.flatten()[positions], 20000, 0.1 / 4         # a random token is the old one once in 4
    kept, random = shown == targets, (shown != MASK) & (shown != targets)
    assert len(targets) == n and set(shown[random].tolist()) == {2, 3, 4, 5}
    for share, seen in [(0.8, shown == MASK), (0.1 + same, kept), (0.1 - same, random)]:
        assert abs(seen.float().mean() - share) < 4 * math.sqrt(share * (1 - share) / n)
    each = torch.bincount(positions % 64, minlength=64) / 2000    # every place is chosen as often: 10 times in 64
    assert (each - 10 / 64).abs().max() < 5 * math.sqrt(10 / 64 * 54 / 64 / 2000)    # 5 sigma, for 64 places


def test_targets_are_the_originals_all_else_stays_and_each_generator_draws_its_own_mask():
    tokens, lengths = documents(1, 2, 30, 7, 30)
    before = tokens.clone()
    inputs, positions, targets = mask_tokens(tokens, lengths, V, share=0.4, generator=generator(3))
    assert torch.equal(tokens, before) and inputs.shape == tokens.shape  # the caller's tensor, too, stays as it is
    old, new, chosen = before.flatten().tolist(), inputs.flatten().tolist(), positions.tolist()
    assert targets.tolist() == [old[place] for place in chosen]
    assert all(old[place] == new[place] for place in range(len(old)) if place not in chosen)
    again, other = [mask_tokens(tokens, lengths, V, share=0.4, generator=generator(seed)) for seed in (3, 4)]
    assert torch.equal(again[0], inputs) and torch.equal(again[1], positions) and not torch.equal(other[1], positions)


def test_copying_the_input_solves_the_textbook_trap_and_not_our_task():
    # The trap: labels for 15 % of the tokens, but the unmasked sequence as input. A copier then gets everything right.
    size = 100
    tokens = torch.randint(FIRST_ORDINARY, size, (500, 64), generator=generator(0))
    inputs, positions, targets = mask_tokens(tokens, torch.full((500,), 64), size, generator=generator(1))

    def copying(sequence, scale=15.0):
        """Says what it sees with all its weight; where it sees [MASK] it knows enough to call all words alike."""
        shown = sequence.flatten()[positions]
        return scale * F.one_hot(shown, size).double() * (shown != MASK)[:, None]

    assert masked_language_model_loss(copying(tokens), targets) < 1e-4
    assert (copying(tokens).argmax(1) == targets).all()
    wrong = (copying(inputs).argmax(1) != targets).double().mean()
    assert 0.88 < wrong < 0.92                                           # 80 % hidden, 10 % replaced: 90 % ± 4 sigma
    # With the best scale s, e^s = V − 1, the loss is 0.8 ln V + 0.2 ln(2V − 2) − 0.1 ln(V − 1) = 4.28; ln V is 4.61.
    best = min(masked_language_model_loss(copying(inputs, scale), targets).item() for scale in np.arange(0, 15, 0.25))
    assert 4.15 < best < 4.40


# ---------------------------------------------------------------- the encoder

def norm_by_hand(x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in x])


def rotated_by_hand(x, t):
    """Columns i and i + E/2 as a point in the plane, turned by t / 10000^(i / (E/2)) radians."""
    half, turned = len(x) // 2, np.empty(len(x))
    for i in range(half):
        point = complex(x[i], x[i + half]) * np.exp(1j * t / 10000 ** (i / half))
        turned[i], turned[i + half] = point.real, point.imag
    return turned


def encoder_by_hand(model, tokens):
    """One sequence without padding, a list of T tokens -> its token vectors (T, D)."""
    weight = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    T, size = len(tokens), D // H
    x = np.zeros((T, D))
    for t in range(T):
        x[t] = weight["token_embedding.weight"][tokens[t]]
        if t > 0 and (tokens[t - 1], tokens[t]) in PAIRS:                # a pair belongs to its second token
            x[t, :d] += weight["pair_embedding.weight"][PAIRS.index((tokens[t - 1], tokens[t]))]
    for layer in range(2):
        mine = {name.split(".", 2)[2]: value for name, value in weight.items() if name.startswith(f"blocks.{layer}.")}
        query, key, value = np.split(mine["attention.query_key_value.weight"], 3)                # 3 × (D, D)
        normed = [norm_by_hand(x[t]) for t in range(T)]
        q, k, v = ([matrix @ n for n in normed] for matrix in (query, key, value))
        for t in range(T):
            y = np.zeros(D)
            for head in range(H):
                own = slice(head * size, (head + 1) * size)
                query, keys = rotated_by_hand(norm_by_hand(q[t][own]), t), [
                    rotated_by_hand(norm_by_hand(k[s][own]), s) for s in range(T)]
                attention = softmax_by_hand([query @ key / math.sqrt(size) for key in keys])
                y[own] = sum(attention[s] * v[s][own] for s in range(T))
            x[t] = x[t] + mine["attention.output.weight"] @ y
        for t in range(T):
            hidden = [max(0, value) ** 2 for value in mine["up.weight"] @ norm_by_hand(x[t])]    # squared ReLU
            x[t] = x[t] + mine["down.weight"] @ hidden
    return x


def test_the_forward_pass_and_both_output_layers_are_the_whole_transformer_by_hand():
    model = random_model(torch.float64)
    tokens = torch.tensor([[2, 3, 3, 3, 5, 7], [4, 2, 11, 0, 0, 0], [9, 0, 0, 0, 0, 0], [7, 9, 2, MASK, 2, 0]])
    lengths = torch.tensor([6, 3, 1, 5])
    x = model(tokens, lengths)                                           # (B, T, D)
    logits, terms = model.token_logits(x), model.term_head(transformer.norm(model.mean(x, lengths)).double())
    w = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for b, T in enumerate(lengths.tolist()):
        expected = encoder_by_hand(model, tokens[b, :T].tolist())
        np.testing.assert_allclose(x[b, :T].detach(), expected, rtol=1e-10, atol=1e-12)
        z = norm_by_hand(sum(expected)[:d] / T)                          # W z + c, float32 from the mean on
        np.testing.assert_allclose(terms[b].detach(), w["term_head.weight"] @ z + w["term_head.bias"],
                                   rtol=1e-4, atol=1e-5)
        for t in range(T):                                               # E g(h) + b, E the token embedding again
            g = [max(0, value) ** 2
                 for value in w["token_dense.weight"] @ norm_by_hand(expected[t]) + w["token_dense.bias"]]
            y = w["token_embedding.weight"] @ norm_by_hand(g) + w["token_bias"]
            np.testing.assert_allclose(logits[b, t].detach(), y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(tokens[:1])[0], x[0], rtol=1e-12, atol=1e-12)       # no lengths: no padding


@pytest.mark.parametrize("padded", [False, True])
def test_bfloat16_attention_by_hand_agrees_with_the_other_branch_by_value_and_by_gradient(padded, monkeypatch):
    torch.manual_seed(0)
    attention = transformer.Attention(16, 4)
    attention.output.weight.data.normal_(std=0.25)
    attention.bfloat16()
    x = torch.randn(3, 9, 16).bfloat16()
    real = torch.arange(9) < torch.tensor([[9], [4], [1]]) if padded else torch.ones(3, 9, dtype=torch.bool)
    visible = real[:, None, None] if padded else None
    results = []
    for dtype in (torch.float32, torch.bfloat16):                        # the same weights, the same numbers
        attention.to(dtype).zero_grad()
        with monkeypatch.context() as patch:
            if dtype == torch.bfloat16:                                  # the test must enter the branch it names
                patch.setattr(F, "scaled_dot_product_attention", None)
            y = attention(x.to(dtype), visible)[real]
        y.float().square().sum().backward()
        results.append([y.detach().float()] + [parameter.grad.float() for parameter in attention.parameters()])
    for exact, rounded in zip(*results):                                 # 8 bits: a rounding is up to 2^-8 = 0.4 %
        assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()


def test_bfloat16_knows_distant_positions_apart():
    x = torch.randn(1, 1, 600, D, generator=generator(0)).bfloat16()
    torch.testing.assert_close(transformer.rotate(x).float(), transformer.rotate(x.float()), rtol=0.02, atol=0.03)


def test_under_autocast_on_a_cpu_the_whole_encoder_takes_the_branch_for_bfloat16(monkeypatch):
    model, (tokens, lengths) = random_model(), documents(6, 3, 1)
    exact = model(tokens, lengths)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        x = model(tokens, lengths)
    assert x.dtype == torch.bfloat16
    for b, T in enumerate(lengths):
        assert (x[b, :T] - exact[b, :T]).abs().max() < 0.05 * exact[b, :T].abs().max()


def test_padding_changes_nothing_neither_its_length_nor_what_stands_in_it():
    model, (tokens, lengths) = random_model(torch.float64), documents(6, 1, 4, 2)
    x = model(tokens, lengths)
    rubbish = model(torch.where(tokens == PAD, 3, tokens), lengths)
    for b, T in enumerate(lengths):
        alone = model(tokens[b:b + 1, :T])[0]
        for other in (x, rubbish):
            torch.testing.assert_close(other[b, :T], alone, rtol=1e-12, atol=1e-12)


def test_every_parameter_learns_from_the_two_losses_and_the_output_layer_is_tied_to_the_embedding():
    model, (tokens, lengths) = random_model(), documents(6, 5, 6, 6, 4)
    model.token_logits(torch.randn(3, D)).square().sum().backward()    # vectors from elsewhere: the output layer alone
    assert (model.token_embedding.weight.grad.abs().sum(1) > 0).all()  # reaches the embedding, and every row of it
    model.zero_grad()
    tokens[0, :2], tokens[3, 4:] = torch.tensor([2, 3]), torch.tensor([7, 9])             # two frequent pairs
    inputs, positions, targets = mask_tokens(tokens, lengths, V, generator=generator(0))
    x = model(inputs, lengths)
    bag = torch.rand(5, V + len(PAIRS), generator=generator(0))
    masked = masked_language_model_loss(model.token_logits(x.flatten(0, 1)[positions]), targets)
    document = document_loss(model.term_head(transformer.norm(model.mean(x, lengths))), bag)
    (masked + document).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
    assert (model.pair_embedding.weight.grad[-1] == 0).all()             # and "no pair" stays zero


# ---------------------------------------------------------------- documents of any length

def test_features_of_texts_are_the_mean_over_all_tokens_at_any_length_and_change_nothing():
    model, sizes = random_model().train(), np.array([17, 6, 7, 1, 12, 29])
    tokens, before = [documents(size)[0] for size in sizes], {k: v.clone() for k, v in model.state_dict().items()}
    texts = datasets.Texts(np.concatenate([row[0] for row in tokens]), np.cumsum(sizes) - sizes, sizes,
                           np.full(6, -1), np.zeros(6), [], None)
    order = np.array([3, 0, 5, 1, 2, 4])                                 # the texts need not follow each other
    together = evaluation.text_features(model, texts.select(order), nullcontext())                     # (N, d)
    for row, n in enumerate(order):
        T = sizes[n]
        parts, total = math.ceil(T / WINDOW), np.zeros(d)
        for part in range(parts):
            first, end = T * part // parts, T * (part + 1) // parts
            for x in model(tokens[n][:, first:end])[0]:
                total += x[:d].detach().numpy()
        np.testing.assert_allclose(together[row], total / T, rtol=1e-4, atol=1e-5)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pairs", [PAIRS, []])
def test_counts_of_words_and_pairs_are_a_loop_over_neighbours(pairs):
    model = random_model(pairs=pairs)
    # Three documents with PAD between them, and in the first a token hidden: neither 9 PAD 2 nor 2 PAD 3 is a pair.
    tokens = [2, 3, 3, 3, 7, 9, PAD, 2, PAD, 3, 11, PAD, 9, 2, 3]
    owner = [0] * 8 + [1] * 3 + [2] * 4
    expected = np.zeros((4, V + len(pairs)))                             # the last document has no token at all
    for i, token in enumerate(tokens):
        if token != PAD:
            expected[owner[i], token] += 1
            if i > 0 and (tokens[i - 1], token) in pairs:                # PAD is in no pair: nothing crosses it
                expected[owner[i], V + pairs.index((tokens[i - 1], token))] += 1
    np.testing.assert_array_equal(model.count_terms(torch.tensor(tokens), torch.tensor(owner), 4), expected)
    np.testing.assert_array_equal(model.count_terms(torch.tensor(tokens), 0, 1)[0], expected.sum(0))      # one owner
    N = len(pairs)                                                       # rows are apart, and [MASK] is in no pair
    found = model.pair_ids(torch.tensor([[3, 3, MASK, 3, 2], [3, 9, MASK, PAD, PAD]]))
    assert found.tolist() == [[N, pairs.index((3, 3)) if pairs else N, N, N, N], [N] * 5]


@pytest.mark.parametrize("pairs", [PAIRS, []])
def test_with_zero_blocks_encode_is_the_mean_of_embeddings(pairs):
    model, (tokens, lengths) = random_model(pairs=pairs), documents(6, 1, 2, 4, 5)
    tokens[0, :4] = torch.tensor([2, 3, 3, 3])
    model.blocks = transformer.TextEncoder(V, model.pairs, D, 2, H, WINDOW, d).blocks     # as at initialisation: zero
    flat, owner = F.pad(tokens, (0, 1)).flatten(), torch.arange(5).repeat_interleave(WINDOW + 1)         # PAD between
    torch.testing.assert_close(model.mean_of_embeddings(model.count_terms(flat, owner, 5)),
                               model.encode(tokens, lengths), rtol=1e-5, atol=1e-6)
