"""Training on text: the gradient of each stage, and the script on a small corpus."""

import copy
import json
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_equal_states, log_of, read_log, stopped_at, story

import train_mlm
from minissl import UserError, transformer
from minissl.data import batches
from minissl.data.batches import WholeTexts, Windows, generator
from minissl.data.splits import HELD_OUT, TRAIN
from minissl.data.text_sources import load_texts
from minissl.data.texts import Texts
from minissl.evaluation import load, previews
from minissl.evaluation.previews import TextPreview
from minissl.optim import Muon
from minissl.tokenizer import MASK, PAD
from minissl.training.files import load_checkpoint


# ---------------------------------------------------------------- the gradient of a step

V = 12
PAIRS = [(2, 3), (3, 3), (3, 5), (4, 8), (5, 2), (6, 6), (7, 9), (8, 10), (9, 2), (11, 4)]
SETTINGS = SimpleNamespace(masked_weight=1.5, document_weight=2.5)


def random_model():
    """Two layers in which everything is random: zeros would hide what they multiply."""
    keys = torch.tensor([left * V + right for left, right in PAIRS])
    model = transformer.TextEncoder(V, keys, 16, 2, 2, window=20, document_columns=8)
    draws = generator(0, "test", 0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws)
    model.pair_embedding.weight.data[-1] = 0         # "no pair" is no parameter
    model.term_weights.copy_(torch.rand(V + len(PAIRS), generator=draws) + 0.1)
    return model


def random_texts():
    """Twelve texts of many lengths, one of a single token, which leaves nothing to guess."""
    lengths = np.array([1, 30, 7, 12, 3, 19, 50, 8, 25, 2, 14, 5])
    return Texts(
        tokens=np.random.default_rng(0).integers(2, V, lengths.sum()),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=np.full(12, -1),
        split=np.full(12, TRAIN),
        classes=[],
        tokenizer=None,
    )


def document_loss_of_one(model, vector, rest):
    """−Σ_w q_w log softmax(W norm(vector) + c)[w] for one document, and 0 without words."""
    bag = model.bag_of_terms(rest[None])[0]          # (V + P,)
    if bag.sum() == 0:
        return 0
    q = bag / bag.sum()
    z = transformer.norm(vector)
    return -(q * model.term_head(z).log_softmax(0)).sum()


def assert_equal_gradients(model, expected):
    """Fail unless all parameters have the expected gradients, and none is zero."""
    parameters = zip(model.named_parameters(), expected.parameters(), strict=True)
    for (name, p), wanted in parameters:
        assert (p.grad is None) == (wanted.grad is None), name
        if p.grad is not None:
            assert p.grad.norm() > 0, name
            largest = float(wanted.grad.abs().max())
            torch.testing.assert_close(p.grad, wanted.grad, rtol=1e-3, atol=1e-4 * largest)


def test_gradient_of_the_first_stage_one_document_at_a_time():
    model = random_model()
    read, rest = WholeTexts(random_texts(), 12, seed=3)(0)
    loss, losses = train_mlm.document_loss_of_whole_texts(model, read, rest)
    loss.backward()

    by_hand = copy.deepcopy(model)
    by_hand.zero_grad()
    documents = int((rest != PAD).any(1).sum())
    assert documents == 11                           # of one document everything is read
    total = 0
    for seen, left in zip(read, rest, strict=True):           # (T,) each
        words = by_hand.token_embedding(seen)[:, :8]                 # the document's columns
        pairs = by_hand.pair_embedding(by_hand.pair_ids(seen))
        is_read = seen != PAD
        vector = (words + pairs)[is_read].sum(0) / is_read.sum().clamp(min=1)
        total = total + document_loss_of_one(by_hand, vector, left) / documents
    total.backward()

    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert losses["document"].item() == loss.item()
    assert_equal_gradients(model, by_hand)
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"token_embedding", "pair_embedding", "term_head"}


