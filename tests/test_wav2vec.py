"""The speech example: its loss, its masks, its codes, its recordings, and a whole run."""

import math
import subprocess
import sys
import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import wav2vec
import wav2vec_baselines as baselines
import wav2vec_data
from conftest import assert_resumes_exactly, read_log

from minissl import UserError
from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.training import distributed


ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--takes 6 --steps 16 --evaluate-every 8 --batch-size 8 --labels 5 --draws 2 "
    "--device cpu --precision float32"
).split()


def numbers(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def small_model():
    """A model whose blocks are not zero."""
    torch.manual_seed(0)
    model = wav2vec.Wav2Vec(width=16, layers=2, heads=2, V=8, columns=4)
    for block in model.blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def noise(seconds=0.4, seed=0):
    draws = np.random.default_rng(seed)
    return wav2vec_data.normalize(draws.normal(size=int(seconds * 8000)))


# ---------------------------------------------------------------- the loss

def loss_by_loops(c, q, distractors, temperature):
    """The mean of −log softmax of the cosine with the own target, frame by frame."""
    losses, hits = [], []
    for i in range(len(c)):
        s = []
        for j in [i, *distractors[i]]:
            cosine = (c[i] * q[j]).sum() / math.sqrt((c[i]**2).sum() * (q[j]**2).sum())
            s.append(cosine / temperature)
        losses.append(math.log(sum(math.exp(x) for x in s)) - s[0])
        hits.append(s[0] > max(s[1:]))
    return np.mean(losses), np.mean(hits)


def test_the_loss_equals_loops_by_value_and_gradient():
    torch.manual_seed(0)
    c, q = torch.randn(2, 7, 5, dtype=torch.float64)
    distractors = torch.tensor([[(i + k) % 7 for k in (1, 3, 3)] for i in range(7)])
    c.requires_grad_()
    q.requires_grad_()
    every = torch.ones(7, dtype=torch.bool)
    loss, accuracy = wav2vec.contrastive_loss(c, q, distractors, every, 0.5)
    loss.backward()
    values = [c.detach().numpy().copy(), q.detach().numpy().copy()]
    expected = loss_by_loops(*values, distractors.tolist(), 0.5)
    assert (loss.item(), accuracy.item()) == pytest.approx(expected, rel=1e-6)
    for tensor, array in zip((c, q), values):
        for place in np.ndindex(array.shape):
            around = []
            for change in (1e-6, -1e-6):
                array[place] += change
                around.append(loss_by_loops(*values, distractors.tolist(), 0.5)[0])
                array[place] -= change
            slope = (around[0] - around[1]) / 2e-6
            assert tensor.grad[place].item() == pytest.approx(slope, abs=1e-7)


def test_a_guess_has_the_loss_ln_k_plus_1():
    distractors = numbers(9, 5).argsort(1)
    loss, accuracy = wav2vec.contrastive_loss(
        torch.ones(9, 4), torch.ones(9, 4), distractors, torch.ones(9, dtype=torch.bool)
    )
    assert loss.item() == pytest.approx(math.log(6))
    assert accuracy.item() == 0              # a tie is no success


def test_distractors_are_of_the_same_recording_and_have_another_code():
    masked = torch.zeros(3, 20, dtype=torch.bool)
    masked[0, :9] = masked[1, 4:16] = masked[2, 10:] = True
    recording = masked.nonzero()[:, 0]
    codes = (numbers(len(recording), 2) * 3).long()
    draws = numbers(len(recording), 400)
    distractors, has_any = wav2vec.choose_distractors(codes, masked, draws)
    assert has_any.all()
    for i, row in enumerate(distractors.tolist()):
        allowed = set()
        for j in range(len(codes)):
            if recording[j] == recording[i] and codes[j].tolist() != codes[i].tolist():
                allowed.add(j)
        assert set(row) == allowed           # each of them is drawn, and no other


def test_a_collapsed_codebook_does_not_look_like_success():
    """Without distractors, a softmax over the own target alone would have the loss 0."""
    masked = torch.ones(2, 6, dtype=torch.bool)
    codes = torch.zeros(12, 2, dtype=torch.int64)
    distractors = wav2vec.choose_distractors(codes, masked, numbers(12, 15))
    c = torch.randn(12, 4, requires_grad=True)
    loss, accuracy = wav2vec.contrastive_loss(c, c.detach(), *distractors)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(16))
    assert accuracy.item() == pytest.approx(1 / 16)
    assert c.grad.eq(0).all()


