"""The masked language model end to end, on a corpus of a few kilobytes."""

import copy
import csv
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import train_mlm
from conftest import TINY, story
from minissl import UserError, datasets, documents, evaluation, files, runs, training, transformer
from minissl.muon import Muon
from minissl.tokenizer import MASK
from soak import log_of


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_leaves_a_folder_with_all_that_is_promised(trained):
    assert {"config.json", "metrics.csv", "checkpoint.pt", "report.html", "sentences.json"} <= {
        p.name for p in trained.iterdir()}
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["steps"] == 90 and "train_mlm.py" in config["command"]
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http" not in page.replace(config["command"], "")


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(corpus, tmp_path, run_script, trained):
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY]
    assert run_script(train_mlm, *flags, "--run", tmp_path / "b")[0] == 0
    assert run_script(train_mlm, *flags, "--run", tmp_path / "c", "--seed", 1)[0] == 0
    first = files.load_checkpoint(trained)["model"]
    assert_equal_states(first, files.load_checkpoint(tmp_path / "b")["model"])
    assert not torch.equal(first["token_embedding.weight"],
                           files.load_checkpoint(tmp_path / "c")["model"]["token_embedding.weight"])


def test_how_often_one_looks_does_not_change_what_is_learned(corpus, tmp_path, run_script, trained):
    run_script(train_mlm, "--data", corpus, "--data-dir", tmp_path, *TINY, "--evaluate-every", 7,
               "--run", tmp_path / "b")
    assert_equal_states(files.load_checkpoint(trained)["model"], files.load_checkpoint(tmp_path / "b")["model"])


def test_the_time_left_is_that_of_the_stage(corpus, tmp_path, run_script):
    """A step of the second stage takes several times as long: the first says nothing about it."""
    _, printed = run_script(train_mlm, "--data", corpus, "--data-dir", tmp_path, *TINY,
                            "--run", tmp_path / "b", "--steps", 40)
    last = {line.split()[1]: line.endswith("min left of the first stage")
            for line in printed.splitlines() if line.startswith("step ")}
    assert last == {"1/40": True, "30/40": True, "40/40": False}


@pytest.mark.parametrize("at", [20, 60])           # in the first stage, in the second
def test_a_stopped_and_resumed_run_ends_as_one_that_was_never_stopped(at, corpus, tmp_path, run_script, trained,
                                                                      monkeypatch):
    log = training.Run.count

    def stop_at(self, *arguments, **options):
        log(self, *arguments, **options)
        self.calls = getattr(self, "calls", 0) + 1
        self.stopping = self.stopping or self.calls == at
    monkeypatch.setattr(training.Run, "count", stop_at)
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--run", tmp_path / "b"]
    code, printed = run_script(train_mlm, *flags)
    assert code == 130 and "--resume" in printed
    monkeypatch.setattr(training.Run, "count", log)
    assert run_script(train_mlm, "--run", tmp_path / "b", "--resume")[0] == 0       # all else as the run was started
    assert log_of(tmp_path / "b") == log_of(trained)    # the losses too: no step's is counted twice or left out
    a, b = files.load_checkpoint(trained), files.load_checkpoint(tmp_path / "b")
    assert_equal_states(a["model"], b["model"])
    for one, other in zip(a["optimizers"], b["optimizers"]):
        for key in one["state"]:
            assert_equal_states(one["state"][key], other["state"][key])


def test_metrics_have_no_gap_and_no_row_twice_after_a_resumption(corpus, tmp_path, run_script):
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--run", tmp_path / "b"]
    run_script(train_mlm, *flags, "--steps", 60)
    assert run_script(train_mlm, *flags, "--steps", 90, "--resume")[0] == 0
    with open(tmp_path / "b" / "metrics.csv", encoding="utf-8", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 30, 60, 90]
    assert "<code>steps=90</code>" in (tmp_path / "b" / "report.html").read_text(encoding="utf-8")