def test_gradient_of_the_second_stage_one_document_at_a_time():
    model = random_model()
    tokens, lengths, rest = Windows(random_texts(), 20, 8, seed=0, leave_rest=True)(0)
    assert lengths.min() < lengths.max()             # there is padding
    inputs, targets = transformer.mask_tokens(tokens, lengths, V, 0.3, generator(0, "mask", 0))
    loss, _ = train_mlm.masked_and_document_loss(
        model, inputs, targets, lengths, rest, SETTINGS, nullcontext()
    )
    loss.backward()

    by_hand = copy.deepcopy(model)
    by_hand.zero_grad()
    masked = int((targets != -100).sum())
    documents = int((rest != PAD).any(1).sum())
    assert 0 < documents < len(tokens)
    total = 0
    for row, T in enumerate(lengths.tolist()):
        x = by_hand(inputs[row:row + 1, :T])[0]      # (T, D): alone, without padding
        for t in range(T):
            if targets[row, t] != -100:
                log_p = by_hand.token_logits(x[t]).log_softmax(0)
                total = total - 1.5 * log_p[targets[row, t]] / masked
        vector = x[:, :8].mean(0)
        total = total + 2.5 * document_loss_of_one(by_hand, vector, rest[row]) / documents
    total.backward()

    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert_equal_gradients(model, by_hand)           # of all parameters
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_knows_nothing_has_the_chance_losses():
    model = random_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    tokens, lengths, rest = Windows(random_texts(), 20, 8, seed=0, leave_rest=True)(0)
    inputs, targets = transformer.mask_tokens(tokens, lengths, V, 0.3, generator(0, "mask", 0))
    loss, losses = train_mlm.masked_and_document_loss(
        model, inputs, targets, lengths, rest, SETTINGS, nullcontext()
    )
    assert losses["masked"].item() == pytest.approx(math.log(V))
    assert losses["document"].item() == pytest.approx(math.log(V + len(PAIRS)))
    assert loss.item() == pytest.approx(1.5 * math.log(V) + 2.5 * math.log(V + len(PAIRS)))


@pytest.mark.parametrize("off, left", [("masked", "document"), ("document", "masked")])
def test_a_weight_of_0_turns_its_loss_off(off, left):
    model = random_model()
    tokens, lengths, rest = Windows(random_texts(), 20, 8, seed=0, leave_rest=True)(0)
    inputs, targets = transformer.mask_tokens(tokens, lengths, V, 0.3, generator(0, "mask", 0))
    settings = SimpleNamespace(masked_weight=1.5, document_weight=2.5)
    setattr(settings, f"{off}_weight", 0)
    _, losses = train_mlm.masked_and_document_loss(
        model, inputs, targets, lengths, rest, settings, nullcontext()
    )
    assert losses.keys() == {left}


# ---------------------------------------------------------------- what the script learns from

@pytest.fixture
def train(corpus, run_script, tmp_path):
    """train("name", "--flag", value, ...) -> (the folder of a finished tiny run, its output)."""
    def train(name, *flags):
        folder = tmp_path / name
        code, printed = run_script(
            train_mlm, "--data", corpus, "--data-dir", tmp_path / "data", *TINY,
            "--run", folder, *flags,
        )
        assert code == 0, printed
        return folder, printed
    return train


def test_each_stage_gets_the_batches_of_its_step(corpus, train, tmp_path, monkeypatch):
    batches_of_run = []
    first_stage = train_mlm.document_loss_of_whole_texts
    second_stage = train_mlm.masked_and_document_loss

    def record_first_stage(model, *batch):
        batches_of_run.append(batch)
        return first_stage(model, *batch)

    def record_second_stage(model, inputs, targets, lengths, rest, *others):
        batches_of_run.append((inputs, targets, lengths, rest))
        return second_stage(model, inputs, targets, lengths, rest, *others)

    monkeypatch.setattr(train_mlm, "document_loss_of_whole_texts", record_first_stage)
    monkeypatch.setattr(train_mlm, "masked_and_document_loss", record_second_stage)
    train("run", "--steps", 4, "--embedding-steps", 2, "--seed", 5, "--mask-share", 0.4)

    texts = load_texts(str(corpus), tmp_path / "data", 400)
    train_texts = texts.select(texts.split == TRAIN)
    whole_texts = WholeTexts(train_texts, 8 * 8, seed=5)             # 8 times the batch size
    windows = Windows(train_texts, 32, 8, seed=5, leave_rest=True)
    expected = [whole_texts(0), whole_texts(1)]
    for step in (2, 3):
        tokens, lengths, rest = windows(step - 2)
        masks = generator(5, "mask", step)
        inputs, targets = transformer.mask_tokens(
            tokens, lengths, len(texts.tokenizer), 0.4, masks
        )
        expected.append((inputs, targets, lengths, rest))
    for batch, wanted in zip(batches_of_run, expected, strict=True):
        for tensor, wanted_tensor in zip(batch, wanted, strict=True):
            assert torch.equal(tensor, wanted_tensor)


