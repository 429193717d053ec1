"""A finished run opened again: its model, its encoder, its answers.

    encode = load.load_encoder("runs/mlm")      features of new texts or images
    load.fill("runs/mlm", "a [MASK] film")      prints the likeliest words
"""

import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.autoencoder import Autoencoder
from minissl.contrastive import BYOL, SimCLR
from minissl.data.images import SMALLEST
from minissl.data.splits import fingerprint
from minissl.data.texts import encode_texts
from minissl.evaluation.features import image_features, text_features
from minissl.tokenizer import MASK, Tokenizer
from minissl.training.files import checkpoint_errors, load_checkpoint
from minissl.training.wording import count_of
from minissl.transformer import TextEncoder


# The method that a checkpoint names -> the class of its model. A new method adds its own.
MODELS = {
    "mlm": TextEncoder,
    "gpt": TextEncoder,
    "autoencoder": Autoencoder,
    "simclr": SimCLR,
    "byol": BYOL,
}

# Names of data that are not paths.
TEXT_DATA = ("pydocs", "imdb")
IMAGE_DATA = ("shapes", "cifar10")
BUILT_IN = TEXT_DATA + IMAGE_DATA


def load_run(run):
    """The model of a run's folder, in evaluation mode on the CPU, and its checkpoint, a dict."""
    checkpoint = load_checkpoint(run)
    method = checkpoint.get("method")
    if isinstance(method, str) and method not in MODELS:
        script = checkpoint.get("script", "another script")
        raise UserError(f"{run} was made by {script}, with the method {method}, which is not in "
                        f"MODELS of minissl/evaluation/load.py: {script} says how its features are "
                        f"measured, or add its class to MODELS")
    with checkpoint_errors(run):
        model = MODELS[method](**checkpoint["model_settings"])
        model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def new_model(checkpoint, seed):
    """A model like that of a checkpoint, with random weights from this seed.

    The output layers of a TextEncoder are not set by `init_from_counts`. Its features do not
    depend on them.
    """
    torch.manual_seed(seed)
    return MODELS[checkpoint["method"]](**checkpoint["model_settings"])


def may_mirror(checkpoint):
    """Whether images may be mirrored: True unless the run was trained with --no-flip.

    If they may, the features of an image are the mean over the image and its mirror image.
    """
    return not checkpoint["settings"].get("no_flip", False)


def reads_texts(checkpoint):
    """Whether the run was trained on texts, with a TextEncoder. All others read images."""
    return issubclass(MODELS[checkpoint["method"]], TextEncoder)


def tokenizer_of(checkpoint, run):
    """The Tokenizer of a checkpoint of a text run.

    run: the folder that the checkpoint comes from, for the message if it holds no tokenizer.
    """
    with checkpoint_errors(run):
        return Tokenizer.from_json(checkpoint["tokenizer"])


# ---------------------------------------------------------------- checks

def check_images(images, model, name):
    """Raise UserError unless the model can read images (N, C, H, W) of this shape.

    An autoencoder reads images of one size; the others read any size of at least SMALLEST.
    name: what the message calls the images.
    """
    C, H, W = images.shape[1:]
    given = f"{name}: found images of {H} × {W} × {C}"
    if min(H, W) < SMALLEST:
        raise UserError(f"{given}; expected at least {SMALLEST} × {SMALLEST}: enlarge them "
                        f"(a single colour image must have the shape (1, H, W, C))")
    expected = f"images with {count_of(model.channels, 'channel')}"
    size = getattr(model, "size", None)                         # None: it reads any size
    if size:
        expected = f"images of {size[0]} × {size[1]} × {model.channels}"
    if C != model.channels or (size and (H, W) != tuple(size)):
        raise UserError(f"{given}; the run was trained on {expected}: convert them")


def check_split(data, checkpoint, name, kind):
    """Warn if the run may have been trained on images or texts that are now in the test set.

    The run's checkpoint describes the data that it was trained on. The description contains a
    fingerprint of two parts: one for the examples, one for their split. If neither the name nor
    the examples agree, this function cannot tell, and a note asks the user to make sure.
    data: Images or Texts, loaded with the --limit of the pretraining; name: the --data that they
    come from; kind: "images" or "texts".
    """
    trained_on = checkpoint["data"]
    now = fingerprint(data)
    if now in trained_on:
        return
    examples, _ = now.split("-")
    trained_name = checkpoint["settings"]["data"]
    if is_same_source(name, trained_name) or examples in trained_on:
        print(f"warning: the data or its split has changed since pretraining, so test {kind} may "
              f"have been trained on; pretrain a new run on this data to be sure")
    else:
        print(f"note: make sure that the run was not trained on the test examples of {name}")


