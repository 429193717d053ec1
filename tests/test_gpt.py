"""The example of next-token prediction: the mask does not leak, and the loss is right."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpt
import gpt_baselines
import numpy as np
import pytest
import torch
from conftest import assert_equal_states, log_of, read_log, stopped_at, story

import finetune
import train_mlm
from minissl.data.batches import Windows
from minissl.data.texts import encode_texts
from minissl.evaluation import load
from minissl.tokenizer import MASK, PAD, train_tokenizer
from minissl.training.files import load_checkpoint, write_checkpoint
from minissl.training.machine import AttentionByHand, speed_up_on_cpu
from minissl.transformer import IGNORE_INDEX, TextEncoder, norm


ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--steps 200 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 --pairs 100 "
    "--vocabulary-size 400 --evaluate-every 100 --device cpu --precision float32"
).split()
V, D, T = 60, 16, 12


def causal_model(layers=2):
    """A causal TextEncoder whose blocks and pairs are not zero."""
    torch.manual_seed(0)
    pairs = torch.arange(2 * V, 30 * V, 7)
    model = TextEncoder(V, pairs, D, layers, heads=2, window=T, document_columns=D, causal=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_tokens(rows=3, columns=T, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(2, V, (rows, columns), generator=draws)


def tokens_of_stories(window):
    """Texts of many lengths, of at most three windows each."""
    stories = [story("sea", n) for n in range(20)] + [story("city", n, 1) for n in range(20)]
    tokenizer = train_tokenizer(stories, 400)
    return encode_texts(stories, tokenizer).split_long(3 * window)


def sampling(**changes):
    return SimpleNamespace(**{**dict(seed=0, temperature=0.7, top_k=40), **changes})


# ---------------------------------------------------------------- the mask

def logits_of(model, tokens, dtype):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        return model.token_logits(model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_a_token_changes_no_logit_before_it(dtype):
    model = speed_up_on_cpu(causal_model())
    tokens = random_tokens()
    before = logits_of(model, tokens, dtype)
    for t in range(T):
        changed = tokens.clone()
        changed[:, t] = 2 + (changed[:, t] + 5) % (V - 2)
        after = logits_of(model, changed, dtype)
        assert torch.equal(before[:, :t], after[:, :t]), t
        assert not torch.equal(before[:, t], after[:, t]), t


def test_no_gradient_flows_from_a_logit_to_a_later_token():
    model = causal_model()
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.token_embedding.register_forward_hook(keep)
    model.pair_embedding.register_forward_hook(keep)
    for t in range(T):
        embedded.clear()
        model.token_logits(model(random_tokens())[:, t]).sum().backward()
        for vectors in embedded:
            assert vectors.grad[:, t + 1:].eq(0).all()
            assert vectors.grad[:, :t + 1].ne(0).any(2).all()


def test_padding_changes_no_real_logit():
    model = causal_model()
    tokens = random_tokens()
    padded = tokens.clone()
    padded[:, 7:] = PAD
    short = logits_of(model, tokens[:, :7], torch.float32)
    long = logits_of(model, padded, torch.float32)[:, :7]
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)


def test_both_ways_to_compute_attention_agree():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, T, 8).bfloat16()
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    model = causal_model()
    plain = model.blocks[0].attention.attend(q.float(), k.float(), v.float(), visible)
    speed_up_on_cpu(model)
    assert type(model.blocks[0].attention) is AttentionByHand
    by_hand = model.blocks[0].attention.attend(q, k, v, visible)
    torch.testing.assert_close(by_hand.float(), plain, rtol=0.05, atol=0.05)


def test_a_masked_model_still_sees_what_follows():
    torch.manual_seed(0)
    model = TextEncoder(V, torch.arange(2), D, heads=2, window=T)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = random_tokens()
    before = logits_of(model, tokens, torch.float32)
    tokens[:, -1] = 2 + (tokens[:, -1] + 5) % (V - 2)
    assert not torch.equal(before[:, 0], logits_of(model, tokens, torch.float32)[:, 0])


# ---------------------------------------------------------------- targets

def test_targets_are_shifted_by_one_and_padding_has_none():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, PAD, PAD]])
    inputs, targets = gpt.shift(tokens, torch.tensor([4, 2]))
    assert inputs.tolist() == [[5, 6, 7], [5, 6, PAD]]
    assert targets.tolist() == [[6, 7, 8], [6, IGNORE_INDEX, IGNORE_INDEX]]


def test_no_document_reads_into_the_next():
    window = 16
    texts = tokens_of_stories(window)
    # Each token becomes its position, so a pair shows whether the two are neighbours.
    texts.tokens = np.arange(2, 2 + len(texts.tokens))
    last_tokens = set((texts.starts + texts.lengths + 1).tolist())
    batches = Windows(texts, window + 1, 4, seed=0, leave_rest=False)
    for step in range(2 * batches.batches):
        tokens, lengths, _ = batches(step)
        inputs, targets = gpt.shift(tokens, lengths)
        is_target = targets != IGNORE_INDEX
        assert (targets[is_target] == inputs[is_target] + 1).all()
        assert not last_tokens & set(inputs[is_target].tolist())
        assert is_target.sum() == (lengths - 1).sum()


# ---------------------------------------------------------------- the loss

def loss_by_loops(logits, targets):
    """The mean of −log softmax over all targets that are not −100, by loops in numpy."""
    losses = []
    for row, row_targets in zip(logits, targets):
        for z, target in zip(row, row_targets):
            if target != IGNORE_INDEX:
                z = z - z.max()
                losses.append(math.log(np.exp(z).sum()) - z[target])
    return sum(losses) / len(losses)


def example():
    model = causal_model().double()
    tokens = random_tokens(columns=T)
    lengths = torch.tensor([T, 5, 2])
    tokens[1, 5:] = PAD
    tokens[2, 2:] = PAD
    return model, *gpt.shift(tokens, lengths)


def test_the_loss_equals_a_loop():
    model, inputs, targets = example()
    count = (targets != IGNORE_INDEX).sum()
    loss = gpt.next_token_loss(model, inputs, targets, count)
    with torch.no_grad():
        logits = model.token_logits(model(inputs)).numpy()
    assert count == T - 1 + 4 + 1
    assert loss.item() == pytest.approx(loss_by_loops(logits, targets.numpy()), rel=1e-6)


def test_the_gradient_equals_differences_of_the_loop():
    model, inputs, targets = example()
    bias = model.token_bias
    count = (targets != IGNORE_INDEX).sum()
    gpt.next_token_loss(model, inputs, targets, count).backward()
    step = 1e-5
    for parameter in (bias, model.token_embedding.weight, model.blocks[0].up.weight):
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), len(flat) // 10):
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                with torch.no_grad():
                    logits = model.token_logits(model(inputs)).numpy()
                values.append(loss_by_loops(logits, targets.numpy()))
                flat[index] -= sign * step
            difference = (values[0] - values[1]) / (2 * step)
            gradient = parameter.grad.view(-1)[index].item()
            assert gradient == pytest.approx(difference, rel=1e-3, abs=1e-6)


def test_the_loss_of_a_guess_is_ln_v():
    model, inputs, targets = example()
    torch.nn.init.zeros_(model.token_embedding.weight)
    torch.nn.init.zeros_(model.token_bias)
    count = (targets != IGNORE_INDEX).sum()
    loss = gpt.next_token_loss(model, inputs, targets, count)
    assert loss.item() == pytest.approx(math.log(V))


# ---------------------------------------------------------------- baselines

def test_the_bigram_model_is_a_distribution():
    left, right = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 2, 0, 1])
    every = np.arange(4)
    for a in every:                       # 3 was never on the left
        total = 0
        for b in every:
            loss = gpt_baselines.bigram_loss(left, right, np.array([a]), np.array([b]), 4, 0.7)
            total += math.exp(-loss)
        assert total == pytest.approx(1)


def test_the_bigram_model_equals_a_calculation_by_hand():
    left, right = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 2, 0, 1])
    # c(0, 1) = 2 and c(0) = 3. Two tokens follow 0. Of 4 pairs, two end in 1.
    expected = (2 - 0.5) / 3 + 0.5 * 2 / 3 * (2 + 1) / (4 + 4)
    loss = gpt_baselines.bigram_loss(left, right, np.array([0]), np.array([1]), 4, 0.5)
    assert math.exp(-loss) == pytest.approx(expected)
    loss = gpt_baselines.unigram_loss(right, np.array([1]), 4)
    assert math.exp(-loss) == pytest.approx((3 + 1) / (5 + 4))


def test_bigrams_do_not_cross_the_border_of_two_texts():
    texts = tokens_of_stories(16)
    left, right = gpt_baselines.neighbours(texts)
    assert len(left) == (texts.lengths - 1).sum()
    assert left[:3].tolist() == texts[0][:3].tolist()
    assert right[:3].tolist() == texts[0][1:4].tolist()


# ---------------------------------------------------------------- samples

def test_a_sample_at_temperature_0_is_the_argmax():
    model = causal_model()
    start = [5, 9, 11]
    tokens = gpt.sample(model, start, T - 3, sampling(temperature=0))
    logits = logits_of(model, torch.tensor([tokens]), torch.float32)[0]
    logits[:, [PAD, MASK]] = -math.inf
    assert tokens[:3] == start
    assert tokens[3:] == logits.argmax(1)[2:-1].tolist()


def test_samples_take_the_likeliest_k_by_their_chances():
    model = causal_model()
    logits = logits_of(model, torch.tensor([[5, 9]]), torch.float32)[0, -1]
    logits[[PAD, MASK]] = -math.inf
    best = logits.topk(3)
    expected = (best.values / 0.1).softmax(0)              # 0.50, 0.45, 0.06
    drawn = []
    for seed in range(600):
        settings = sampling(seed=seed, temperature=0.1, top_k=3)
        drawn.append(gpt.sample(model, [5, 9], 1, settings)[-1])
    shares = [drawn.count(token) / 600 for token in best.indices.tolist()]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(expected.tolist(), abs=0.07)


def test_a_sample_longer_than_the_window_sees_the_last_tokens():
    model = causal_model()
    settings = sampling(temperature=0)
    tokens = random_tokens(1, 2 * T)[0].tolist()
    whole = gpt.sample(model, tokens, 1, settings)
    end = gpt.sample(model, tokens[-T:], 1, settings)
    assert whole[-1] == end[-1]


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def run_of_gpt(corpus, tmp_path_factory):
    """The folder of a finished tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("gpt")
    command = [sys.executable, ROOT / "examples" / "gpt.py", "--data", corpus]
    command += ["--data-dir", folder / "data", "--run", folder / "run", *SMALL]
    command = [str(part) for part in command]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder / "run", ended.stdout


