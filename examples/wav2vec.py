"""A further pretext task in one file: which sound is hidden here?

Hide spans of a recording, and let a transformer recognise each hidden frame among other
hidden frames of this recording. A model that can do that knows which sounds follow each other.

    z = f(wave)           a convolutional encoder, a frame every 10 ms
    c = g(z̃)              a transformer; z̃ is z with the hidden frames replaced
    z' = f(wave')         the same recording at another speed, its frames at the same moments
    q_t = Q(z'_t)         an entry of each of G codebooks, made of the frame itself
    L = −1/M Σ_t log( exp s(c_t, q_t) / Σ_q exp s(c_t, q) ) + α D    q: q_t, K distractors
    D = 1 − 1/G Σ_g exp(H(p_g)) / V

M is the number of hidden frames, s(c, q) the cosine of W c and q over τ, and p_g the mean
probability of the V entries of codebook g. H is the entropy: D is 0 if all entries are used
alike, so it keeps the codes from collapsing. The first term is ln(K + 1) for a guess.

    Baevski et al. 2020, "wav2vec 2.0", arXiv 2006.11477

Differences from the paper, for minutes of speech (EXPERIMENTS.md, "Speech"):
- The first convolution begins as 40 mel bands, and the encoder learns slowly.
- The targets are made of z', the same recording at another speed, as of another voice. The paper
  makes them of z.
- Distractors are drawn among frames with other codes. The paper removes equal codes later; a
  collapsed codebook then has the loss 0. Here a frame without distractors counts as a guess.
- The blocks are those of transformer.py, with rotary positions and no dropout.

    python examples/wav2vec.py                      words spoken by our code, 5 to 7 minutes
    python examples/wav2vec.py --data fsdd/ --run runs/fsdd          own .wav files
    python examples/wav2vec.py --run runs/wav2vec --resume             continue a run

wav2vec_data.py makes the recordings and the batches, wav2vec_baselines.py the tables. The
features are measured at the end of this script; finetune.py does not read its runs.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to start it from anywhere

import wav2vec_baselines as baselines
from wav2vec_data import (
    HOP,
    WaveBatches,
    choose_distractors,
    draw_spans,
    load_recordings,
    mel_waves,
)

from minissl import UserError
from minissl.contrastive import without_autocast
from minissl.data.batches import generator
from minissl.data.splits import TRAIN, fingerprint
from minissl.optim import lr_schedule, step_optimizers
from minissl.training import distributed
from minissl.training.machine import choose_machine, move_to_device
from minissl.training.run import Run
from minissl.training.settings import read_settings, require_above, require_at_least, run_script
from minissl.transformer import Block, is_real, norm


@dataclass
class Settings:
    data: str = "words"  # words, or a folder of .wav files
    test: Literal["speakers", "takes"] = "speakers"  # a third of the speakers, or five takes
    fold: int = 0  # 0, 1 or 2: which third of the speakers is the test
    takes: int = 14  # recordings of each word and voice, for --data words
    run: str = "runs/wav2vec"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # recordings in a step; a random second of each that is longer
    learning_rate: float = 0.01  # highest, of the matrices in the blocks
    encoder_rate: float = 0.02  # of the convolutions, as a share of it; of their biases always 0.1
    span: int = 6  # frames of a hidden span; half of all frames are hidden
    distractors: int = 15  # K
    diversity: float = 0.5  # α
    speed: float = 0.2  # the largest change of speed, as a natural logarithm
    labels: list[int] = field(default_factory=lambda: [1, 5, 10, 50])  # labels a class, by column
    draws: int = 3  # draws of labels for each column
    seed: int = 0  # of all random numbers but those of the words
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured
    evaluate_every: int = 500  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints

    def __post_init__(self):
        require_at_least(self, 1, "steps", "batch_size", "span", "distractors", "evaluate_every")
        require_at_least(self, 0, "fold", "speed", "save_every", "encoder_rate", "diversity")
        require_above(self, 0, "learning_rate")
        require_at_least(self, 2, "draws", "takes")
        if self.speed > 0.5 or self.fold > 2:
            raise UserError("--speed must be at most 0.5, and --fold 0, 1 or 2")
        if distributed.WORLD_SIZE > 1:
            raise UserError("examples/wav2vec.py runs in one process: start it with python")


# ---------------------------------------------------------------- The loss

def contrastive_loss(predictions, targets, distractors, has_any, temperature=0.1):
    """The first term of L, and the share of frames whose own target is the nearest.

    predictions W c and targets q (M, D); distractors (M, K), rows of `targets`, and has_any (M,),
    as choose_distractors returns them.
    """
    K = distractors.shape[1]
    c = F.normalize(predictions.float(), dim=1)
    q = F.normalize(targets.float(), dim=1)
    s = c @ q.T / temperature                           # (M, M)
    own = s.diagonal()                                  # (M,)
    of_distractors = s.gather(1, distractors)           # (M, K)
    loss = torch.cat([own[:, None], of_distractors], dim=1).logsumexp(1) - own
    correct = (own > of_distractors.amax(1)).float()
    loss = torch.where(has_any, loss, math.log(K + 1))
    return loss.mean(), torch.where(has_any, correct, 1 / (K + 1)).mean()


def perplexity(p):
    """How many entries are in use, exp(H(p_g)): (G,), from p (G, V).

    D takes the mean probabilities of the softmax. The log takes the shares of the drawn codes,
    with Gumbel noise.
    """
    return torch.special.entr(p).sum(1).exp()


def diversity_loss(p):
    """D: 0 if all V entries are used alike, 1 − 1/V if only one is. p (G, V)."""
    return 1 - perplexity(p).mean() / p.shape[1]


# ---------------------------------------------------------------- The model

class Wav2Vec(nn.Module):
    """Waves -> latents z -> targets q of G codebooks; z with hidden spans -> context c."""

    def __init__(self, width=128, layers=3, heads=4, G=2, V=32, columns=32):
        super().__init__()
        self.G, self.V = G, V
        self.filters = nn.Parameter(mel_waves())        # (80, 160)
        self.convolutions = nn.ModuleList([nn.Linear(80, width), nn.Linear(2 * width, width)])
        self.hidden = nn.Parameter(0.3 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.code_logits = nn.Linear(width, G * V)
        nn.init.normal_(self.code_logits.weight, std=0.5)  # with less, noise chooses the codes
        self.center = nn.BatchNorm1d(width, affine=False)  # without it, few entries are used
        self.codebooks = nn.Parameter(torch.randn(G, V, columns))
        self.to_target = nn.Linear(G * columns, G * columns)
        self.to_prediction = nn.Linear(width, G * columns)

    def latents(self, waves):
        """Waves (B, S) -> z (B, T, D), T = S // 80 − 3."""
        with without_autocast(waves.device):  # bfloat16 would add noise to the wave
            filtered = F.conv1d(waves[:, None], self.filters[:, None], stride=HOP)
            a, b = filtered.chunk(2, dim=1)             # (B, 40, T + 2) each
            x = (a * a + b * b + 0.01).log().transpose(1, 2) / 2
        for layer in self.convolutions:
            x = torch.cat([x[:, :-1], x[:, 1:]], dim=2)  # each frame and the one after it
            x = norm(F.gelu(layer(x)))
        return x

    def context(self, z, lengths, masked=None):
        """The output of each block, (B, T, D), for z (B, T, D) with hidden frames (B, T)."""
        if masked is not None:
            z = torch.where(masked[..., None], self.hidden.to(z.dtype), z)
        visible = is_real(lengths, z.shape[1])[:, None, None]  # (B, 1, 1, T)
        outputs = [z]
        for block in self.blocks:
            outputs.append(block(outputs[-1], visible))
        return outputs[1:]

    def quantize(self, z, temperature, numbers):
        """Frames z (M, D) -> targets q (M, D'), codes (M, G) and their probabilities p (G, V).

        A Gumbel softmax of uniform numbers (M, G, V) draws the entry, the gradient is that of
        the softmax (straight-through): Jang et al. 2016, arXiv 1611.01144.
        """
        logits = self.code_logits(self.center(z.float())).float()
        logits = logits.unflatten(-1, (self.G, self.V))  # (M, G, V)
        gumbel = -(-numbers.clamp(1e-9, 1 - 1e-6).log()).log()
        soft = ((logits + gumbel) / temperature).softmax(-1)  # (M, G, V)
        codes = soft.argmax(-1)                         # (M, G)
        one_hot = F.one_hot(codes, self.V) + soft - soft.detach()
        entries = torch.einsum("mgv,gvd->mgd", one_hot, self.codebooks)
        return self.to_target(entries.flatten(1)), codes, logits.softmax(-1).mean(0)

    def forward(self, waves, lengths, masked, target_waves, target_frames, temperature, draws):
        """Of M hidden frames: predictions W c and targets q, both (M, D'), codes and p.

        waves (B, S), whose frames masked (B, T) are hidden; target_waves (B, S') and
        target_frames (B, T), as WaveBatches.two_views returns them.
        """
        c = self.context(self.latents(waves), lengths, masked)[-1]
        z = self.latents(target_waves)                  # (B, T', D)
        z = z.gather(1, target_frames[..., None].expand(-1, -1, z.shape[2]))  # z', (B, T, D)
        numbers = torch.rand(int(masked.sum()), self.G, self.V, generator=draws)
        quantized = self.quantize(z[masked], temperature, numbers.to(z.device))
        return self.to_prediction(c[masked]), *quantized

    def encode(self, waves, lengths):
        """Features (B, N) float32: the latents and the output of each block, pooled."""
        z = self.latents(waves)
        frames = torch.cat([z, *self.context(z, lengths)], dim=2)
        return baselines.pool(frames, lengths)


