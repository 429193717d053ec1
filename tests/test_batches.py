"""Batches: an epoch shows every text once, and each batch is a function of the step."""

import numpy as np
import pytest
import torch

from minissl import UserError
from minissl.data.batches import Batches, WholeTexts, Windows, generator
from minissl.data.text_sources import load_texts
from minissl.data.texts import Texts
from minissl.tokenizer import PAD


def texts_of_lengths(lengths):
    """Texts whose tokens are all different: 2, 3, 4, ..., so a token tells where it is from."""
    lengths = np.array(lengths)
    return Texts(
        tokens=np.arange(2, 2 + lengths.sum(), dtype=np.uint16),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=np.full(len(lengths), -1),
        split=np.zeros(len(lengths), np.uint8),
        classes=[],
        tokenizer=None,
    )


def all_texts(texts):
    """The tokens of each text, as lists."""
    return [texts[i].tolist() for i in range(len(texts))]


def one_epoch(windows, epoch=0):
    """All batches of an epoch: (tokens, lengths, rest) of each."""
    first = epoch * windows.batches
    return [windows(step) for step in range(first, first + windows.batches)]


# ---------------------------------------------------------------- draws and orders

def test_draws_depend_on_seed_purpose_and_step_alone():
    def draw(*key):
        return torch.rand(3, generator=generator(*key)).tolist()

    wanted = draw(0, "mask", 7)
    torch.rand(5)                                    # the global state has no part in it
    assert draw(0, "mask", 7) == wanted
    for key in [(1, "mask", 7), (0, "view 0", 7), (0, "mask", 8)]:
        assert draw(*key) != wanted


def test_each_epoch_has_every_example_once_in_another_order():
    batches = Batches(12, 4, seed=0, purpose="order")
    orders = set()
    for epoch in range(5):
        steps = range(3 * epoch, 3 * epoch + 3)
        order = torch.cat([batches(step) for step in steps]).tolist()
        assert sorted(order) == list(range(12))
        orders.add(tuple(order))
    assert len(orders) == 5


def test_a_batch_is_a_function_of_the_step():
    batches = Batches(12, 4, seed=0, purpose="order")
    wanted = [batches(step) for step in range(6)]
    for step in (4, 1, 5):                           # in any order, and by another object
        assert torch.equal(batches(step), wanted[step])
        again = Batches(12, 4, seed=0, purpose="order")
        assert torch.equal(again(step), wanted[step])


def test_all_batches_are_of_equal_size():
    batches = Batches(14, 4, seed=0, purpose="order")
    for epoch in range(5):                           # two other examples are left out each time
        steps = range(3 * epoch, 3 * epoch + 3)
        order = torch.cat([batches(step) for step in steps]).tolist()
        assert len(set(order)) == 12


@pytest.mark.parametrize("n, examples", [(14, "14 examples"), (1, "1 example")])
def test_too_few_examples_for_a_batch_get_a_sentence(n, examples):
    sentence = f"--batch-size 15: found only {examples} to learn from; give more, "
    sentence += "a smaller --batch-size, or a larger --limit if you gave one"
    with pytest.raises(UserError, match=f"^{sentence}$"):
        Batches(n, 15, seed=0, purpose="order")


def test_too_few_texts_for_a_step_get_a_sentence():
    texts = texts_of_lengths([10, 10, 10])
    assert len(one_epoch(Windows(texts, 10, 3, seed=0, leave_rest=False))) == 1
    sentence = "needs 40 tokens .4 windows of 10., but the data has 30"
    with pytest.raises(UserError, match=sentence) as caught:
        Windows(texts, 10, 4, seed=0, leave_rest=False)
    assert str(caught.value).endswith(
        "; give more text, a smaller --batch-size or --window, "
        "or a larger --limit if you gave one"
    )


# ---------------------------------------------------------------- windows