def test_no_weight_depends_on_texts_that_are_held_out_or_for_the_test(corpus, tmp_path, run_script, monkeypatch):
    load = train_mlm.load_texts

    def changed(*arguments):
        texts = load(*arguments)
        texts.tokens = np.array(texts.tokens)
        for i in np.flatnonzero(texts.split != datasets.TRAIN):
            texts.tokens[texts.starts[i]:texts.starts[i] + texts.lengths[i]] = 77
        return texts
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--steps", 35]
    assert run_script(train_mlm, *flags, "--run", tmp_path / "a")[0] == 0
    monkeypatch.setattr(train_mlm, "load_texts", changed)
    assert run_script(train_mlm, *flags, "--run", tmp_path / "b")[0] == 0
    assert_equal_states(*(files.load_checkpoint(tmp_path / run)["model"] for run in "ab"))


@pytest.mark.parametrize("window", [32, 1200])
def test_windows_are_as_long_as_asked_where_the_text_is_long_enough(window, tmp_path, run_script, monkeypatch):
    (tmp_path / "long.txt").write_text(story("sea", 0, 1000).replace("\n", " "), encoding="utf-8")
    found = []

    def windows(*arguments, **more):
        found.append(datasets.Windows(*arguments, **more))
        raise UserError("enough")

    monkeypatch.setattr(train_mlm, "Windows", windows)
    run_script(train_mlm, "--data", tmp_path / "long.txt", "--data-dir", tmp_path, "--run", tmp_path / "run", *TINY,
               "--window", window, "--batch-size", 1)
    assert found[0].sizes.max() == window and found[0].texts.lengths.max() <= max(1024, 4 * window)


def test_no_draw_of_a_run_is_used_twice(corpus, tmp_path, run_script, monkeypatch):
    made, generator = [], training.generator
    for module in (train_mlm, training, datasets):
        monkeypatch.setattr(module, "generator", lambda *key: made.append(key) or generator(*key))
    assert run_script(train_mlm, "--data", corpus, "--data-dir", tmp_path, *TINY, "--steps", 40,
                      "--run", tmp_path / "run")[0] == 0
    assert ({purpose for _, purpose, _ in made} == {"document order", "coin", "windows", "mask"}
            and len(set(made)) == len(made))