def test_no_weight_depends_on_held_out_or_test_texts(train, monkeypatch):
    load_unchanged = train_mlm.load_texts

    def load_changed(*arguments):
        texts = load_unchanged(*arguments)
        texts.tokens = np.array(texts.tokens)
        for i in np.flatnonzero(texts.split != TRAIN):
            start = texts.starts[i]
            texts.tokens[start:start + texts.lengths[i]] = 77
        return texts

    one, _ = train("one", "--steps", 35)
    monkeypatch.setattr(train_mlm, "load_texts", load_changed)
    other, _ = train("other", "--steps", 35)
    assert_equal_states(load_checkpoint(one)["model"], load_checkpoint(other)["model"])


@pytest.mark.parametrize("window", [32, 1200])
def test_windows_are_as_long_as_asked(window, tmp_path, run_script, monkeypatch):
    (tmp_path / "long.txt").write_text(story("sea", 0, 1000), encoding="utf-8")
    made = []

    def make_windows(*arguments, **options):
        made.append(Windows(*arguments, **options))
        raise UserError("this is enough")

    monkeypatch.setattr(train_mlm, "Windows", make_windows)
    flags = ["--data", tmp_path / "long.txt", "--data-dir", tmp_path, "--run", tmp_path / "run"]
    run_script(train_mlm, *flags, *TINY, "--window", window, "--batch-size", 1)
    windows, = made
    assert windows.sizes.max() == window
    assert windows.texts.lengths.max() <= max(1024, 4 * window)


def test_no_draw_of_a_run_is_used_twice(train, monkeypatch):
    keys = []

    def record(*key):
        keys.append(key)
        return generator(*key)

    for module in (train_mlm, batches, previews):
        monkeypatch.setattr(module, "generator", record)
    train("run", "--steps", 40)
    purposes = {purpose for _, purpose, _ in keys}
    assert purposes == {"document order", "coin", "windows", "mask", "held-out masks"}
    assert len(set(keys)) == len(keys)


def test_rates_rise_and_fall_once_in_each_stage(train, monkeypatch):
    rates_of_muon, rates_of_adam, sizes = [], [], {}

    def record_muon(self):
        rates_of_muon.append([group["lr"] for group in self.param_groups])
        sizes["Muon"] = [len(group["params"]) for group in self.param_groups]

    def record_adam(self):
        rates_of_adam.append([group["lr"] for group in self.param_groups])
        sizes["Adam"] = [len(group["params"]) for group in self.param_groups]

    monkeypatch.setattr(Muon, "step", record_muon)
    monkeypatch.setattr(torch.optim.Adam, "step", record_adam)
    run, _ = train("run", "--steps", 240, "--embedding-steps", 40, "--evaluate-every", 240)

    for step in range(40):                           # of the embeddings, and of the heads
        rate = 0.02 * min((step + 1) / 20, 1 - step / 40)
        assert rates_of_adam[step] == pytest.approx([0.5 * rate, 0.5 * rate])
    for step in range(200):
        rate = 0.02 * min((step + 1) / 100, (200 - step) / 100)
        assert rates_of_muon[40 + step] == pytest.approx([rate])     # of the blocks
        assert rates_of_adam[40 + step] == pytest.approx([0.05 * rate, 0.15 * rate])
    # Two embeddings, five tensors of the output layers, four matrices of the block.
    assert sizes == {"Adam": [2, 5], "Muon": [4]}
    model, _ = load.load_run(run)
    assert len(list(model.parameters())) == 2 + 5 + 4         # so nothing is left out


