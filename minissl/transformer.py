"""A small transformer encoder that learns from text without labels.

It learns from two pretext tasks. Both take their answers from the text itself.

**Fill in masked words** (BERT). Hide some tokens of a sequence and predict them from the
others. With M the set of masked positions, x̃ the sequence with the masked tokens hidden, and
h = f(x̃) the output of the encoder,

    L_masked = −1/|M| Σ_{i ∈ M} log softmax(E · g(h_i) + b)[x_i]

where E is the token embedding (the output layer is tied to it), b a bias for each token,
and g a norm, a dense layer, a squared ReLU and another norm.

**Predict the rest of the document.** The model reads one part of a document and predicts
which terms occur in the other part. It has only the mean of its token vectors for that:

    z = mean_i h_i[:d]         L_document = −Σ_w q_w log softmax(W norm(z) + c)[w]

where q is the bag of terms of the other part, weighted and divided by its sum.

A *word* in this file is a token: a piece of a word, as the tokenizer cuts it, or all of it.
A *pair* is two neighbouring tokens, and only the frequent pairs count. A *term* is either.

Why two? The masked loss is that of BERT, and it teaches the model to fill in words. But after
minutes of training, the features that it gives alone are worse than a bag of words. Only
fine-tuning brings out what it has taught, from 100 labels a class on. The document loss asks
what the whole text is about, and gives the good features (measured: RESULTS.md, "Which of the
two text losses helps?").

    Devlin et al. 2018, "BERT", arXiv 1810.04805
        the masked loss; 80 % [MASK], 10 % random, 10 % unchanged
    Liu et al. 2019, "RoBERTa", arXiv 1907.11692
        masks drawn anew each time a sequence is seen
    Le and Mikolov 2014, "Distributed Representations of Sentences and Documents",
    arXiv 1405.4053
        paragraph vectors: predict the words of a document from one vector
    Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification",
    arXiv 1607.01759
        the mean of the embeddings of words and word pairs

Differences from BERT:
- The norm stands before each sublayer. A norm behind it needs a careful warm-up.
- The norms have no learned scale or shift, the blocks have no biases, and squared ReLU
  replaces GELU: fewer parameters, and fewer things to explain.
- Rotary positions replace learned ones, and queries and keys are normalized, because Muon
  would otherwise let them grow. (Their effect was not measured separately.)
- There is no [CLS] token and no next-sentence task. The mean over the tokens represents
  the document.
- There is no dropout. We did not measure whether it would help.
- Frequent pairs are also an input. The input at token t is its embedding plus that of the pair
  (t − 1, t), if this pair is frequent (Joulin et al.). [MASK] makes no pair.

Differences from paragraph vectors:
- The encoder computes the vector from the words. It is not a parameter of each document,
  so new text needs no optimization.
- The words to predict are not the words that were read, because predicting the words
  that were read would reward copying.

How training starts: the last matrix of attention and the last matrix of the dense layers
are zero in each block. At first, therefore, h is the embedding itself, and the document
vector is a mean of embeddings. This model can be trained alone, on many times as many
tokens a second. `train_mlm.py` does so in its first stage, and the transformer continues
exactly from there.

This file needs torch alone. Read next: train_mlm.py.

The letters of the shapes:

    B  sequences or documents      V  entries of the vocabulary
    T  tokens of a sequence        P  frequent pairs, which have an embedding
    D  width of a token vector     d  columns of the document vector
    H  attention heads             M  number of masked positions
    R  tokens of the rest of a document    V + P  all terms
"""

import torch
import torch.nn.functional as F
from torch import nn


# The special tokens, as in tokenizer.py. All other tokens are text.
PAD, MASK, FIRST_ORDINARY = 0, 1, 2

# What targets hold where nothing is to be predicted: the convention of PyTorch.
IGNORE_INDEX = -100

# A term that the training texts have less often has no weight in a bag. A rarer pair has no
# embedding either. (Other numbers were not measured.)
MIN_COUNT = 20