def test_a_window_and_its_rest_together_are_the_text(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    seen = []
    for tokens, lengths, rest in one_epoch(Windows(texts, 64, 4, seed=0, leave_rest=True)):
        for row, length in enumerate(lengths.tolist()):
            window, outside = tokens[row, :length].tolist(), rest[row].tolist()
            begin = outside.index(PAD)               # the place of the window is empty
            assert outside[begin:begin + length] == [PAD] * length
            outside[begin:begin + length] = window
            seen.append([token for token in outside if token != PAD])
            assert outside[:len(seen[-1])] == seen[-1]               # all PAD is at the end
    assert sorted(seen) == sorted(all_texts(texts))  # each text once


def test_windows_of_a_batch_are_of_similar_length(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    for tokens, lengths, _ in one_epoch(Windows(texts, 64, 4, seed=0, leave_rest=True)):
        assert lengths.sum() <= 4 * 64
        assert tokens.shape == (len(lengths), lengths.max())
        assert lengths.max() <= lengths.min() + 8
        is_padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
        assert torch.equal(tokens == PAD, is_padding)


def test_a_batch_of_windows_is_a_function_of_seed_and_step():
    texts = texts_of_lengths([20, 30, 40, 50])
    windows = Windows(texts, 10, 2, seed=0, leave_rest=True)
    wanted = windows(5)
    windows(0)                                       # other epochs in between change nothing
    for again in (windows(5), Windows(texts, 10, 2, seed=0, leave_rest=True)(5)):
        for one, other in zip(again, wanted, strict=True):
            assert torch.equal(one, other)
    tokens, _, _ = Windows(texts, 10, 2, seed=1, leave_rest=True)(5)
    assert not torch.equal(tokens, wanted[0])


@pytest.mark.parametrize("leave_rest", [True, False])
def test_windows_lie_anywhere_in_a_text(leave_rest):
    texts = texts_of_lengths([100] + 20 * [9])
    windows = Windows(texts, 10, 2, seed=0, leave_rest=leave_rest)
    starts = []                                      # in the text of 100 tokens: 2 to 101
    for epoch in range(200):
        for tokens, _, _ in one_epoch(windows, epoch):
            starts += [token - 2 for token in tokens[:, 0].tolist() if token < 102]
    assert len(starts) == 200
    assert min(starts) == 0 and max(starts) == 90
    assert len(set(starts)) > 70                     # 91 places, 200 draws


@pytest.mark.parametrize("leave_rest", [True, False])
def test_windows_come_in_another_order_each_epoch(leave_rest):
    texts = texts_of_lengths([100] + 20 * [9])
    windows = Windows(texts, 10, 2, seed=0, leave_rest=leave_rest)
    orders, places_of_the_long_one = set(), set()
    for epoch in range(200):
        firsts = torch.cat([tokens[:, 0] for tokens, _, _ in one_epoch(windows, epoch)])
        order = np.searchsorted(texts.starts, firsts.numpy() - 2, side="right") - 1
        assert sorted(order) == list(range(21))      # each text once
        orders.add(tuple(order))
        places_of_the_long_one.add(order.tolist().index(0))
    assert len(orders) == 200
    assert len(places_of_the_long_one) > 3           # not always from short to long


def test_to_leave_a_rest_the_window_takes_half_of_a_short_text():
    texts = texts_of_lengths([3, 9, 12, 50])
    for leave_rest, expected in [(True, [2, 5, 6, 10]), (False, [3, 9, 10, 10])]:
        windows = Windows(texts, 10, 1, seed=0, leave_rest=leave_rest)
        lengths = torch.cat([lengths for _, lengths, _ in one_epoch(windows)])
        assert sorted(lengths.tolist()) == expected


def test_a_rest_that_is_not_left_is_not_read():
    texts = texts_of_lengths([3, 9, 12, 50])
    for tokens, _, rest in one_epoch(Windows(texts, 10, 1, seed=0, leave_rest=False)):
        assert rest.shape == (len(tokens), 0)


def test_a_text_of_one_token_leaves_nothing_to_guess():
    texts = texts_of_lengths(8 * [1])
    tokens, lengths, rest = Windows(texts, 4, 2, seed=0, leave_rest=True)(0)
    assert sorted(tokens.flatten().tolist()) == list(range(2, 10))
    assert lengths.tolist() == 8 * [1]
    assert (rest == PAD).all()


# ---------------------------------------------------------------- whole texts

def test_read_and_unread_tokens_together_are_the_texts(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    read, rest = WholeTexts(texts, 16, seed=0)(3)
    assert read.shape == rest.shape
    assert len(read) == 16
    assert not ((read != PAD) & (rest != PAD)).any()
    originals = all_texts(texts)
    for row in (read + rest).tolist():
        text = [token for token in row if token != PAD]
        assert text in originals
        assert row[:len(text)] == text               # each token has kept its place
    share = (read != PAD).sum() / (read + rest != PAD).sum()
    assert 0.4 < share < 0.6


def test_no_text_at_all_gets_a_sentence():
    with pytest.raises(UserError, match="too little text: found 0 texts for 1 process; give"):
        WholeTexts(texts_of_lengths([]), 2, seed=0)


def test_an_epoch_of_whole_texts_has_each_text_once():
    texts = texts_of_lengths([5, 1, 7, 3])
    whole_texts = WholeTexts(texts, 2, seed=0)
    firsts = []
    for step in (0, 1):
        read, rest = whole_texts(step)
        firsts += (read + rest)[:, 0].tolist()
    assert sorted(firsts) == [2, 7, 8, 15]


def test_another_half_of_a_document_is_read_each_time():
    whole_texts = WholeTexts(texts_of_lengths([40]), 1, seed=0)
    halves = set()
    for step in range(4):
        read, _ = whole_texts(step)
        halves.add(tuple(read[0].tolist()))
    assert len(halves) == 4