# ---------------------------------------------------------------- the codes

def test_diversity_is_0_for_uniform_use_and_largest_for_collapse():
    uniform = torch.full((2, 32), 1 / 32)
    collapsed = torch.eye(32)[[3, 7]]
    half = torch.cat([uniform[:1], collapsed[:1]])
    assert wav2vec.diversity_loss(uniform).item() == pytest.approx(0, abs=1e-6)
    assert wav2vec.diversity_loss(collapsed).item() == pytest.approx(31 / 32)
    assert wav2vec.diversity_loss(half).item() == pytest.approx(31 / 64)
    assert wav2vec.perplexity(half).tolist() == pytest.approx([32, 1])


def test_diversity_pulls_towards_uniform_use():
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for _ in range(200):
        wav2vec.diversity_loss(logits.softmax(1)).backward()
        with torch.no_grad():
            logits -= 5 * logits.grad
        logits.grad = None
    assert wav2vec.perplexity(logits.softmax(1)).item() > 31


def test_the_scale_of_diversity_does_not_depend_on_the_number_of_frames():
    model = small_model()
    z = torch.randn(40, 16)
    _, _, once = model.quantize(z, 1.0, numbers(40, 2, 8))
    _, _, twice = model.quantize(torch.cat([z, z]), 1.0, numbers(80, 2, 8))
    first, second = wav2vec.diversity_loss(once), wav2vec.diversity_loss(twice)
    assert first.item() == pytest.approx(second.item(), abs=1e-6)


def test_all_entries_are_in_use_at_the_start():
    torch.manual_seed(0)
    model = wav2vec.Wav2Vec()
    z = model.latents(torch.from_numpy(noise(4))[None])[0]
    _, codes, _ = model.quantize(z, 2.0, numbers(len(z), 2, 32))
    used = torch.nn.functional.one_hot(codes, 32).float().mean(0)
    assert wav2vec.perplexity(used).min() > 24


def test_codes_follow_the_gumbel_softmax():
    """The drawn entry has the probabilities of the softmax, whatever the temperature."""
    model = small_model()
    z = torch.randn(1, 16).expand(4000, 16)
    _, codes, p = model.quantize(z, 0.7, numbers(4000, 2, 8))
    for codebook in range(2):
        shares = codes[:, codebook].bincount(minlength=8) / 4000
        torch.testing.assert_close(shares, p[codebook].detach(), atol=0.03, rtol=0)


def test_a_target_is_one_entry_of_each_codebook_and_has_a_gradient():
    model = small_model()
    z = torch.randn(5, 16, requires_grad=True)
    q, codes, _ = model.quantize(z, 1.0, numbers(5, 2, 8))
    entries = [model.codebooks[[0, 1], code].flatten() for code in codes]
    torch.testing.assert_close(q, model.to_target(torch.stack(entries)))
    q.square().sum().backward()
    assert z.grad.ne(0).any(1).all()


# ---------------------------------------------------------------- the masks

@pytest.mark.parametrize("span, share", [(6, 0.5), (10, 0.3), (1, 0.5)])
def test_spans_have_the_stated_share(span, share):
    lengths = torch.tensor([100, 60, 33])
    draws = torch.Generator().manual_seed(0)
    masked = torch.stack([
        wav2vec_data.draw_spans(lengths, span, share, draws) for _ in range(200)
    ])
    for row, n in enumerate(lengths.tolist()):
        count = round(share * n / span)
        assert (masked[:, row, :n].sum(1) == count * span).all()
        assert not masked[:, row, n:].any()
        everywhere = masked[:, row, :n].float().mean(0)
        assert everywhere.min() > 0           # every frame is hidden at some time


def test_hidden_frames_are_whole_spans():
    draws = torch.Generator().manual_seed(0)
    masked = wav2vec_data.draw_spans(torch.tensor([80]), 5, 0.4, draws)[0].tolist()
    runs = "".join("x" if hidden else " " for hidden in masked).split()
    assert all(len(run) % 5 == 0 for run in runs)