# As features, 64 columns are better than all 256 up to 500 labels a class: EXPERIMENTS.md, "How
# much weight does the document loss need?".
DOCUMENT_COLUMNS = 64

# The embedding of a pair has at most this many columns, also without the document loss. With
# 256, the 16,384 pairs would be 4 million parameters, twice those of the token embedding.
PAIR_COLUMNS = 64


# ---------------------------------------------------------------- masking

def mask_tokens(tokens, lengths, vocabulary_size, share=0.15, generator=None):
    """Choose tokens to predict, and hide most of them from the model.

    Of a sequence of n real tokens, exactly max(1, ⌊share · n + ½⌋) are chosen. Padding
    is never chosen. At least one token is, because the mean over no token is 0/0.
    Of the chosen tokens

        80 %  become [MASK],
        10 %  become a random ordinary token,
        10 %  stay as they are.

    So the encoder cannot tell which of the visible tokens it will be asked for, and it
    has to represent all of them. Call this function anew each time a sequence is seen.

    Arguments: tokens (B, T) int64, with PAD behind the end of each sequence; lengths (B,)
    int64, at least 1; generator, a torch.Generator on the device of the tokens.
    Returns inputs (B, T), a copy of the tokens with the chosen ones hidden, and targets
    (B, T), the original token at each chosen position and −100 everywhere else.

    The trap: a common mistake is to compute targets for 15 % of the tokens, but to feed the
    model the original sequence. The target has then leaked into the input, and the
    loss drops to 0 within a few hundred steps. (A correct loss is still above 4 after the
    1,500 steps of train_mlm.py.) The features lose three points at 10 and at 100 labels a
    class (EXPERIMENTS.md, "What stands where a token was masked?").
    """
    device = tokens.device
    B, T = tokens.shape
    # Choose: the `count` smallest of T random numbers. Padding gets a 2, larger than all.
    draw = torch.rand(B, T, generator=generator, device=device)
    draw = draw.masked_fill(~is_real(lengths, T), 2)
    rank = draw.argsort(1).argsort(1)                                     # (B, T)
    count = (share * lengths + 0.5).floor().clamp(min=1)                  # (B,)
    chosen = rank < count[:, None]                                        # (B, T)
    targets = tokens.masked_fill(~chosen, IGNORE_INDEX)                   # (B, T)

    # Hide.
    original = tokens[chosen]                                             # (M,)
    kind = torch.rand(len(original), generator=generator, device=device)
    random = torch.randint(
        FIRST_ORDINARY, vocabulary_size, kind.shape, generator=generator, device=device
    )
    hidden = torch.where(kind < 0.9, random, original)
    hidden = torch.where(kind < 0.8, MASK, hidden)                        # (M,)
    inputs = tokens.clone()
    inputs[chosen] = hidden
    return inputs, targets


def masked_language_model_loss(logits, targets, count=None):
    """Cross-entropy in nats, the mean over the masked positions.

    Arguments: logits (M, V) at the masked positions, of any float type (the logarithm is
    computed in float32 or float64); targets (M,) int64; count, the number to divide by if
    these M positions are only a part of the batch's masked positions.
    Returns a scalar. It is ln V for uniform logits.
    Source: Devlin et al. 2018, section 3.1.
    """
    logits = logits.to(accurate_dtype(logits))
    if count is None:
        count = len(targets)
    return F.cross_entropy(logits, targets, reduction="sum") / count


# ---------------------------------------------------------------- the rest of the document