def test_rates_fall_to_nothing_in_each_stage_and_each_kind_of_parameter_has_its_own(corpus, tmp_path, run_script,
                                                                                    monkeypatch):
    rates = {Muon: [], torch.optim.Adam: []}
    for optimizer in rates:
        monkeypatch.setattr(optimizer, "step", lambda self, optimizer=optimizer: rates[optimizer].append(
            [g["lr"] for g in self.param_groups]))
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--steps", 240, "--embedding-steps", 40,
             "--evaluate-every", 240]
    assert run_script(train_mlm, *flags, "--run", tmp_path / "run")[0] == 0
    first = [0.02 * 0.5 * min((step + 1) / 20, 1 - step / 40) for step in range(40)]
    second = [0.02 * min((step + 1) / 100, (200 - step) / 100) for step in range(200)]
    assert rates[Muon][40:] == pytest.approx(np.array(second)[:, None])    # before, the blocks have no gradient
    assert rates[torch.optim.Adam][:40] == pytest.approx(np.array([first, first]).T)                # embeddings, heads
    assert rates[torch.optim.Adam][40:] == pytest.approx(np.outer(second, [0.05, 0.15]))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_of_a_step_is_that_of_the_two_formulas_one_document_at_a_time(stage, tmp_path, run_script,
                                                                                   monkeypatch):
    (tmp_path / "texts").mkdir()
    for n in range(40):                                                # of many lengths
        (tmp_path / "texts" / f"{n:02}.txt").write_text(story("sea", n, sentences=1 + n % 13), encoding="utf-8")
    flags = ["--data", str(tmp_path / "texts"), "--data-dir", str(tmp_path / "data"), *TINY,
             "--run", str(tmp_path / "run"), "--steps", "1",
             *(["--masked-weight", "0", "--embedding-steps", "1"] if stage == 1 else
               "--embedding-steps 0 --window 512 --batch-size 2 --masked-weight 1.5 --document-weight 2.5".split())]
    pools, made = [], []

    def random_model(model, counts, start=transformer.TextEncoder.start_at):    # zeros would hide what they multiply
        weights = start(model, counts)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape,
                                                generator=training.generator(0, "test", parameter.numel()))
        model.pair_embedding.weight.data[-1] = 0                       # "no pair" is no parameter
        made.append((copy.deepcopy(model), weights, model))
        return weights

    monkeypatch.setattr(transformer.TextEncoder, "start_at", random_model)
    monkeypatch.setattr(train_mlm, "WholeTexts",
                        lambda pool, *settings: pools.append(pool) or datasets.WholeTexts(pool, *settings))
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: None)    # the step's gradients are kept
    code, printed = run_script(train_mlm, *flags)
    assert code == 0, printed
    (pool,), ((model, weights, trained),) = pools, made
    loss = 0.0

    def document_term(seen, unseen):
        """seen (T, D), vectors; unseen (n,), tokens -> −Σ_w q_w log softmax(W z + c)[w]"""
        z = transformer.norm(seen[:, :model.document_columns].mean(0))
        bag = model.count_terms(unseen, 0, 1)[0] * weights
        return -(bag / bag.sum() * model.term_head(z).log_softmax(0)).sum()

    if stage == 1:
        read, unread, owner, B = datasets.WholeTexts(pool, 8 * 8, 0)(0)
        for row in range(B):
            tokens = read[owner == row]
            vectors = model.token_embedding(tokens) + model.pair_embedding(model.pair_ids(tokens))
            loss = loss + document_term(vectors[tokens > 0], unread[owner == row]) / B
    else:
        tokens, lengths, rest, owner = datasets.Windows(pool, 512, 2, 0, rest=True)(0)
        assert lengths.min() < lengths.max()                           # there is padding
        inputs, positions, targets = transformer.mask_tokens(tokens, lengths, len(model.token_bias), 0.15,
                                                             training.generator(0, "mask", 0))
        for row in range(len(tokens)):
            x = model(inputs[row:row + 1, :lengths[row]])[0]           # (T, D), alone
            here = positions // tokens.shape[1] == row
            logits = model.token_logits(x[positions[here] % tokens.shape[1]])
            masked = -logits.log_softmax(1)[torch.arange(len(logits)), targets[here]].sum() / len(targets)
            loss = loss + 1.5 * masked + 2.5 * document_term(x, rest[owner == row]) / len(tokens)
    loss.backward()
    found = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    learns = {"token_embedding", "pair_embedding", "term_head"} if stage == 1 else {""}
    assert found.keys() == {name for name, _ in model.named_parameters() if name.startswith(tuple(learns))}
    for name, gradient in found.items():
        wanted = dict(model.named_parameters())[name].grad
        assert gradient.norm() > 0, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()),
                                   msg=lambda text: f"{name}: {text}")


def test_gradient_accumulation_does_not_change_the_gradient(corpus, tmp_path, run_script):
    for parts in (1, 3):
        flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--run", tmp_path / str(parts)]
        run_script(train_mlm, *flags, "--steps", 31, "--gradient-accumulation", parts)
    # After one step of the second stage Muon's momentum is the gradient: sums in another order.
    one, other = (files.load_checkpoint(tmp_path / parts)["optimizers"][1]["state"] for parts in ("1", "3"))
    for key in one:
        torch.testing.assert_close(one[key]["momentum"], other[key]["momentum"], rtol=1e-3, atol=1e-6)


def test_where_no_text_is_left_to_be_held_out_it_is_said(corpus, tmp_path, run_script):
    (tmp_path / "books").mkdir()
    for name, part in (("a", "city"), ("b", "sea")):
        text = " ".join(path.read_text(encoding="utf-8") for path in sorted((corpus / part).iterdir()))
        (tmp_path / "books" / f"{name}.txt").write_text(text, encoding="utf-8")
    code, printed = run_script(train_mlm, "--data", tmp_path / "books", "--data-dir", tmp_path, *TINY,
                               "--run", tmp_path / "b", "--steps", 31)
    assert code == 0 and "the held-out loss below is of texts that are trained on" in printed, printed