def test_a_short_run_learns_more_than_bigrams(run_of_gpt):
    folder, printed = run_of_gpt
    rows = read_log(folder)
    last = printed.splitlines()[-1]
    result = dict(part.split("=") for part in last.removeprefix("result: ").split())
    assert last.startswith("result: held_out=")
    assert result["bits_per_byte"] == rows[-1]["bits_per_byte"]
    assert float(result["bigram"]) < float(result["unigram"])
    assert float(result["bits_per_byte"]) < float(result["bigram"])


def test_at_the_start_the_loss_is_the_unigram_entropy(
    corpus, run_of_gpt, run_script, tmp_path
):
    folder, _ = run_of_gpt
    arguments = ["--data", corpus, "--data-dir", folder.parent / "data", *SMALL]
    arguments += ["--run", tmp_path / "run", "--steps", 1, "--width", 128]
    code, printed = run_script(gpt, *arguments)
    assert code == 0, printed
    row, = read_log(tmp_path / "run")
    assert float(row["bits_per_byte"]) == pytest.approx(float(row["unigram"]), rel=0.03)


def test_a_stopped_run_resumes_bit_for_bit(corpus, run_of_gpt, run_script, tmp_path):
    whole, _ = run_of_gpt
    data = ["--data", corpus, "--data-dir", whole.parent / "data"]
    with stopped_at(20):
        code, printed = run_script(gpt, *data, "--run", tmp_path / "run", *SMALL)
    assert code == 130, printed
    code, printed = run_script(gpt, "--run", tmp_path / "run", "--resume")
    assert code == 0, printed
    one, other = load_checkpoint(whole), load_checkpoint(tmp_path / "run")
    assert_equal_states(one["model"], other["model"])
    assert log_of(whole) == log_of(tmp_path / "run")


