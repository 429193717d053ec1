"""Batches, each a function of the step.

**Randomness is a function, not a state.** Every random draw of step s comes from
`generator(seed, purpose, s)`. (The order of the examples is drawn for an epoch. Then s is the
number of the epoch.) So a checkpoint needs no state of a random generator: a resumed run
continues bit for bit, an evaluation in between cannot disturb the training, and several
processes draw what one process would draw.
"""

import hashlib

import numpy as np
import torch

from minissl import UserError
from minissl.tokenizer import PAD
from minissl.training import distributed
from minissl.training.wording import count_of


def generator(seed, purpose, step):
    """The torch.Generator (on the CPU) for one purpose at one step.

    Arguments: seed, int; purpose, str, such as "mask"; step, the number of a step or of an
    epoch, or a word for a draw outside the training. Equal arguments give equal draws on the
    same machine and version of torch.
    """
    key = f"{seed} {purpose} {step}".encode()
    # Seven bytes fit into an int64. torch uses the lowest four. (A digest of four bytes would be
    # another number, and all results were measured with these draws.)
    digest = hashlib.blake2b(key, digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Batches:
    """Which of n examples each step takes. Each epoch has another order.

    The last n mod size examples of an epoch are left out, so all batches have the same size.

    Arguments: n, the number of examples; size, of a batch; seed and purpose, for the
    generator; equal_shares, whether every process must get equally many examples.
    Raises UserError if there are too few examples, or the shares cannot be equal.
    """

    def __init__(self, n, size, seed, purpose, equal_shares=True):
        processes = distributed.WORLD_SIZE
        if n < size:
            raise UserError(
                f"--batch-size {size}: found only {count_of(n, 'example')} to learn from; give "
                f"more, a smaller --batch-size, or a larger --limit if you gave one"
            )
        if equal_shares and size % processes:
            raise UserError(
                f"--batch-size {size}: must be divisible by the {processes} processes"
            )
        self.n, self.size, self.seed, self.purpose = n, size, seed, purpose
        self.epoch = None

    def __call__(self, step):
        """-> indices (size,) int64"""
        epoch, batch = divmod(step, self.n // self.size)
        if epoch != self.epoch:
            rng = generator(self.seed, self.purpose, epoch)
            self.order = torch.randperm(self.n, generator=rng)
            self.epoch = epoch
        begin = batch * self.size
        return self.order[begin:begin + self.size]


class WholeTexts:
    """The batches of train_mlm.py's first stage: whole texts, each split at random.

    A coin is tossed for each token: the model either reads the token or has to guess it.
    Both parts keep the places of their tokens and have PAD where the other part has one:

        text      the  old  man  and  the  sea
        read      the   .   man   .    .   sea
        rest       .   old   .   and  the   .

    Arguments: texts, a Texts; size, how many of them a batch has at most; seed.
    """

    def __init__(self, texts, size, seed):
        size = min(size, len(texts))
        if size < distributed.WORLD_SIZE:
            raise UserError(
                f"too little text: found {count_of(len(texts), 'text')} for "
                f"{count_of(distributed.WORLD_SIZE, 'process', 'processes')}; give more text, "
                f"a larger --limit if you gave one, or start fewer processes"
            )
        self.texts, self.seed = texts, seed
        self.batches = Batches(len(texts), size, seed, "document order", equal_shares=False)

    def __call__(self, step):
        """-> read, rest: both (B, T) int64, T the length of the longest text."""
        tokens, lengths = self.texts.padded(self.batches(step).numpy())
        tokens, lengths = torch.from_numpy(tokens), torch.from_numpy(lengths)
        heads = toss_coins(lengths, generator(self.seed, "coin", step))    # (B, T)
        return tokens.masked_fill(heads, PAD), tokens.masked_fill(~heads, PAD)


def toss_coins(lengths, rng):
    """Whether the coin of each token shows heads: (B, T) bool, T the longest of lengths (B,).

    Each text tosses a coin for each of its tokens, and one more that nothing uses. It stays,
    because without it the later texts would get other coins than those of RESULTS.md.
    """
    B, T = len(lengths), int(lengths.max())
    is_tossed = torch.arange(T + 1) <= lengths[:, None]                    # (B, T + 1)
    numbers = torch.rand(int(is_tossed.sum()), generator=rng)
    numbers = torch.zeros(B, T + 1).masked_scatter(is_tossed, numbers)[:, :T]
    return numbers < 0.5


class Windows:
    """One window of each text in an epoch: train_mlm.py's second stage, and examples/gpt.py.

    The window lies at a random place of its text. Windows of similar length share a
    batch, so there is hardly any padding. A batch has about batch_size · window tokens, but the
    last one of the sorted windows, which has the longest, may have fewer.

    Arguments: texts, a Texts; window, the greatest number of tokens; batch_size; seed;
    leave_rest, whether something must be left outside the window for the document loss. If
    so, the window of a short text takes only half of it.
    Raises UserError if all texts together have fewer tokens than a batch.
    """

    def __init__(self, texts, window, batch_size, seed, leave_rest):
        total = texts.lengths.sum()
        if total < batch_size * window:
            raise UserError(
                f"a step needs {batch_size * window:,} tokens ({batch_size} windows of {window}), "
                f"but the data has {total:,}; give more text, a smaller --batch-size or --window, "
                f"or a larger --limit if you gave one"
            )
        self.texts, self.seed, self.leave_rest = texts, seed, leave_rest
        longest = (texts.lengths + 1) // 2 if leave_rest else texts.lengths
        self.sizes = np.minimum(window, longest)                           # (N,)
        self.borders = self._borders(batch_size * window)
        self.batches = len(self.borders) - 1
        self.epoch = None

    def _borders(self, tokens):
        """Where batches of `tokens` tokens begin and end, if windows are sorted by size.

        [0, first of batch 1, first of batch 2, ..., N]: the same in every epoch.
        """
        # ends[i] is the number of tokens in the i shortest windows together.
        ends = np.append(0, np.cumsum(np.sort(self.sizes)))                # (N + 1,)
        borders = [0]
        while borders[-1] < len(self.sizes):
            full = ends[borders[-1]] + tokens
            # As many windows as fit: the largest i with ends[i] <= full.
            borders.append(np.searchsorted(ends, full, side="right") - 1)
        return borders

    def _begin_epoch(self, epoch):
        """Draw the windows' places and the order of the batches."""
        rng = generator(self.seed, "windows", epoch)
        ties, places, turns = torch.rand(3, len(self.texts), generator=rng).double().numpy()
        self.order = np.argsort(self.sizes + ties, kind="stable")    # by length, ties at random
        room = self.texts.lengths - self.sizes + 1
        self.offsets = (places * room).astype(np.int64)      # where each window begins
        self.turns = np.argsort(turns[:self.batches], kind="stable")
        self.epoch = epoch

    def __call__(self, step):
        """-> tokens (B, T) int64 and lengths (B,) of the windows, and rest (B, R) int64.

        rest has the whole documents, with PAD in place of the window. Without leave_rest
        nobody asks for it, and R is 0.
        """
        epoch, batch = divmod(step, self.batches)
        if epoch != self.epoch:
            self._begin_epoch(epoch)
        batch = self.turns[batch]
        indices = self.order[self.borders[batch]:self.borders[batch + 1]]
        offsets, sizes = self.offsets[indices], self.sizes[indices]
        tokens, lengths = self.texts.padded(indices, offsets, sizes)
        rest = tokens[:, :0]                                               # (B, 0)
        if self.leave_rest:
            rest, _ = self.texts.padded(indices)                           # (B, R)
            place = np.arange(rest.shape[1])
            begin, end = offsets[:, None], (offsets + sizes)[:, None]
            rest[(place >= begin) & (place < end)] = PAD
        return torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(rest)