def test_the_masked_loss_falls_well_below_the_entropy_of_single_words(corpus, tmp_path, run_script):
    flags = ["--data", corpus, "--data-dir", tmp_path, *TINY, "--run", tmp_path / "b", "--steps", 500,
             "--evaluate-every", 250]
    assert run_script(train_mlm, *flags)[0] == 0
    texts = documents.load_texts(str(corpus), tmp_path, 400)
    share = np.bincount(texts.tokens) / len(texts.tokens)
    entropy = -sum(p * np.log(p) for p in share if p)
    with open(tmp_path / "b" / "metrics.csv", encoding="utf-8", newline="") as file:
        held_out = float(list(csv.DictReader(file))[-1]["held_out"])
    assert held_out < 0.6 * entropy, (held_out, entropy)


def test_a_model_that_knows_nothing_has_the_bits_per_byte_of_a_guess(corpus, tmp_path):
    texts = documents.load_texts(str(corpus), tmp_path, 400)
    look = evaluation.MaskedText(texts, 32, 0.15, tmp_path, nullcontext(), "cpu")
    look.labelled = None

    class Blank:
        def __call__(self, tokens, lengths):
            return torch.zeros(*tokens.shape, 1)

        def token_logits(self, x):
            return torch.zeros(len(x), 400)
    result = look(Blank())
    size = sum(len(texts.tokenizer.bytes_of[token]) for token in look.targets.tolist())
    assert size > 1.5 * len(look.targets) and result["held_out"] == pytest.approx(np.log(400), abs=1e-3)
    assert result["bits_per_byte"] == pytest.approx(np.log2(400) * len(look.targets) / size, abs=1e-3)


def test_the_passages_show_what_the_model_puts_beside_what_stood_there(corpus, tmp_path):
    texts = documents.load_texts(str(corpus), tmp_path, 400)
    look = evaluation.MaskedText(texts, 32, 0.15, tmp_path, nullcontext(), "cpu")
    ship = int(texts.tokenizer.encode("ship")[0])
    assert [set(part.split) for part in look.labelled] == [{datasets.TRAIN}, {datasets.HELD_OUT}]
    passages = look.passages(torch.full_like(look.targets, ship))
    assert len(passages) > 3 and {guess for _, _, got in passages for guess in got} == {texts.tokenizer.decode([ship])}
    assert len({word for _, wanted, _ in passages for word in wanted}) > 5
    assert all(text.count("[MASK]") == len(wanted) == len(got) for text, wanted, got in passages)


def test_fill_answers_for_each_mask_and_refuses_a_text_without_one(trained, run_script):
    code, printed = run_script(train_mlm, "--run", trained, "--fill", "The ship [MASK] and the [MASK], wait[MASK]")
    model, checkpoint = runs.load_run(trained)
    tokenizer = runs.tokenizer_of(checkpoint)
    pieces = [tokenizer.encode("the ship"), [MASK], tokenizer.encode("and the"), [MASK],
              tokenizer.encode(", wait", leading_space=False), [MASK]]
    ids = [int(token) for piece in pieces for token in piece]
    with torch.no_grad():
        chances = model.token_logits(model(torch.tensor([ids]))[0]).softmax(1)
    assert code == 0 and printed.count("[MASK] ") == 3
    for n, place in enumerate(i for i, token in enumerate(ids) if token == MASK):
        best = chances[place].topk(5)
        answers = ", ".join(f"{tokenizer.decode([int(i)])} {p:.2f}" for p, i in zip(*best))
        assert f"[MASK] {n + 1}: " + answers in printed
    code, printed = run_script(train_mlm, "--run", trained, "--fill", "no mask here")
    assert code == 2 and "at least one [MASK]" in printed


def test_fill_refuses_what_is_longer_than_the_window_and_a_run_that_learned_from_images(trained, monkeypatch):
    with pytest.raises(UserError, match="1 .MASK. and 41 tokens; .* at most 32 tokens"):
        runs.fill(trained, 20 * "the ship " + "[MASK]")
    monkeypatch.setattr(runs, "load_run", lambda run: (None, dict(method="autoencoder")))
    with pytest.raises(UserError, match="learned from images"):
        runs.fill(trained, "a [MASK]")