def test_the_masked_loss_falls_below_the_entropy_of_words(corpus, train, tmp_path):
    run, _ = train("run", "--steps", 500, "--evaluate-every", 250)
    texts = load_texts(str(corpus), tmp_path / "data", 400)
    share = np.bincount(texts.tokens) / len(texts.tokens)
    share = share[share > 0]
    entropy = -(share * np.log(share)).sum()
    held_out = float(read_log(run)[-1]["held_out"])
    assert held_out < 0.6 * entropy, (held_out, entropy)


@pytest.mark.parametrize("flags, left", [
    (["--masked-weight", 0], {"document"}),
    (["--document-weight", 0, "--embedding-steps", 0], {"masked"}),
    (["--layers", 0], {"masked", "document"}),
])
def test_each_loss_and_the_embeddings_can_learn_alone(flags, left, train):
    run, _ = train("run", *flags)
    for name in ("masked", "document"):
        losses = [float(row[name]) for row in read_log(run) if row[name]]
        assert bool(losses) == (name in left)
        if losses:
            assert losses[-1] < losses[0]


def test_without_the_document_loss_the_features_are_all_columns(train):
    alone = ["--document-weight", 0, "--embedding-steps", 0]
    run, _ = train("run", *alone, "--width", 80, "--steps", 2)
    assert load_checkpoint(run)["model_settings"]["document_columns"] == 80
    run, _ = train("both", "--width", 80, "--steps", 2, "--embedding-steps", 1)
    assert load_checkpoint(run)["model_settings"]["document_columns"] == 64


def test_it_is_said_when_no_text_can_be_held_out(corpus, tmp_path, train):
    (tmp_path / "books").mkdir()
    for topic in ("city", "sea"):
        texts = [path.read_text(encoding="utf-8") for path in sorted((corpus / topic).iterdir())]
        (tmp_path / "books" / f"{topic}.txt").write_text(" ".join(texts), encoding="utf-8")
    _, printed = train("run", "--data", tmp_path / "books", "--steps", 31)
    assert "the held-out loss below comes from training texts" in printed


# ---------------------------------------------------------------- the same run again

def test_one_seed_gives_equal_runs_and_another_does_not(train, trained):
    same, _ = train("same")
    other, _ = train("other", "--seed", 1)
    model = load_checkpoint(trained)["model"]
    assert_equal_states(model, load_checkpoint(same)["model"])
    embedding = load_checkpoint(other)["model"]["token_embedding.weight"]
    assert not torch.equal(model["token_embedding.weight"], embedding)


def test_previews_do_not_change_what_is_learned(train, trained):
    other, _ = train("other", "--evaluate-every", 7)
    assert_equal_states(load_checkpoint(trained)["model"], load_checkpoint(other)["model"])


@pytest.mark.parametrize("at", [20, 60])             # in the first stage, and in the second
def test_a_resumed_run_ends_like_an_undisturbed_one(
    at, corpus, tmp_path, run_script, trained
):
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--run", tmp_path / "run"]
    with stopped_at(at - 1):
        code, printed = run_script(train_mlm, *flags)
    assert code == 130
    assert "--resume" in printed
    code, printed = run_script(train_mlm, "--run", tmp_path / "run", "--resume")
    assert code == 0, printed

    assert log_of(tmp_path / "run") == log_of(trained)     # no loss counts twice or not at all
    one, other = load_checkpoint(trained), load_checkpoint(tmp_path / "run")
    assert_equal_states(one["model"], other["model"])
    for state, other_state in zip(one["optimizers"], other["optimizers"], strict=True):
        assert state["state"].keys() == other_state["state"].keys()
        for key in state["state"]:
            assert_equal_states(state["state"][key], other_state["state"][key])