def document_loss(logits, bag, count=None):
    """Cross-entropy in nats between the terms of the other part and their prediction.

    It is the mean over the documents that have something in that part.

    Arguments: logits (B, V + P); bag (B, V + P), weighted counts, at least 0; count, the
    number to divide by if these documents are only a part of the batch.
    Returns a scalar. Source: Le and Mikolov 2014, section 2.3, with a full softmax.
    """
    logits = logits.to(accurate_dtype(logits))
    if count is None:
        count = count_nonempty(bag)
    total = bag.sum(1, keepdim=True)                                      # (B, 1)
    tiny = torch.finfo(bag.dtype).tiny
    q = bag / total.clamp(min=tiny)                                       # (B, V + P)
    loss = F.cross_entropy(logits, q, reduction="sum")    # a document without words adds 0
    # The count may be 0, and the loss is then 0. It may also lie between 0 and 1: averaged over
    # four processes, one document counts 1/4. So its lower bound is not 1.
    return loss / torch.as_tensor(count).clamp(min=1e-6)


def count_nonempty(bag):
    """How many of the bags (B, V + P) have anything in them."""
    return (bag.sum(1) > 0).sum()


def weights_from_counts(counts, vocabulary_size):
    """How much each term counts in a bag: min(1, √(10⁻⁴ / frequency)).

    Frequent words say little about a document: "the" alone is a twentieth of a text.
    Terms that were seen fewer than MIN_COUNT times weigh nothing.
    The formula is that of Mikolov et al. 2013, arXiv 1310.4546, section 2.3. There
    √(t / frequency) is the probability that a word is kept, with t about 10⁻⁵. Here it is
    a weight, and t is 10⁻⁴. (Another t was not measured.)

    Arguments: counts (V + P,) float, in the training texts. Returns (V + P,).
    """
    frequency = counts / counts[:vocabulary_size].sum()
    weights = (1e-4 / frequency.clamp(min=1e-12)).sqrt().clamp(max=1)
    return weights * (counts >= MIN_COUNT)


# ---------------------------------------------------------------- the encoder

def norm(x):
    """Layer norm over the last axis, without learned scale and shift."""
    return F.layer_norm(x, x.shape[-1:])


