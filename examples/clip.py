"""A further pretext task in one file: which caption belongs to this image?

Encode B images and their B captions, and let each image find its caption among all captions
of the batch, and each caption its image. A model that can do that knows what words look like.
A new class then needs no labelled image: its name in a sentence, "a star", is a caption.

    s_bj = exp(t) u_b · v_j                         u, v unit vectors of images and captions
    L = −1/(2B) Σ_b ( log softmax_j(s_bj)[b] + log softmax_j(s_jb)[b] )

This is InfoNCE in both directions. It is ln B for a guess. If k captions of a batch say the
same, nobody can tell them apart on unseen pairs, so each of them costs ln k: this is the
floor.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision", arXiv 2103.00020

Differences from the paper, all to suit minutes on two cores:
- The image encoder is that of contrastive.py. The text encoder is that of transformer.py: it
  sees the whole caption, and its vector is the mean over the tokens, not that of the last one.
- A batch has 256 pairs, not 32,768. Muon trains the matrices (see optim.py).
- Images are not cropped, because a crop would move what the caption says is on the left.
- Accuracy is the mean over the prompts, each used alone. The paper averages their vectors.

    python examples/clip.py                               drawn shapes, 3.5 minutes
    python examples/clip.py --data mine.npy --run runs/mine
                                      your own: mine.captions.txt has a line for each image
    python examples/clip.py --data mine.npy --run runs/mine --classes cat dog
                                      with prompts, if mine.labels.npy says what is right
    python examples/clip.py --run runs/clip --resume      continue a run

clip_data.py makes the pairs of images and captions, clip_baselines.py the table. The image
encoder is measured at the end of this script; finetune.py does not read its runs.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to start it from anywhere

import clip_baselines as baselines
from clip_data import load_pairs

from minissl import UserError
from minissl.contrastive import ImageEncoder
from minissl.data.batches import Batches
from minissl.data.images import mean_and_whitening
from minissl.evaluation.previews import NeighbourPreview
from minissl.optim import Muon, lr_schedule, step_optimizers
from minissl.training import distributed
from minissl.training.files import progress
from minissl.training.machine import choose_machine, move_to_device
from minissl.training.run import Run
from minissl.training.settings import read_settings, require_above, require_at_least, run_script
from minissl.transformer import TextEncoder


PROMPTS = ["a {class}", "there is a {class}", "we see a {class}"]


@dataclass
class Settings:
    data: str = "shapes"  # shapes, or a .npy of uint8 images with NAME.captions.txt beside it
    classes: list[str] = field(default_factory=list)  # names of the labels 0, 1, ... of own data
    prompts: list[str] = field(default_factory=PROMPTS.copy)  # {class} becomes a class's name
    limit: int = 0  # for a trial: this many images of each split; 0: all
    run: str = "runs/clip"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 500  # optimizer steps
    batch_size: int = 256  # pairs in a step
    learning_rate: float = 0.04  # peak rate of the matrices; all else takes a fraction
    width: int = 32  # of the first feature map of the image encoder
    text_width: int = 128  # columns of a token vector
    layers: int = 2  # blocks of the text encoder
    size: int = 128  # dimension of u and v
    window: int = 64  # a longer caption is truncated to this many tokens
    draws: int = 3  # draws of labels for each probe
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured
    evaluate_every: int = 100  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints

    def __post_init__(self):
        require_at_least(self, 1, "steps", "width", "layers", "size", "window", "evaluate_every")
        require_at_least(self, 2, "batch_size", "draws")
        require_at_least(self, 0, "limit", "save_every")
        require_above(self, 0, "learning_rate")
        if self.text_width % 8 or self.text_width < 8:      # rotary positions, in 4 heads
            raise UserError(f"--text-width {self.text_width}: must be a multiple of 8")
        if not all("{class}" in prompt for prompt in self.prompts):
            raise UserError("--prompts: write {class} where the name of the class belongs")
        if distributed.WORLD_SIZE > 1:
            raise UserError("examples/clip.py runs in one process: start it with python")


# ---------------------------------------------------------------- The model and the loss

class CLIP(nn.Module):
    """Two towers with a linear projection each, and a temperature exp(−t).

    Arguments: mean, whitening and width as for ImageEncoder; text, the arguments of TextEncoder
    but its pairs; size, of the vectors u and v.
    """

    def __init__(self, mean, whitening, width, text, size):
        super().__init__()
        self.image_encoder = ImageEncoder(mean, whitening, width)
        no_pairs = torch.empty(0, dtype=torch.int64)
        self.text_encoder = TextEncoder(**text, pairs=no_pairs, document_columns=text["width"])
        self.image_projection = nn.Linear(4 * width, size, bias=False)
        self.text_projection = nn.Linear(text["width"], size, bias=False)
        # As in the paper. With a scale of 1, the loss could fall only about 1 below ln B.
        self.t = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode(self, images):
        """Images (B, C, H, W), floats in [0, 1] -> features (B, 4 · width)."""
        return self.image_encoder(images)

    def image_vectors(self, images):
        """Images (B, C, H, W) -> u (B, size), of length 1."""
        return F.normalize(self.image_projection(self.encode(images)).float(), dim=1)

    def text_vectors(self, tokens, lengths):
        """Captions (B, T) with their lengths (B,) -> v (B, size), of length 1."""
        features = self.text_encoder.encode(tokens, lengths)              # (B, text width)
        return F.normalize(self.text_projection(features).float(), dim=1)

    @torch.no_grad()
    def clamp_scale(self):
        """Keep exp(t) at 100 or below, after a step of the optimizer."""
        self.t.clamp_(max=math.log(100))


def clip_loss(u, v, scale):
    """L, for unit vectors u of images and v of their captions, both (B, D); scale = exp(t).

    Raises ValueError for a batch of one, whose loss would always be 0.
    """
    if len(u) < 2:
        raise ValueError("clip_loss needs 2 pairs: a single image has nothing to confuse it with")
    s = scale * u @ v.T                                       # (B, B): images × captions
    own = s.diagonal()                                        # (B,)
    find_caption = s.logsumexp(1) - own                       # of each image, among all captions
    find_image = s.logsumexp(0) - own                         # of each caption, among all images
    return (find_caption + find_image).mean() / 2


# ---------------------------------------------------------------- Training

def make_model(settings, train_pairs, device, precision):
    """A new model, its arguments, and its optimizers."""
    torch.manual_seed(settings.seed)
    text = dict(
        vocabulary_size=len(train_pairs.texts.tokenizer), width=settings.text_width,
        layers=settings.layers, heads=4, window=settings.window,
    )
    statistics = mean_and_whitening(train_pairs.images)
    model_settings = dict(**statistics, width=settings.width, text=text, size=settings.size)
    model = move_to_device(CLIP(**model_settings), device)
    # The text encoder's output layers get no gradient here, so they stay as they are.
    embedding = model.text_encoder.token_embedding.weight
    others = [p for p in model.parameters() if p is not embedding]
    matrices = [p for p in others if p.ndim > 1]
    vectors = [p for p in others if p.ndim <= 1]              # batch norm's, and t
    groups = [dict(params=[embedding], lr_scale=0.3), dict(params=vectors, lr_scale=0.1)]
    muon = Muon(matrices, settings.learning_rate, precision=precision)
    return model, model_settings, [muon, torch.optim.Adam(groups, fused=device.type != "mps")]


def train_step(model, optimizers, batch, step, settings, autocast):
    """One step on images, tokens and lengths. Returns the loss."""
    images, tokens, lengths = batch
    with autocast:
        u = model.image_vectors(images)                                   # (B, size)
        v = model.text_vectors(tokens, lengths)                           # (B, size)
    loss = clip_loss(u, v, model.t.exp())
    loss.backward()
    schedule = lr_schedule(step, settings.steps, warmup=20, decay=1)
    step_optimizers(optimizers, settings.learning_rate * schedule)
    model.clamp_scale()
    return loss


def train_control(name, pairs, settings, machine):
    """The same training on other pairs, without a run. Returns the model."""
    device, precision, autocast = machine
    model, _, optimizers = make_model(settings, pairs, device, precision)
    batches = Batches(len(pairs), settings.batch_size, settings.seed, "pair order")
    for step in range(settings.steps):
        batch = pairs.batch(batches(step).numpy(), settings.window, device)
        train_step(model, optimizers, batch, step, settings, autocast)
        progress(f"{name}: {step + 1:,} of {settings.steps:,} steps")
    return model


def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    machine = device, precision, autocast = choose_machine(settings)

    pairs = load_pairs(settings.data, settings.limit, settings.classes)
    train_pairs, held_out, test = pairs.split()
    N, C, H, W = train_pairs.images.shape
    print(f"data: {settings.data}, {N:,} captioned images of {H} × {W} × {C} to learn from")
    for note in pairs.images.notes:
        print(f"data: {note}")
    batches = Batches(N, settings.batch_size, settings.seed, "pair order")
    model, model_settings, optimizers = make_model(settings, train_pairs, device, precision)
    neighbours = NeighbourPreview(pairs.images, run.folder, autocast, device)

    def preview(model):
        columns = baselines.preview(model, held_out, settings, machine, clip_loss)
        return columns | dict(knn=neighbours(model.encode))

    first_step = run.begin(
        model, optimizers, data=pairs.describe(), method="clip",
        model_settings=model_settings, tokenizer=pairs.texts.tokenizer.to_json(),
        chance=dict(loss=math.log(settings.batch_size), floor=None, scale=None),
        preview=preview,
    )
    for step in range(first_step, settings.steps):
        indices = batches(step).numpy()
        batch = train_pairs.batch(indices, settings.window, device)
        loss = train_step(model, optimizers, batch, step, settings, autocast)
        floor = baselines.floor(train_pairs.meaning[indices]).float().to(device)
        run.end_step(step, dict(loss=loss, floor=floor, scale=model.t.exp()), items=len(indices))
    run.finish(measure=None)

    measured = baselines.measure(model, test, settings, machine, clip_loss)
    result = baselines.report(measured, min(settings.batch_size, len(test)))
    if settings.data == "shapes":
        result |= baselines.compare(
            model, measured, train_pairs, test, settings, machine, clip_loss, train_control)
    print("result: " + " ".join(f"{name}={value}" for name, value in result.items()))


if __name__ == "__main__":
    run_script(main)
