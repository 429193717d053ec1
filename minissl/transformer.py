"""A tiny transformer encoder that learns from text without labels, by two tasks that the text sets itself.

**Fill in masked words.** Hide some tokens of a sequence and predict them from what is left (BERT). With M the
masked positions, x̃ the sequence after masking and h = f(x̃) the encoder's output,

    L_masked = −1/|M| Σ_{i ∈ M} log softmax(E · g(h_i) + b)[x_i]      E: the token embedding, tied
                                                                      g: norm, dense layer, squared ReLU, norm

**Guess the rest of the document.** Predict which words occur in a part of the document that the model has not
seen, from nothing but the mean of its token vectors over the part that it has seen,

    z = norm(1/T Σ_i h_i[:d])        L_document = −Σ_w q_w log softmax(W z + c)[w]

where q is the weighted bag of words and frequent word pairs of the unseen part. Masked words teach syntax before
meaning: at minutes on a laptop their loss alone gives features that a bag of words beats. The second term is about
what the whole text says, and that is what makes minutes pay (measured: EXPERIMENTS.md, "Which term pays").

    Devlin et al. 2018, "BERT", arXiv 1810.04805           the masked loss, 80/10/10
    Liu et al. 2019, "RoBERTa", arXiv 1907.11692           masks drawn anew each time a sequence is seen
    Le and Mikolov 2014, "Distributed Representations of Sentences and Documents", arXiv 1405.4053
                                                           paragraph vectors: predict a document's words from a vector
    Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification", arXiv 1607.01759
                                                           the mean of word and word-pair embeddings

Differences from the papers:
- BERT: the norm stands before each sub-layer (post-norm needs a careful warm-up) and has no learned scale or
  shift; squared ReLU for GELU, no biases in the blocks: fewer numbers. Rotary positions for learned ones: after 400
  steps of the second stage the masked loss of film reviews was 5.7 with them, behind a longer first stage, and 6.4
  with learned ones; single words have an entropy of 6.6. Queries and keys are normed (Muon makes them grow otherwise).
  No [CLS] token and no next-sentence task: the mean over the tokens is the document's vector. No dropout: at these
  budgets no text is seen often enough.
- Paragraph vectors: the vector is computed from the words by the encoder, not a parameter of each document, so new
  text needs no optimisation; and the words to predict are other words than those that were read. Predicting the
  same words rewards copying (a prototype: 6 points less at 10 labels a class).

Where the encoder starts: in each block the last matrix of attention and of the dense layers is zero, so at first h is
the embedding itself, and the document vector a mean of embeddings. That model can be trained alone, thirty times as
many tokens a second: `train_mlm.py` does so in its first stage, and the transformer goes on exactly from there.

This file needs torch alone. Shapes: B sequences, T tokens, D width, V vocabulary, P word pairs, M masked positions,
d document columns. Read next: train_mlm.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

PAD, MASK, FIRST_ORDINARY = 0, 1, 2    # as in tokenizer.py: tokens 0 and 1 are special, all others are text


# ---------------------------------------------------------------- masking

def mask_tokens(tokens, lengths, vocabulary_size, share=0.15, generator=None):
    """Choose what to hide. Draw anew each time a sequence is seen (dynamic masking).

    Of a sequence of n real tokens exactly max(1, ⌊share · n + ½⌋) are chosen: never padding, and at least one,
    for with none the mean over masked positions is 0/0. Of the chosen, 80 % become [MASK], 10 % a random ordinary
    token, 10 % stay as they are: the encoder cannot tell which of the visible tokens it will be asked for, so it
    has to understand all of them.

    Arguments: tokens (B, T) int64, PAD behind each sequence's end; lengths (B,) int64, at least 1; generator, a
    torch.Generator of the tokens' device.
    Returns inputs (B, T), a copy with the chosen tokens hidden; positions (M,), indices into the flattened
    (B·T,) sequences; targets (M,), the original tokens there.

    The trap: much copied textbook code makes labels for 15 % of the tokens but feeds the model the *unmasked*
    sequence. Then the answer stands in the input, the model learns to copy it, and the loss dives to nothing within
    a few hundred steps (a true one is still above 4 after the 1,500 steps of train_mlm.py). It costs three points at
    10 and 100 labels a class (EXPERIMENTS.md, "What stands where a token was masked").
    """
    B, T = tokens.shape
    where = torch.arange(T, device=tokens.device)
    draw = torch.rand(B, T, generator=generator, device=tokens.device)
    draw = draw.masked_fill(where >= lengths[:, None], 2)                 # padding ranks behind every real token
    count = (share * lengths + 0.5).floor().clamp(min=1)                  # (B,)
    chosen = draw.argsort(1).argsort(1) < count[:, None]                  # (B, T) the `count` smallest draws
    positions = chosen.flatten().nonzero().squeeze(1)                     # (M,)
    targets = tokens.flatten()[positions]                                 # (M,)

    kind = torch.rand(len(positions), generator=generator, device=tokens.device)
    random = torch.randint(FIRST_ORDINARY, vocabulary_size, kind.shape, generator=generator, device=tokens.device)
    hidden = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, random, targets))
    inputs = tokens.flatten().index_put((positions,), hidden).view(B, T)  # a copy: the caller's tokens stay
    return inputs, positions, targets


def masked_language_model_loss(logits, targets, count=None):
    """Cross-entropy in nats, summed over masked positions and divided by their number.

    Arguments: logits (M, V) at the masked positions, any float type (the log-sum-exp is float32 or better); targets
    (M,) int64; count, the number to divide by when these M are only a part of the step's masked positions: the mean
    of the parts' means is not the mean.
    Returns a scalar; ln V for uniform logits. Source: Devlin et al. 2018, section 3.1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="sum") / (len(targets) if count is None else count)