def test_a_run_of_another_version_is_not_called_another_scripts(run_of_gpt, run_script, tmp_path):
    folder, _ = run_of_gpt
    checkpoint = load_checkpoint(folder)
    del checkpoint["settings"]["top_k"]                       # a setting that came later
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run" / "checkpoint.pt", checkpoint)
    code, printed = run_script(gpt, "--run", tmp_path / "run", "--resume")
    assert code == 2 and "another version of gpt.py, which differs in --top-k" in printed, printed
    code, printed = run_script(train_mlm, "--run", folder, "--resume")
    assert code == 2 and "was made by gpt.py: resume it with that one" in printed, printed


def test_it_says_how_the_texts_were_made(run_of_gpt):
    _, printed = run_of_gpt
    assert "data: classes: city, sea\n" in printed


def test_finetune_reads_the_run(run_of_gpt, run_script):
    folder, _ = run_of_gpt
    code, printed = run_script(finetune, folder, "--probe", "--labels", 5, "--seeds", 1)
    assert code == 0, printed
    assert float(printed.split("linear probe ")[1].split()[0]) > 80


def test_the_last_token_can_be_the_features(run_of_gpt, run_script, monkeypatch):
    folder, _ = run_of_gpt
    mean = load.load_encoder(folder)(["the ship sails"])
    monkeypatch.setitem(load.MODELS, "gpt", gpt.LastTokenEncoder)
    last = load.load_encoder(folder)(["the ship sails"])
    model, checkpoint = load.load_run(folder)
    tokens = load.tokenizer_of(checkpoint, folder).encode("the ship sails")
    x = model(torch.from_numpy(tokens.astype(np.int64))[None])[0]
    x = x.detach()
    torch.testing.assert_close(torch.as_tensor(last)[0], norm(x[-1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.as_tensor(mean)[0], norm(x.mean(0)), atol=1e-4, rtol=1e-4)


def test_the_word_last_measures_the_last_tokens(corpus, run_of_gpt, monkeypatch, tmp_path):
    folder, _ = run_of_gpt
    command = [sys.executable, ROOT / "examples" / "gpt.py", "last", folder, "--data", corpus]
    command += ["--features", tmp_path / "last.npy", "--limit", 3]
    command += ["--device", "cpu", "--precision", "float32"]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setitem(load.MODELS, "gpt", gpt.LastTokenEncoder)
    strings = [story("city", n) for n in range(3)]
    expected = load.load_encoder(folder)(strings)
    np.testing.assert_allclose(np.load(tmp_path / "last.npy"), expected, atol=1e-4)


def test_a_prompt_is_continued(run_of_gpt, run_script):
    folder, _ = run_of_gpt
    code, printed = run_script(gpt, "--run", folder, "--prompt", "The ship", "--temperature", 0)
    assert code == 0, printed
    assert printed.startswith("the ship sails")


def test_a_prompt_needs_a_causal_run(trained, run_script):
    code, printed = run_script(gpt, "--run", trained, "--prompt", "The ship")
    assert code == 2
    assert "is no run of gpt.py; give one with --run" in printed


def test_a_causal_run_fills_in_no_mask(run_of_gpt, run_script):
    folder, _ = run_of_gpt
    code, printed = run_script(train_mlm, "--run", folder, "--fill", "the [MASK] turns")
    assert code == 2 and "continues texts: give it a --prompt" in printed, printed