@pytest.mark.parametrize("flags", [["--masked-weight", "0"], ["--document-weight", "0"], ["--layers", "0"]])
def test_each_term_and_the_embeddings_can_learn_alone(flags, corpus, tmp_path, run_script):
    code, printed = run_script(train_mlm, "--data", corpus, "--data-dir", tmp_path, *TINY, *flags,
                               "--run", tmp_path / "b")
    assert code == 0, printed


@pytest.mark.parametrize("flags, sentence", [
    (["--stepz", "3"], "unrecognized arguments"), (["--steps", "many"], "invalid int value"),
    (["--steps", "0"], "--steps 0: must be at least 1"), (["--mask-share", "nan"], "must be at least"),
    (["--device", "tpu"], "invalid choice"), (["--heads", "3"], "multiple of twice the --heads"),
    (["--embedding-steps", "90"], "at most 89 of --steps 90"),
    (["--embedding-steps", "91", "--masked-weight", "0"], "at most 90 of --steps 90"),
    (["--masked-weight", "0", "--document-weight", "0"], "nothing is left to learn"),
    (["--data", "not/there"], "there is nothing there"), (["--batch-size", "9999"], "a step needs"),
    (["--resume"], "there is no such file")])
def test_a_wrong_setting_gets_one_sentence_and_exit_code_2(flags, sentence, corpus, tmp_path, run_script):
    code, printed = run_script(train_mlm, "--data", corpus, "--data-dir", tmp_path, "--run", tmp_path / "b",
                               *TINY, *flags)
    assert code == 2 and sentence in printed.splitlines()[-1] and "Traceback" not in printed
    assert not (tmp_path / "b").exists()       # nothing half-made: the corrected command must find the place free


def test_a_run_is_never_overwritten_or_resumed_with_other_settings(trained, corpus, run_script):
    flags = ["--data", corpus, "--data-dir", trained.parent / "data", *TINY, "--run", trained]
    before = (trained / "checkpoint.pt").read_bytes()
    code, printed = run_script(train_mlm, *flags)
    assert code == 2 and "holds a run already" in printed
    code, printed = run_script(train_mlm, *flags, "--resume", "--width", 64)
    assert code == 2 and "--width 64" in printed and "32" in printed
    code, printed = run_script(train_mlm, *flags, "--resume", "--steps", 50)
    assert code == 2 and "has made 90" in printed
    (corpus / "sea" / "one_more.txt").write_text("The tide turns.", encoding="utf-8")
    code, printed = run_script(train_mlm, "--resume", "--run", trained)
    (corpus / "sea" / "one_more.txt").unlink()
    assert code == 2 and "learned from" in printed and "the same data" in printed
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_a_run_goes_on_with_the_same_texts_at_another_place(corpus, run_script, tmp_path):
    flags = ["--data-dir", tmp_path, "--run", tmp_path / "run", *TINY, "--embedding-steps", 10, "--steps"]
    assert run_script(train_mlm, "--data", corpus, *flags, 12)[0] == 0
    corpus_elsewhere = shutil.copytree(corpus, tmp_path / "elsewhere")
    code, printed = run_script(train_mlm, "--data", corpus_elsewhere, *flags, 14, "--resume")
    assert code == 0 and "12 of 14 steps are made" in printed, printed


def test_a_run_folder_with_something_else_in_it_is_refused(tmp_path, corpus, run_script):
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    code, printed = run_script(train_mlm, "--data", corpus, "--data-dir", tmp_path / "d", "--run", tmp_path, *TINY)
    assert code == 2 and "holds something that is no run" in printed and "delete" not in printed


def test_a_diverging_run_stops_with_a_sentence_and_keeps_the_last_good_checkpoint(trained, tmp_path):
    model, _ = runs.load_run(trained)
    run = object.__new__(training.Run)
    run.folder, run.model = tmp_path, model
    with torch.no_grad():
        model.token_bias[3] = float("nan")
    with pytest.raises(training.UserError, match="not finite at step 7"):
        run.save(7)
    assert not list(tmp_path.iterdir())