def test_after_a_resumption_each_row_is_there_once(train):
    run, _ = train("run", "--steps", 60)
    train("run", "--steps", 90, "--resume")
    assert [row["step"] for row in read_log(run)] == ["1", "30", "60", "90"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<code>steps=90</code>" in page


def test_a_run_continues_with_the_same_texts_elsewhere(corpus, train, tmp_path):
    train("run", "--embedding-steps", 10, "--steps", 12)
    moved = shutil.copytree(corpus, tmp_path / "elsewhere")
    flags = ["--embedding-steps", 10, "--steps", 14, "--data", moved, "--resume"]
    _, printed = train("run", *flags)
    assert "resuming after step 12 of 14" in printed


# ---------------------------------------------------------------- what a run shows

def test_a_run_leaves_a_folder_with_all_that_is_promised(trained):
    names = {path.name for path in trained.iterdir()}
    promised = {"config.json", "metrics.csv", "checkpoint.pt", "report.html", "sentences.json"}
    assert promised <= names
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["steps"] == 90
    assert "train_mlm.py" in config["command"]
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace(config["command"], "")         # it requests nothing


def test_the_time_left_is_that_of_the_stage(train):
    # A step of the second stage takes several times as long: the first says nothing about it.
    # Its last step, 25, has a preview, though --evaluate-every is 30.
    _, printed = train("run", "--steps", 40, "--embedding-steps", 25)
    is_of_first_stage = {}
    for line in printed.splitlines():
        if line.startswith("step "):
            step = line.split()[1]
            is_of_first_stage[step] = line.endswith("min left in the first stage")
    assert is_of_first_stage == {"1/40": True, "25/40": True, "30/40": False, "40/40": False}


def preview_of(texts, folder):
    return TextPreview(texts, 32, 0.15, folder, nullcontext(), "cpu")


class ModelThatKnowsNothing:
    """All 400 tokens are equally likely to it."""

    def __call__(self, tokens, lengths):
        return torch.zeros(*tokens.shape, 1)

    def token_logits(self, x):
        return torch.zeros(len(x), 400)


def test_a_guess_costs_log2_400_bits_spread_over_its_bytes(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    preview = preview_of(texts, tmp_path)
    preview.labelled_train = preview.labelled_held_out = texts.select(np.arange(0))
    result = preview(ModelThatKnowsNothing())
    tokens = preview.masked_targets.tolist()
    size = sum(len(texts.tokenizer.bytes_of[token]) for token in tokens)
    assert size > 1.5 * len(tokens)
    assert result["held_out"] == pytest.approx(np.log(400), abs=1e-3)
    bits = np.log2(400) * len(tokens)
    assert result["bits_per_byte"] == pytest.approx(bits / size, abs=1e-3)


def test_neighbours_come_from_training_texts_alone(corpus, tmp_path):
    preview = preview_of(load_texts(str(corpus), tmp_path, 400), tmp_path)
    assert set(preview.labelled_train.split) == {TRAIN}
    assert set(preview.labelled_held_out.split) == {HELD_OUT}


def test_passages_show_the_guesses_beside_the_original_tokens(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    preview = preview_of(texts, tmp_path)
    ship = int(texts.tokenizer.encode("ship")[0])
    passages = preview.passages(torch.full_like(preview.masked_targets, ship))
    assert len(passages) > 3
    originals = set()
    for text, wanted, got in passages:
        assert text.count("[MASK]") == len(wanted)
        assert got == len(wanted) * [texts.tokenizer.decode([ship])]
        originals.update(wanted)
    assert len(originals) > 5


def test_fill_answers_for_each_mask(trained, run_script):
    text = "The ship [MASK] and the [MASK], wait[MASK]"
    code, printed = run_script(train_mlm, "--run", trained, "--fill", text)
    assert code == 0, printed
    assert printed.count("[MASK] ") == 3

    model, checkpoint = load.load_run(trained)
    tokenizer = load.tokenizer_of(checkpoint, trained)
    tokens = [*tokenizer.encode("the ship"), MASK, *tokenizer.encode("and the"), MASK]
    tokens += [*tokenizer.encode(", wait", leading_space=False), MASK]
    tokens = torch.tensor([int(token) for token in tokens])
    with torch.no_grad():
        probabilities = model.token_logits(model(tokens[None])[0]).softmax(1)      # (T, V)
    for n, row in enumerate(probabilities[tokens == MASK], 1):
        best = row.topk(5)
        answers = []
        for token, probability in zip(best.indices, best.values, strict=True):
            answers.append(f"{tokenizer.decode([int(token)])} {probability:.2f}")
        assert f"[MASK] {n}: {', '.join(answers)}" in printed


@pytest.mark.parametrize("text, sentence", [
    ("no mask here", "at least one [MASK]"),
    (20 * "the ship " + "[MASK]", "the text has 41 tokens, and the run reads at most 32: give a"),
])
def test_fill_refuses_too_few_masks_and_too_long_texts(text, sentence, trained, run_script):
    code, printed = run_script(train_mlm, "--run", trained, "--fill", text)
    assert code == 2
    assert sentence in printed


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, sentence", [
    (["--stepz", "3"], "unrecognized arguments"),
    (["--steps", "many"], "'many' is not a whole number"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--mask-share", "0"], "--mask-share 0.0: must be above 0"),
    (["--embedding-steps", "9", "--document-weight", "0"], "--embedding-steps 9: leave it out"),
    (["--mask-share", "nan"], "must be a finite number"),
    (["--mask-share", "1.5"], "--mask-share 1.5: must be at most 1"),
    (["--device", "tpu"], "'tpu' is not one of auto, cpu, cuda, mps"),
    (["--heads", "3"], "--width 32: must be a multiple of 6, twice the number of --heads"),
    (["--embedding-steps", "90"], "must be at most 89 with --steps 90"),
    (["--embedding-steps", "91", "--masked-weight", "0"], "must be at most 90 with --steps 90"),
    (["--masked-weight", "0", "--document-weight", "0"], "nothing is left to learn"),
    (["--data", "not/there"], "not/there: file not found"),
    (["--batch-size", "9999"], "a step needs 319,968 tokens"),
    (["--resume"], "checkpoint.pt: file not found"),
    (["--save-every", "-1"], "--save-every -1.0: must be at least 0"),
    (["--data-dir", __file__], "test_train_mlm.py: is not a writable folder; give another"),
])
def test_a_wrong_setting_gets_one_sentence(flags, sentence, corpus, tmp_path, run_script):
    run = tmp_path / "run"
    all_flags = ["--data", corpus, "--data-dir", tmp_path, "--run", run, *TINY, *flags]
    code, printed = run_script(train_mlm, *all_flags)
    assert code == 2
    assert sentence in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not run.exists()                          # the corrected command finds it free


def test_a_run_is_never_overwritten(trained, corpus, run_script):
    before = (trained / "checkpoint.pt").read_bytes()
    flags = ["--data", corpus, "--data-dir", trained.parent / "data", *TINY, "--run", trained]
    code, printed = run_script(train_mlm, *flags)
    assert code == 2
    assert "already holds a run" in printed
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flags, sentence", [
    (["--width", 64], "--width 64: the run in"),
    (["--width", 64], "was started with 32"),
    (["--document-weight", 0], "--document-weight 0.0: does not fit the run in"),
    (["--steps", 50], "has already made 90 steps"),
])
def test_a_run_is_not_resumed_with_other_settings(flags, sentence, trained, run_script):
    before = (trained / "checkpoint.pt").read_bytes()
    code, printed = run_script(train_mlm, "--resume", "--run", trained, *flags)
    assert code == 2
    assert sentence in printed
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_a_run_is_not_resumed_with_other_texts(trained, corpus, run_script, tmp_path):
    before = (trained / "checkpoint.pt").read_bytes()
    other = shutil.copytree(corpus, tmp_path / "texts")
    (other / "sea" / "one_more.txt").write_text("The tide turns.", encoding="utf-8")
    code, printed = run_script(train_mlm, "--resume", "--run", trained, "--data", other)
    assert code == 2
    assert "learned from" in printed and "give the same data" in printed
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path, corpus, run_script):
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    flags = ["--data", corpus, "--data-dir", tmp_path / "data", "--run", tmp_path, *TINY]
    code, printed = run_script(train_mlm, *flags)
    assert code == 2
    assert "holds other files, such as" in printed
    assert "delete" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