# ---------------------------------------------------------------- the document term

def document_loss(logits, bag, count=None):
    """Cross-entropy in nats between the weighted words of a document's unseen part and their prediction.

    Arguments: logits (B, V + P); bag (B, V + P), weighted counts at least 0, each row is divided by its sum; count,
    the number of documents to divide by (default: those whose bag is not empty; an empty one adds 0).
    Returns a scalar. Source: Le and Mikolov 2014, section 2.3, with a full softmax.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = bag.sum(1, keepdim=True)                                      # (B, 1)
    share = bag / total.clamp(min=torch.finfo(bag.dtype).tiny)            # (B, V + P), q above
    count = (total > 0).sum().clamp(min=1) if count is None else count
    return F.cross_entropy(logits, share, reduction="sum") / count


def term_weights(counts, vocabulary_size):
    """How much each word or pair counts in a bag: min(1, √(1e-4 / frequency)), and nothing if seen < 20 times.

    Frequent words say little about a document: "the" alone is a twentieth of a text. (The square root of Mikolov et
    al. 2013, arXiv 1310.4546, section 2.3, as a weight rather than a coin flip.) counts (V + P,) -> (V + P,).
    """
    frequency = counts / counts[:vocabulary_size].sum()
    weights = (1e-4 / frequency.clamp(min=1e-12)).sqrt().clamp(max=1)
    return weights * (counts >= 20)


# ---------------------------------------------------------------- the encoder

def norm(x):
    """Layer norm without learned scale and shift. (RMSNorm would do; layer norm has the faster kernel on a CPU.)"""
    return F.layer_norm(x, x.shape[-1:])


def rotate(x):
    """Rotary positions: turn each pair of columns (i, i + half) of x (B, H, T, D/H) by the angle t / 10000^(i / half).

    Afterwards q · k depends on how far apart two tokens are, not on where they stand. Su et al. 2021, arXiv 2104.09864.
    """
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)                   # bfloat16 cannot tell position 257 from 256
    turn = 10000.0 ** -(torch.arange(half, device=x.device, dtype=exact) / half)        # (D/2H,) radians a token
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * turn    # (T, D/2H)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Every token looks at every other: softmax(q kᵀ / √(D/H)) v, in H heads. Vaswani et al. 2017, equation 1."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, x, visible):
        """x (B, T, D); visible (B, 1, 1, T) bool, False at padding, or None where there is no padding."""
        B, T, D = x.shape
        qkv = self.query_key_value(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                              # 3 × (B, H, T, D/H)
        q, k = rotate(norm(q)), rotate(norm(k))
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # The same formula by hand: scaled_dot_product_attention's backward pass in bfloat16 on a CPU takes 40 % of
            # the whole step (12,800 against 21,200 tokens/s at 6 layers, T 128).
            score = q * (D // self.heads) ** -0.5 @ k.transpose(-1, -2)   # (B, H, T, T)
            if visible is not None:
                score = score.masked_fill(~visible, float("-inf"))
            y = score.softmax(-1) @ v                                     # (B, H, T, D/H)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.output(y.transpose(1, 2).reshape(B, T, D))            # (B, T, D)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, visible):
        x = x + self.attention(norm(x), visible)
        return x + self.down(F.relu(self.up(norm(x))).square())           # (B, T, D)


class TextEncoder(nn.Module):
    """Tokens (B, T) -> token vectors (B, T, D), with the two output layers of the pretraining tasks.

    Arguments: vocabulary_size V; pairs (P,) int64, sorted, each left · V + right: the frequent word pairs that have
    an embedding of their own, in the first 64 columns; width D; layers; heads; window, the longest sequence;
    document_columns d, how many of the D columns make the document vector (64 with the document term: a narrow one
    gives the better features with few labels; all of them for the masked loss alone).
    """

    def __init__(self, vocabulary_size, pairs, width=256, layers=2, heads=4, window=128, document_columns=64):
        super().__init__()
        self.window, self.document_columns = window, document_columns
        self.register_buffer("pairs", pairs)                              # (P,)
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.pair_embedding = nn.Embedding(len(pairs) + 1, min(document_columns, 64), padding_idx=len(pairs))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.token_dense = nn.Linear(width, width)
        self.token_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.term_head = nn.Linear(document_columns, vocabulary_size + len(pairs))   # normed document vectors -> logits
        nn.init.normal_(self.token_embedding.weight, std=0.1)       # at 0.02 the masked loss rests at 6.7 for 400 steps
        if document_columns < width:   # a rare word should not weigh in the mean (all columns in it: masks come first)
            self.token_embedding.weight.data[:, :document_columns] *= 0.2
        nn.init.zeros_(self.pair_embedding.weight)
        nn.init.normal_(self.term_head.weight, std=0.02)
        nn.init.zeros_(self.term_head.bias)

    @torch.no_grad()
    def start_at(self, counts):
        """Set the biases of both output layers to the frequencies of counts (V + P,), words and pairs: what needs no
        context is known from the start. Returns the terms' weights in a bag, (V + P,)."""
        V = len(self.token_bias)
        weights = term_weights(counts, V)
        self.token_bias.copy_(((counts[:V] + 1) / (counts[:V] + 1).sum()).log())
        expected = counts * weights + 0.5
        self.term_head.bias.copy_((expected / expected.sum()).log())
        return weights

    def forward(self, tokens, lengths=None):
        """tokens (B, T) int64, T ≤ window; lengths (B,) where sequences end in padding -> (B, T, D)."""
        visible = None if lengths is None else self._real(tokens, lengths)[:, None, None]       # (B, 1, 1, T)
        x = self.token_embedding(tokens)                                  # (B, T, D)
        pair = self.pair_embedding(self.pair_ids(tokens))                 # (B, T, ≤ d)
        x = x + F.pad(pair, (0, x.shape[-1] - pair.shape[-1]))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))        # the residual stream, too: half the memory traffic
        for block in self.blocks:
            x = block(x, visible)
        return x

    @staticmethod
    def _real(tokens, lengths):
        return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]            # (B, T)

    def token_logits(self, x):
        """Token vectors (M, D), at the masked positions only -> logits (M, V), by the tied embedding.

        All positions would be nearly seven times the work in this layer, and with 2 blocks that is more than half of
        the forward pass instead of a sixth. The dense layer (BERT's, too) turns what the blocks say into the
        embedding's own coordinates.
        """
        x = F.relu(self.token_dense(norm(x))).square()                    # (M, D)
        return F.linear(norm(x), self.token_embedding.weight, self.token_bias)

    def mean(self, x, lengths):
        """Token vectors (B, T, D) -> their mean over each sequence's real tokens, first d columns, (B, d) float32.

        No norm before the mean: the length of an embedding is the weight that learning gave to its word.
        """
        x = x[..., :self.document_columns].float()
        x = x.masked_fill(~self._real(x[..., 0], lengths)[..., None], 0)
        return x.sum(1) / lengths[:, None].clamp(min=1)

    def encode(self, tokens, lengths):
        """Sequences (B, T), T ≤ window, with lengths (B,) -> their features, (B, d) float32: before the norm."""
        return self.mean(self(tokens, lengths), lengths)

    # -- the same document vector without the blocks, as long as they are zero: a product of counts and embeddings

    def pair_ids(self, tokens):
        """tokens (..., T) -> (..., T): which pair ends at each token, P where none does. A hidden neighbour makes no
        pair, so pairs never give a masked token away."""
        none = len(self.pairs)
        pair = tokens[..., :-1] * self.token_embedding.num_embeddings + tokens[..., 1:]
        found = torch.searchsorted(self.pairs, pair).clamp(max=max(none - 1, 0))
        found = torch.where(self.pairs[found] == pair, found, none) if none else torch.zeros_like(pair)
        return F.pad(found, (1, 0), value=none)

    def count_terms(self, tokens, owner, documents):
        """tokens (n,) of several documents, PAD between them and wherever a token is hidden; owner (n,), the document
        of each, or 0 -> counts (documents, V + P) of words and pairs, float32."""
        V, P = self.token_embedding.num_embeddings, len(self.pairs)
        counts = torch.zeros(documents, V + P + 1, device=tokens.device)
        one = torch.ones(2, len(tokens), device=tokens.device)
        owner = torch.as_tensor(owner, device=tokens.device).expand(2, len(tokens))
        counts.index_put_((owner, torch.stack([tokens, V + self.pair_ids(tokens)])), one, accumulate=True)
        counts[:, PAD] = 0
        return counts[:, :-1]

    def term_table(self):
        """The embeddings of all words and pairs, as far as they enter the document vector: (V + P, d)."""
        pair = self.pair_embedding.weight[:-1]
        return torch.cat([self.token_embedding.weight[:, :self.document_columns],
                          F.pad(pair, (0, self.document_columns - pair.shape[1]))])

    def mean_of_embeddings(self, counts):
        """counts (B, V + P) -> (B, d): what `mean` gives while the blocks are zero."""
        words = counts[:, :self.token_embedding.num_embeddings].sum(1, keepdim=True)
        return counts @ self.term_table() / words.clamp(min=1)