def rotate(x):
    """Rotary positions: turn each pair of columns by an angle that grows with the position.

    Column i and column i + half of token t turn by t / 10000^(i / half) radians. The
    product of a query at position s and a key at position t then depends on t − s, with
    its sign, but not on s itself. Su et al. 2021, "RoFormer", arXiv 2104.09864. There
    columns 2i and 2i + 1 are a pair: the same up to the order of the columns.

    x (B, H, T, D/H) -> the same shape and dtype.
    """
    half = x.shape[-1] // 2
    # bfloat16 cannot tell position 257 from 256.
    exact = accurate_dtype(x)
    column = torch.arange(half, device=x.device, dtype=exact)
    radians = 10000.0 ** -(column / half)                                 # (D/2H,)
    position = torch.arange(x.shape[-2], device=x.device)
    angle = position[:, None] * radians                                   # (T, D/2H)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Every token looks at all tokens that it may see, in H heads.

    Vaswani et al. 2017, equation 1.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, x, visible):
        """x (B, T, D) -> (B, T, D).

        visible[..., i, j] is True if token i may look at token j. Of shape (B, 1, 1, T) it
        hides the padding, of shape (T, T) the future. None hides nothing.
        """
        B, T, D = x.shape
        qkv = self.query_key_value(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # (B, H, T, D/H)
        q, k = rotate(norm(q)), rotate(norm(k))
        y = self.attend(q, k, v, visible)                                 # (B, H, T, D/H)
        return self.output(y.transpose(1, 2).reshape(B, T, D))

    def attend(self, q, k, v, visible):
        """softmax(q kᵀ / √(D/H)) v"""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


class Block(nn.Module):
    """Attention, then a pair of dense layers, each part added to its input."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, visible):
        x = x + self.attention(norm(x), visible)
        hidden = F.relu(self.up(norm(x))).square()                        # (B, T, 4D)
        return x + self.down(hidden)


class TextEncoder(nn.Module):
    """Tokens (B, T) -> token vectors (B, T, D), with the output layers of both tasks.

    Arguments:
        vocabulary_size: V
        pairs: (P,) int64, sorted; the frequent word pairs, each as left · V + right.
            Each has a separate embedding, in the first d columns (at most PAIR_COLUMNS).
        width: D
        layers, heads: how many blocks, and how many attention heads in each
        window: the length of the longest sequence
        document_columns: d, how many of the D columns make the document vector, at most all.
            Without the document loss, take all D.
        embedding_std: of the token embeddings at first
        causal: whether a token sees only itself and the tokens before it, as in GPT. The
            pair that ends at a token does not look ahead either.
    Raises ValueError if the width is no multiple of 2 · heads: rotary positions turn pairs of
    columns in each head.
    """

    def __init__(
        self, vocabulary_size, pairs, width=256, layers=2, heads=4, window=128,
        document_columns=DOCUMENT_COLUMNS, embedding_std=0.1, causal=False,
    ):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of {2 * heads}, but is {width}")
        V, P, d = vocabulary_size, len(pairs), min(document_columns, width)
        self.window, self.document_columns, self.causal = window, d, causal
        self.register_buffer("pairs", pairs)                              # (P,)
        self.token_embedding = nn.Embedding(V, width)
        self.pair_embedding = nn.Embedding(P + 1, min(d, PAIR_COLUMNS), padding_idx=P)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        # The output layer of the masked words. Its matrix is the token embedding.
        self.token_dense = nn.Linear(width, width)
        self.token_bias = nn.Parameter(torch.zeros(V))
        # The output layer of the document's terms, and their weights in a bag.
        self.term_head = nn.Linear(d, V + P)
        self.register_buffer("term_weights", torch.ones(V + P))

        # Without a first stage, the masked loss stays at 6.7 for 400 steps with a std of 0.02. With
        # 0.1 it is 6.54 after 300 (EXPERIMENTS.md, "What does the masked loss need at first?").
        # Each was seen once.
        nn.init.normal_(self.token_embedding.weight, std=embedding_std)
        if d < width:
            # The document's columns are read as a mean over the tokens. A rare word hardly moves
            # from its random start, so there the start is small.
            self.token_embedding.weight.data[:, :d] *= 0.2
        nn.init.zeros_(self.pair_embedding.weight)
        nn.init.normal_(self.term_head.weight, std=0.02)
        nn.init.zeros_(self.term_head.bias)

    @torch.no_grad()
    def init_from_counts(self, counts):
        """Let both output layers begin with the frequencies of words and pairs.

        So training need not learn what is known without any context. Also sets
        `term_weights`. Arguments: counts (V + P,) float, in the training texts.
        """
        V = len(self.token_bias)
        self.term_weights.copy_(weights_from_counts(counts, V))
        words = counts[:V] + 1
        self.token_bias.copy_((words / words.sum()).log())
        terms = counts * self.term_weights + 0.5
        self.term_head.bias.copy_((terms / terms.sum()).log())

    def forward(self, tokens, lengths=None):
        """Token vectors (B, T, D).

        tokens (B, T) int64 with T ≤ window; lengths (B,) int64 if sequences end in PAD.
        """
        T = tokens.shape[1]
        visible = None
        if self.causal:     # this hides the padding as well, because it lies behind the end
            position = torch.arange(T, device=tokens.device)
            visible = position <= position[:, None]                       # (T, T)
        elif lengths is not None and not bool((lengths == T).all()):
            visible = is_real(lengths, T)[:, None, None]                  # (B, 1, 1, T)
        x = self.token_embedding(tokens)                                  # (B, T, D)
        pair = self.pair_embedding(self.pair_ids(tokens))                 # (B, T, ≤ d)
        x = x + F.pad(pair, (0, x.shape[-1] - pair.shape[-1]))
        x = x.to(autocast_dtype(x))
        for block in self.blocks:
            x = block(x, visible)
        return x

    def token_logits(self, x):
        """Logits (M, V) of the masked tokens, from their vectors (M, D).

        Call it at the masked positions only. At all positions it would take nearly seven
        times as long, and with two blocks that would be more than half of the forward pass.
        """
        x = F.relu(self.token_dense(norm(x))).square()                    # (M, D)
        return F.linear(norm(x), self.token_embedding.weight, self.token_bias)

    def term_logits(self, vector):
        """Logits (B, V + P) of the document's words and pairs, from its vector (B, d)."""
        return self.term_head(norm(vector))

    def document_vector(self, x, lengths):
        """The mean of token vectors (B, T, D) over the real tokens: (B, d) float32.

        There is no norm before the mean, because the length of an embedding is the weight
        that learning gave to its word.
        """
        x = x[..., :self.document_columns].float()
        padding = ~is_real(lengths, x.shape[1])                           # (B, T)
        x = x.masked_fill(padding[..., None], 0)
        return x.sum(1) / lengths[:, None].clamp(min=1)

    def encode(self, tokens, lengths):
        """Features (B, d) float32 of sequences (B, T), T ≤ window, with lengths (B,)."""
        return self.document_vector(self(tokens, lengths), lengths)

    # ------------------------------------------------------------ words and pairs

    def pair_ids(self, tokens):
        """Which pair ends at each token: tokens (..., T) -> (..., T), P where none does.

        A hidden neighbour makes no pair, so pairs never give a masked token away.
        """
        P = len(self.pairs)
        V = self.token_embedding.num_embeddings
        left, right = tokens[..., :-1], tokens[..., 1:]
        keys = left * V + right
        if P == 0:
            ids = torch.full_like(keys, P)
        else:
            nearest = torch.searchsorted(self.pairs, keys).clamp(max=P - 1)
            ids = torch.where(self.pairs[nearest] == keys, nearest, P)
        return F.pad(ids, (1, 0), value=P)

    def count_terms(self, tokens):
        """How often each word and each pair occurs in each document.

        tokens (B, R) int64, with PAD wherever there is no token, or a hidden one.
        Returns (B, V + P) float32.
        """
        B, R = tokens.shape
        V, P = self.token_embedding.num_embeddings, len(self.pairs)
        counts = torch.zeros(B, V + P + 1, device=tokens.device)
        one = torch.ones(B, R, device=tokens.device)
        counts.scatter_add_(1, tokens, one)
        counts.scatter_add_(1, V + self.pair_ids(tokens), one)
        counts[:, PAD] = 0
        return counts[:, :-1]                     # the last column counted "no pair"

    def bag_of_terms(self, tokens):
        """The weighted counts of words and pairs, (B, V + P), for `document_loss`."""
        return self.count_terms(tokens) * self.term_weights

    def term_table(self):
        """The embeddings of all words and pairs in the document's columns, (V + P, d)."""
        d = self.document_columns
        words = self.token_embedding.weight[:, :d]
        pairs = self.pair_embedding.weight[:-1]
        pairs = F.pad(pairs, (0, d - pairs.shape[1]))
        return torch.cat([words, pairs])

    def mean_of_embeddings(self, counts):
        """The document vector without the blocks, from counts (B, V + P): (B, d).

        While the blocks add nothing, it equals `document_vector`. It is one matrix product.
        """
        V = self.token_embedding.num_embeddings
        words = counts[:, :V].sum(1, keepdim=True)                        # (B, 1)
        return counts @ self.term_table() / words.clamp(min=1)


def accurate_dtype(x):
    """float32, or float64 if x has it: for what the half-precision types would round too much."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(x):
    """The dtype of matrix products with x: that of an autocast context, else that of x.

    A residual stream in bfloat16 halves the memory traffic. Before torch 2.5 there is no
    autocast on MPS.
    """
    device = x.device.type
    if not torch.amp.autocast_mode.is_autocast_available(device):
        return x.dtype
    if not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def is_real(lengths, T):
    """True for real tokens, False for padding: (B, T) bool, from lengths (B,)."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]