def test_the_shortest_recording_keeps_a_visible_frame():
    frames = wav2vec_data.count_frames(int(0.8 * wav2vec_data.SHORTEST * 8000))
    for span in (1, 6, 50):
        draws = torch.Generator().manual_seed(0)
        masked = wav2vec_data.draw_spans(torch.tensor([frames]), span, 0.5, draws)
        assert 0 < masked.sum() < frames


def test_the_context_sees_nothing_of_hidden_frames_but_the_target_does():
    model = small_model().eval()
    before = torch.from_numpy(noise())[None]
    after = before.clone()
    after[:, 1000:1320] += 1                  # frames 9 to 16 see these samples
    masked = torch.zeros(1, wav2vec_data.count_frames(3200), dtype=torch.bool)
    masked[:, 8:18] = True
    lengths = torch.tensor([masked.shape[1]])
    outputs, targets = [], []
    for waves in (before, after):
        z = model.latents(waves)
        outputs.append(model.context(z, lengths, masked)[-1])
        targets.append(z[masked])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(targets[0], targets[1])
    unmasked = [model.context(model.latents(x), lengths)[-1] for x in (before, after)]
    assert not torch.equal(*unmasked)


def test_padding_does_not_change_a_recording():
    model = small_model().eval()
    short, long = noise(0.3), noise(0.7, seed=1)
    alone = model.encode(*wav2vec_data.pad([short]))
    together = model.encode(*wav2vec_data.pad([short, long]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_pooling_equals_numpy():
    x, lengths = torch.randn(2, 12, 3), torch.tensor([12, 6])
    pooled = baselines.pool(x, lengths).numpy()
    for row, frames, n in zip(pooled, x.numpy(), (12, 6)):
        thirds = np.split(frames[:n], 3)
        expected = [*(part.mean(0) for part in thirds), frames[:n].std(0)]
        np.testing.assert_allclose(row, np.concatenate(expected), atol=1e-4)


# ---------------------------------------------------------------- recordings

def write_wav(path, samples, width=2, rate=8000):
    """samples (n, channels), whole numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        dtype = {1: "u1", 2: "<i2", 3: "<i4"}[width]
        file.writeframes(samples.astype(dtype).tobytes())


@pytest.mark.parametrize("width, channels", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_wav_files_are_read_as_written(width, channels, tmp_path):
    draws = np.random.default_rng(0)
    low, high = (0, 256) if width == 1 else (-2**15, 2**15)
    samples = draws.integers(low, high, (1000, channels))
    write_wav(tmp_path / "a.wav", samples, width)
    middle = 128 if width == 1 else 0
    expected = samples.mean(1) - middle
    np.testing.assert_allclose(wav2vec_data.read_wav(tmp_path / "a.wav"), expected)


def test_other_rates_become_8000_a_second():
    time = np.arange(16000) / 16000
    tone = np.cos(2 * np.pi * 440 * time)
    expected = np.cos(2 * np.pi * 440 * np.arange(8000) / 8000)
    np.testing.assert_allclose(wav2vec_data.resample(tone, 16000), expected, atol=1e-9)


def test_log_mel_equals_a_small_dft():
    samples = noise(0.1)
    mel = wav2vec_data.log_mel(samples)
    corners = []
    for i in range(42):
        m = i / 41 * 2595 * math.log10(1 + 4000 / 700)
        corners.append(700 * (10**(m / 2595) - 1))
    for t in (0, 3):
        frame = []
        for n in range(200):
            frame.append(samples[80 * t + n] * (0.5 - 0.5 * math.cos(2 * math.pi * n / 200)))
        time = np.arange(200)
        for band in (0, 17, 39):
            below, centre, above = corners[band:band + 3]
            total = 0
            for k in range(129):
                f = k * 8000 / 256
                rising, falling = (f - below) / (centre - below), (above - f) / (above - centre)
                power = abs((frame * np.exp(-2j * np.pi * k * time / 256)).sum())**2
                total += max(0, min(rising, falling)) * power
            assert mel[t, band] == pytest.approx(math.log(total + 0.01), abs=1e-4)


def test_labels_and_speakers_stand_in_names_or_folders(tmp_path):
    tone = np.arange(2000)[:, None] % 50
    for name in ("no_eva_2", "no_eva_10", "yes_jan_0", "yes_0"):
        write_wav(tmp_path / "all" / f"{name}.wav", tone)
    made = wav2vec_data.own_recordings(tmp_path)          # the one folder inside stands for it
    assert made.classes == ["no", "yes"] and made.speaker_names == ["eva", "jan"]
    assert made.labels.tolist() == [0, 0, 1, 1]
    assert made.speakers.tolist() == [0, 0, -1, 1]
    for name in ("no/eva_1", "yes/eva_1", "yes/jan"):
        write_wav(tmp_path / "folders" / f"{name}.wav", tone)
    made = wav2vec_data.own_recordings(tmp_path / "folders")
    assert made.classes == ["no", "yes"] and made.labels.tolist() == [0, 1, 1]
    assert made.speaker_names == ["eva"]                  # "jan" has no _, so it is no speaker
    assert made.speakers.tolist() == [0, 0, -1]


def fake_recordings(speakers=6, takes=10):
    labels, spoken_by = [], []
    for speaker in range(speakers):
        for label in range(3):
            labels += [label] * takes
            spoken_by += [speaker] * takes
    n = len(labels)
    names = [f"s{speaker}" for speaker in range(speakers)]
    waves = [noise(0.2)] * n
    return wav2vec_data.Recordings(
        waves, np.array(labels), ["a", "b", "c"], np.array(spoken_by), names
    )


def test_no_speaker_of_the_test_is_trained_on():
    seen = []
    for fold in range(3):
        made = fake_recordings()
        wav2vec_data.split_recordings(made, "speakers", fold)
        speakers = {part: set(made.speakers[made.select(part)].tolist())
                    for part in (TRAIN, HELD_OUT, TEST)}
        assert not speakers[TEST] & (speakers[TRAIN] | speakers[HELD_OUT])
        seen += sorted(speakers[TEST])
    assert seen == [0, 1, 2, 3, 4, 5]


def test_the_first_five_takes_are_the_other_test():
    made = fake_recordings()
    wav2vec_data.split_recordings(made, "takes", 0)
    takes = np.tile(np.arange(10), 18)
    assert (made.split[takes < 5] == TEST).all()
    assert (made.split[takes == 5] == HELD_OUT).all()
    assert (made.split[takes > 5] == TRAIN).all()


def test_batches_are_functions_of_the_step():
    made = fake_recordings()
    one, other = [
        wav2vec_data.WaveBatches(made, np.arange(180), 16, 0.2, seed=0) for _ in range(2)
    ]
    waves, _ = one(30)
    for step in (2, 50, 30):
        again, _ = other(step)
    assert torch.equal(waves, again)
    seen = np.concatenate([one.indices_of(step) for step in range(11)])
    assert len(set(seen.tolist())) == 176     # an epoch takes each recording at most once
    alone = wav2vec_data.WaveBatches(made, np.array([0]), 1, 0.2, seed=0)
    assert alone(0)[0].shape != alone(1)[0].shape            # another speed in each epoch


def test_a_step_reads_a_random_second_and_a_table_the_whole_recording():
    made = fake_recordings(1, 1)
    made.waves[0] = noise(3)
    batches = wav2vec_data.WaveBatches(made, np.array([0]), 1, 0.0, seed=0)
    waves, lengths = batches(0)
    assert waves.shape == (1, 8000)
    assert lengths.tolist() == [wav2vec_data.count_frames(8000)]
    seen = []

    def encode(waves, lengths):
        seen.append(waves.shape)
        return waves[:, :2]

    autocast = torch.autocast("cpu", enabled=False)
    baselines.encode_all(encode, made, np.array([0]), autocast, torch.device("cpu"))
    assert seen == [(1, 24000)]


def test_a_mean_spectrum_does_not_tell_synthetic_words():
    made = wav2vec_data.synthetic_words(takes=2, speakers=6)
    spectra = [torch.from_numpy(wav2vec_data.log_mel(samples)) for samples in made.waves]
    over_time = baselines.log_mel_features(made)
    mean = torch.stack([frames.mean(0) for frames in spectra])
    train, test = np.flatnonzero(made.speakers < 4), np.flatnonzero(made.speakers >= 4)
    accuracy = []
    made.split = np.where(made.speakers < 4, TRAIN, TEST)
    for features in (mean, over_time):
        probe, _ = baselines.probe_and_self_training(features, made)
        answers = probe.predict(probe.fit(train), test).numpy()
        accuracy.append(100 * (answers == made.labels[test]).mean())
    assert accuracy[0] < 30 < 50 < accuracy[1]


def test_synthetic_words_are_the_same_six_sounds():
    assert len(wav2vec_data.WORDS) == len(set(wav2vec_data.WORDS)) == 10
    assert {"".join(sorted(word)) for word in wav2vec_data.WORDS} == {"aikmsu"}


# ---------------------------------------------------------------- the table

def test_self_training_reads_no_test_recording_and_no_other_label():
    made = fake_recordings()
    wav2vec_data.split_recordings(made, "speakers", 0)
    x = torch.from_numpy(np.eye(3)[made.labels]).float() + 0.5 * numbers(len(made), 3)
    train = made.select(TRAIN)
    fit = train[baselines.probes.draw_labels(made.labels[train], 5, 0)]
    weights = []
    for _ in range(2):
        probe, self_training = baselines.probe_and_self_training(x, made)
        weights.append(self_training.fit(fit, probe.fit(fit)).weights)
        hidden = np.setdiff1d(np.arange(len(made)), fit)
        made.labels[hidden] = 0
        x[made.split == TEST] += 100
    torch.testing.assert_close(*weights)


def test_a_lead_is_measured_draw_by_draw(capsys):
    """Two draws that move all rows by 20 points: the lead of 3 does not vary."""
    rows = {row for pair in baselines.LEADS for row in pair}
    table = {row: np.array([[50.0], [70.0]]) for row in rows}
    table["wav2vec"] = table["from scratch"] + 3
    baselines.print_tables([10], table, {})
    lines = capsys.readouterr().out.splitlines()
    assert "63.0 ± 14.1" in next(line for line in lines if line.startswith("wav2vec "))
    first = lines.index("lead with the same draws, in points")
    assert "+3.0 ± 0.0" in next(line for line in lines[first:] if "over from scratch" in line)


def test_muon_and_adam_train_what_the_docstring_says():
    model = small_model()
    muon, adam = baselines.make_optimizers(model, 0.01, 0.02, torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    encoder, blocks = [[names[id(p)] for p in group["params"]] for group in muon.param_groups]
    assert encoder == ["filters", "convolutions.0.weight", "convolutions.1.weight"]
    assert all(name.startswith("blocks.") for name in blocks)
    [others] = [[names[id(p)] for p in group["params"]] for group in adam.param_groups]
    assert sorted(others) == [
        "code_logits.bias", "code_logits.weight", "codebooks", "convolutions.0.bias",
        "convolutions.1.bias", "hidden", "to_prediction.bias", "to_prediction.weight",
        "to_target.bias", "to_target.weight",
    ]


# ---------------------------------------------------------------- the script
def test_a_short_training_learns_which_sound_is_hidden():
    """Noises and tones take turns, so the visible frames tell the hidden ones."""
    torch.manual_seed(0)
    model = wav2vec.Wav2Vec(width=32, layers=2, heads=2)
    made = fake_recordings(1, 2)
    time = np.arange(2400) / 8000
    for n in range(len(made)):
        tone = np.sin(2 * np.pi * (300, 900, 2000)[n % 3] * time)
        is_noise = (np.arange(2400) // 500 + n) % 2 == 0
        made.waves[n] = wav2vec_data.normalize(np.where(is_noise, noise(0.3, n), tone))
    batches = wav2vec_data.WaveBatches(made, np.arange(6), 6, 0.1, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    losses, accuracies = [], []
    for step in range(180):
        waves, lengths, *other = batches.two_views(step)
        draws = torch.Generator().manual_seed(step)
        masked = wav2vec_data.draw_spans(lengths, 3, 0.4, draws)
        predictions, targets, codes, p = model(waves, lengths, masked, *other, 0.5, draws)
        distractors = wav2vec.choose_distractors(codes, masked, numbers(len(codes), 7, seed=step))
        loss, accuracy = wav2vec.contrastive_loss(predictions, targets, *distractors)
        (loss + 0.5 * wav2vec.diversity_loss(p)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracies.append(accuracy.item())
    assert np.mean(losses[-20:]) < 0.9 * math.log(8)
    assert np.mean(accuracies[-20:]) > 2 / 8


@pytest.fixture
def quick_table(monkeypatch):
    """Few synthetic voices, and a short training of the whole encoder."""
    monkeypatch.setattr(wav2vec_data, "WORDS", wav2vec_data.WORDS[:3])
    made = wav2vec_data.synthetic_words(takes=6, speakers=3)

    def of_few_voices(takes):
        return made

    small = partial(wav2vec.Wav2Vec, width=32, layers=1, heads=2)
    monkeypatch.setattr(wav2vec, "Wav2Vec", small)
    monkeypatch.setattr(wav2vec_data, "synthetic_words", of_few_voices)
    monkeypatch.setattr(baselines, "WHOLE_STEPS", 1)
    monkeypatch.setattr(baselines, "PROBE_STRENGTHS", (0.1, 0.01))


def test_a_stopped_run_resumes_bit_for_bit(quick_table, run_script, tmp_path):
    code, printed = run_script(wav2vec, "--run", tmp_path / "whole", *SMALL)
    assert code == 0, printed
    assert "codes of " in printed and "(chance 0.0625)" in printed
    rows = read_log(tmp_path / "whole")
    assert float(rows[-1]["contrastive"]) < float(rows[0]["contrastive"])
    assert float(rows[0]["perplexity"]) > 24 and float(rows[-1]["perplexity"]) > 24
    assert float(rows[0]["temperature"]) == 2 and float(rows[-1]["temperature"]) < 0.7
    for row in ("untrained encoder", "from scratch", "wav2vec, self-trained"):
        assert row in printed

    assert_resumes_exactly(run_script, wav2vec, SMALL, tmp_path / "whole", printed, last_step=9)


@pytest.mark.parametrize("name, content, sentence", [
    ("no_eva.wav", b"RIFFnonsense", "cannot be read as a .wav file"),
    ("no_eva.txt", b"", "found no .wav files"),
    ("no_eva.wav", 3, "found 24 bits and 1 channels"),
    ("no_eva.wav", 2, "holds 0.013 seconds; give recordings of at least 0.1 seconds"),
])
def test_wrong_recordings_are_one_sentence(name, content, sentence, run_script, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    if isinstance(content, int):
        write_wav(folder / name, np.zeros((100, 1)), width=content)
    else:
        (folder / name).write_bytes(content)
    code, printed = run_script(wav2vec, "--data", folder, "--run", tmp_path / "run", *SMALL)
    assert code == 2
    assert sentence in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", ["0", "99"])
def test_impossible_labels_are_one_sentence(labels, quick_table, run_script, tmp_path):
    code, printed = run_script(wav2vec, "--run", tmp_path / "run", *SMALL, "--labels", labels)
    assert code == 2
    assert f"--labels {labels}: expected at least 1, and at most 10" in printed


def test_columns_that_are_left_out_are_noted(quick_table, capsys):
    wav2vec_data.load_recordings(wav2vec.Settings(takes=6, labels=[1, 10]))
    assert "--labels" not in capsys.readouterr().out
    wav2vec_data.load_recordings(wav2vec.Settings(takes=6, labels=[1, 10, 11, 50]))
    assert "the columns 11, 50 of --labels are left out" in capsys.readouterr().out


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="runs in one process"):
        wav2vec.Settings()


NAMES = "name the files folder/LABEL_SPEAKER_x.wav or folder/LABEL/SPEAKER_x.wav"


def test_two_speakers_are_too_few_to_hold_some_out():
    sentence = f"found 2 speakers, and --test speakers needs 3; {NAMES}, or give --test takes"
    with pytest.raises(UserError, match=sentence):
        wav2vec_data.split_recordings(fake_recordings(speakers=2), "speakers", 0)


@pytest.mark.parametrize("classes, found", [([], "no labels"), (["no"], "only the label no")])
def test_fewer_than_two_classes_are_one_sentence(classes, found):
    made = fake_recordings()
    made.labels[:] = len(classes) - 1
    made.classes = classes
    with pytest.raises(UserError, match=f"found {found}, and the table needs two .*; {NAMES}"):
        wav2vec_data.split_recordings(made, "speakers", 0)


def test_classes_without_a_training_recording_are_named():
    made = fake_recordings(takes=7)           # the seventh is for training
    made.labels[(made.labels == 1) & (np.arange(len(made)) % 7 == 6)] = -1
    with pytest.raises(UserError, match="no recording to learn from in the class b; give more"):
        wav2vec_data.split_recordings(made, "takes", 0)


def test_the_example_starts_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "wav2vec.py"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--distractors" in ended.stdout