def is_same_source(name, other):
    """Whether two values of --data name the same data, such as d/a.npy and ./d/a.npy."""
    if name in BUILT_IN or other in BUILT_IN:
        return name == other
    return Path(name).resolve() == Path(other).resolve()


# ---------------------------------------------------------------- use

def load_encoder(run):
    """The encoder of a run's folder, as a function from new examples to features (N, D) float32.

    These are the features that finetune.py probes. For a run on texts the function takes a list
    of N strings (or any iterable). For runs on images it takes a uint8 array (N, H, W, C) or
    (N, H, W).
    """
    model, checkpoint = load_run(run)
    if reads_texts(checkpoint):
        tokenizer = tokenizer_of(checkpoint, run)

        def encode_strings(strings):
            return text_features(model, encode_texts(strings, tokenizer), nullcontext())
        return encode_strings

    def encode_images(images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of an array that must not be written: we only read
            images = torch.as_tensor(np.ascontiguousarray(images))
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or len(shape) not in (3, 4) or not images.numel():
            dtype = str(images.dtype).removeprefix("torch.")
            raise UserError(f"found an array of {dtype} of shape {shape}; expected uint8 "
                            f"(N, H, W, C) or (N, H, W), with at least one image")
        if images.ndim == 3:
            images = images[..., None]
        images = images.permute(0, 3, 1, 2)                     # (N, C, H, W)
        check_images(images, model, "the array")
        mirror = may_mirror(checkpoint)
        return image_features(model.encode, images, nullcontext(), mirror=mirror)
    return encode_images


def fill(run, text):
    """Print the five likeliest tokens for each [MASK] of the text, with their probabilities."""
    model, checkpoint = load_run(run)
    if not reads_texts(checkpoint):
        raise UserError(f"--fill: {run} was trained on images; give a run of train_mlm.py")
    check_masked_words(checkpoint, run)
    tokenizer = tokenizer_of(checkpoint, run)
    tokens = encode_with_masks(text, tokenizer)
    positions = [i for i, token in enumerate(tokens) if token == MASK]
    if not positions:
        raise UserError("--fill: found 0 [MASK]; write at least one [MASK], in capital letters, "
                        "where a word is missing")
    if len(tokens) > model.window:
        raise UserError(f"--fill: the text has {len(tokens)} tokens, and the run reads at most "
                        f"{model.window}: give a shorter text")

    with torch.no_grad():
        x = model(torch.tensor([tokens]))[0, positions]         # (M, D)
        probabilities = model.token_logits(x).softmax(1)        # (M, V)
    for n, row in enumerate(probabilities, 1):
        best = row.topk(5)
        guesses = []
        for probability, token in zip(best.values.tolist(), best.indices.tolist()):
            guesses.append(f"{show_token(token, tokenizer)} {probability:.2f}")
        print(f"[MASK] {n}: {', '.join(guesses)}")


def show_token(token, tokenizer):
    """The string of a token. White space, which nobody would see, is in quotes: ' ' or '\\n'."""
    text = tokenizer.decode([token])
    if text.strip():
        return text
    return repr(tokenizer.bytes_of[token].decode("utf-8", "replace"))


def check_masked_words(checkpoint, run):
    """Raise UserError if the run has not trained the layer that fills in masked words."""
    if checkpoint["model_settings"].get("causal"):
        raise UserError(f"--fill: {run} was trained by examples/gpt.py, which continues texts: "
                        f"give it a --prompt, or give another run")
    with checkpoint_errors(run):
        masked_weight = checkpoint["settings"]["masked_weight"]
        first_stage = checkpoint["settings"]["embedding_steps"]
        step = checkpoint["step"]
    if masked_weight == 0:
        raise UserError(f"--fill: {run} was trained with --masked-weight 0, so it has not learned "
                        f"to fill in words; give another run")
    if step <= first_stage:
        raise UserError(f"--fill: {run} is at step {step:,}, and it learns to fill in words after "
                        f"step {first_stage:,}; train it further with --resume")


def encode_with_masks(text, tokenizer):
    """The tokens of a text in which [MASK] stands for a hidden token, as a list."""
    first, *others = text.split("[MASK]")
    tokens = tokenizer.encode(first, leading_space=True).tolist()
    for piece in others:
        begins_a_word = piece[:1].isspace()
        tokens += [MASK, *tokenizer.encode(piece, leading_space=begins_a_word).tolist()]
    return tokens
