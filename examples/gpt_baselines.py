"""Unigrams and bigrams: what gpt.py has to beat.

A unigram model knows how frequent each token is. A bigram model also knows the token
before it. Both count in the training texts, with the tokenizer of the transformer.
"""

import math

import numpy as np

from minissl.data.splits import HELD_OUT
from minissl.data.texts import SAMPLE_TEXTS
from minissl.tokenizer import PAD


DISCOUNTS = (0.5, 0.6, 0.7, 0.8, 0.9)


def neighbours(texts):
    """All neighbouring tokens inside the texts: left (n,) and right (n,) int64."""
    tokens, _ = texts.flat(np.arange(len(texts)))             # with a PAD behind each text
    left, right = tokens[:-1], tokens[1:]
    inside = (left != PAD) & (right != PAD)
    return left[inside], right[inside]


def unigram_loss(right, test_right, vocabulary_size):
    """The loss of p(b) = (c(b) + 1) / (N + V), in nats a token of test_right.

    c(b) counts the token b among the N tokens of `right`.
    """
    V = vocabulary_size
    p = (np.bincount(right, minlength=V) + 1) / (len(right) + V)          # (V,)
    return -np.log(p[test_right]).mean()


def bigram_loss(left, right, test_left, test_right, vocabulary_size, discount):
    """The loss of an interpolated Kneser-Ney bigram model, in nats a token of test_right.

    It counts how often b follows a, c(a, b), and moves a part of each count to pairs that
    were never seen. With N(a ·) the number of different tokens behind a, N(· b) the number
    of different tokens before b, N(· ·) the number of different pairs, and c(a) = Σ_b c(a, b),

        p(b | a) = max(c(a, b) − discount, 0) / c(a) + discount · N(a ·) / c(a) · q(b)
        q(b) = (N(· b) + 1) / (N(· ·) + V)                 p(b | a) = q(b) for an unseen a

    Source: Kneser and Ney 1995, "Improved backing-off for m-gram language modeling", as
    interpolated by Chen and Goodman 1999, with one added to the counts of q.
    """
    V = vocabulary_size
    keys, counts = np.unique(left * V + right, return_counts=True)
    total = np.bincount(left, minlength=V)                                # c(a)
    followers = np.bincount(keys // V, minlength=V)                       # N(a ·)
    q = (np.bincount(keys % V, minlength=V) + 1) / (len(keys) + V)        # (V,)

    a, b = test_left, test_right
    nearest = np.searchsorted(keys, a * V + b).clip(max=len(keys) - 1)
    count = np.where(keys[nearest] == a * V + b, counts[nearest], 0)      # c(a, b)
    seen = np.maximum(total[a], 1)                                        # c(a), at least 1
    rest = np.where(total[a] > 0, discount * followers[a] / seen, 1)
    p = np.maximum(count - discount, 0) / seen + rest * q[b]
    return -np.log(p).mean()


class NgramBaselines:
    """A unigram and a bigram model, counted in training texts and measured on held-out windows.

    The constructor counts in at most SAMPLE_TEXTS of the training texts, evenly spaced. The
    discount is the one with the least loss on the last tenth of their pairs of tokens, when the
    others are counted. The models themselves count all of these pairs.

    Arguments: texts, Texts of all splits; train_texts, those to learn from; window, the
    number of tokens that a model sees at most.

    Attributes:
        windows: up to 1,000 held-out windows, Texts of 2 to window + 1 tokens
        targets: the number of tokens that they ask for, all but the first of each window
        bytes: the number of bytes that these tokens stand for
        unigram, bigram: the losses of the two models, in bits a byte
    """

    def __init__(self, texts, train_texts, window):
        held_out = texts.select((texts.split == HELD_OUT) & (texts.lengths > 1))
        if len(held_out) == 0:
            print("warning: no text is held out, so the losses below are of training texts")
            held_out = train_texts
        windows = held_out.split_long(window + 1)
        self.windows = windows.select(windows.lengths > 1).sample(1000)
        test_left, test_right = neighbours(self.windows)
        self.targets = len(test_right)
        bytes_of = texts.tokenizer.bytes_of
        self.bytes = sum(len(bytes_of[token]) for token in test_right)

        V = len(texts.tokenizer)
        left, right = neighbours(train_texts.sample(SAMPLE_TEXTS))
        border = len(left) * 9 // 10
        pieces = left[:border], right[:border], left[border:], right[border:]
        losses = [bigram_loss(*pieces, V, discount) for discount in DISCOUNTS]
        discount = DISCOUNTS[int(np.argmin(losses))]
        self.unigram = self.bits_per_byte(unigram_loss(right, test_right, V))
        self.bigram = self.bits_per_byte(
            bigram_loss(left, right, test_left, test_right, V, discount)
        )

    def bits_per_byte(self, nats):
        """A loss in bits a byte of the windows, from one in nats a token (of any model)."""
        return round(float(nats) * self.targets / self.bytes / math.log(2), 4)
