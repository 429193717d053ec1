"""What was learned can be used: a run's folder opened again, its encoder, its answers.

    encode = runs.load_encoder("runs/mlm")      features of new texts or images
    runs.fill("runs/mlm", "a [MASK] film")      what stands there?
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.autoencoder import Autoencoder
from minissl.contrastive import ContrastiveModel
from minissl.datasets import fingerprint, texts_of
from minissl.evaluation import image_features, text_features
from minissl.files import load_checkpoint, taken_from
from minissl.images import SMALLEST
from minissl.tokenizer import MASK, Tokenizer
from minissl.transformer import TextEncoder

MODELS = dict(mlm=TextEncoder, autoencoder=Autoencoder, contrastive=ContrastiveModel)


def load_run(run):
    """-> (model in evaluation mode, on the CPU; checkpoint) of the folder of any run."""
    checkpoint = load_checkpoint(run)
    method = checkpoint.get("method")
    if isinstance(method, str) and method not in MODELS:
        raise UserError(f"{run} was made by the method {method}, which is not among the MODELS of minissl/runs.py")
    with taken_from(run):
        model = MODELS[method](**checkpoint["model_settings"]).eval()
        model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def new_model(checkpoint, seed):
    """The image model of a checkpoint as it was before any training."""
    torch.manual_seed(seed)
    return MODELS[checkpoint["method"]](**checkpoint["model_settings"])


def tokenizer_of(checkpoint):
    with taken_from(checkpoint["settings"]["run"]):
        return Tokenizer.from_json(checkpoint["tokenizer"])


def check_images(images, model, name):
    """UserError unless the model can read images (N, C, H, W) of this size."""
    C, H, W = images.shape[1:]
    channels, size = model.channels, tuple(getattr(model, "size", None) or ())
    if min(H, W) < SMALLEST:
        raise UserError(f"{name}: images of {H} × {W}; at least {SMALLEST} × {SMALLEST} are needed: enlarge them, "
                        f"or, if it is one image in colour, give a[None]")
    if C != channels or size and (H, W) != size:
        learned = f"{size[0]} × {size[1]} × {channels}" if size else f"{channels} channels"
        raise UserError(f"{name}: images of {H} × {W} × {C}; the run learned from {learned}: convert them")


def check_split(data, checkpoint, name, limit, kind):
    """Say it if a run has learned from these data, read as `name` with this `limit`, when other ones were the test."""
    learned, settings, now = checkpoint["data"], checkpoint["settings"], fingerprint(data)
    same = Path(name).resolve() == Path(settings["data"]).resolve() and limit == settings.get("limit", 0)
    if now not in learned and (same or now.split("-")[0] in learned):
        print(f"mind: the run has learned from these {kind} when other ones were the test set, so test {kind} may be "
              f"among them: there were no labels, or others, or other files; train another run with these")


def load_encoder(run):
    """The encoder of a run's folder as a function -> features (N, D) float32. For texts of a list of N strings, for
    images of an array (N, H, W, C) or (N, H, W), uint8."""
    model, checkpoint = load_run(run)
    if checkpoint["method"] == "mlm":
        tokenizer = tokenizer_of(checkpoint)
        return lambda strings: text_features(model, texts_of(strings, tokenizer), nullcontext())

    def features(images):
        images = torch.as_tensor(np.ascontiguousarray(images))
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or not images.numel():
            raise UserError(f"the array is {str(images.dtype)[6:]} of shape {tuple(images.shape)}; "
                            f"expected uint8 (N, H, W, C) or (N, H, W), one image at least")
        images = images.view(*images.shape[:3], -1).permute(0, 3, 1, 2)                           # (N, C, H, W)
        check_images(images, model, "the array")
        return image_features(model.encode, images, nullcontext())
    return features


def fill(run, text):
    """Print what the run's model puts for each [MASK] of the text, the five likeliest with their probabilities."""
    model, checkpoint = load_run(run)
    if checkpoint["method"] != "mlm":
        raise UserError(f"--fill: {run} learned from images; give the folder of a run of train_mlm.py")
    tokenizer = tokenizer_of(checkpoint)
    ids = []
    for n, piece in enumerate(text.split("[MASK]")):
        ids += [MASK] * (n > 0) + tokenizer.encode(piece, leading_space=n == 0 or piece[:1].isspace()).tolist()
    places = [i for i, token in enumerate(ids) if token == MASK]
    if not places or len(ids) > model.window:
        raise UserError(f"--fill: the text has {len(places)} [MASK] and {len(ids)} tokens; it needs at least one "
                        f"[MASK] and at most {model.window} tokens")
    with torch.no_grad():
        chances = model.token_logits(model(torch.tensor([ids]))[0, places]).softmax(1)           # (M, V)
    for n, row in enumerate(chances, 1):
        print(f"[MASK] {n}: " + ", ".join(f"{tokenizer.decode([i])} {p:.2f}" for p, i in zip(*row.topk(5))))