def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, precision, autocast = machine = choose_machine(settings)
    recordings = load_recordings(settings)
    train = recordings.select(TRAIN, labelled=False)
    batches = WaveBatches(recordings, train, settings.batch_size, settings.speed, settings.seed)

    def make_model():
        torch.manual_seed(settings.seed)
        return move_to_device(Wav2Vec(), device)

    model = make_model()
    rates = settings.learning_rate, settings.encoder_rate
    optimizers = baselines.make_optimizers(model, *rates, precision)

    def preview(model):
        return baselines.preview(model, recordings, autocast, device)

    K = settings.distractors
    chance = dict(contrastive=math.log(K + 1), accuracy=1 / (K + 1))
    chance |= dict(diversity=None, perplexity=None, temperature=None)
    data = f"{recordings.describe()}, checksum {fingerprint(recordings)}"
    first_step = run.begin(model, optimizers, data, "wav2vec", {}, chance, preview)
    for step in range(first_step, settings.steps):
        waves, lengths, target_waves, target_frames = batches.two_views(step)
        draws = generator(settings.seed, "codes", step)
        masked = draw_spans(lengths, settings.span, 0.5, draws).to(device)
        inputs = [x.to(device) for x in (waves, lengths, masked, target_waves, target_frames)]
        temperature = max(0.5, 2 * 0.25**(step / (0.7 * settings.steps)))  # of the codes
        with autocast:
            predictions, targets, codes, p = model(*inputs, temperature, draws)
        numbers = torch.rand(len(codes), K, generator=draws).to(device)
        distractors, has_any = choose_distractors(codes, masked, numbers)
        contrastive, accuracy = contrastive_loss(predictions, targets, distractors, has_any)
        diversity = diversity_loss(p)
        (contrastive + settings.diversity * diversity).backward()
        schedule = lr_schedule(step, settings.steps, warmup=30)
        step_optimizers(optimizers, settings.learning_rate * schedule)
        losses = dict(contrastive=contrastive, accuracy=accuracy, diversity=diversity)
        shares = F.one_hot(codes, model.V).float().mean(0)  # of the drawn codes, (G, V)
        losses["perplexity"] = perplexity(shares).mean()
        losses["temperature"] = torch.tensor(temperature, device=device)
        run.end_step(step, losses, items=len(waves))
    run.finish(measure=None)
    baselines.print_tables(*baselines.measure(model, make_model, recordings, settings, machine))


if __name__ == "__main__":
    run_script(main)
