"""Pretrain a small transformer on text without labels.

It has two pretext tasks: fill in masked words, and predict the rest of the document.
minissl/transformer.py explains both, and the model.

Training has two stages. In the first stage the blocks of the transformer still add nothing.
The embeddings learn alone, from whole texts, hundreds of thousands of tokens a second. In the
second stage everything learns, from both losses.

    python train_mlm.py                        docstrings of this machine's Python, 5 minutes
    python train_mlm.py --data imdb --run runs/imdb --steps 3800 --embedding-steps 1400
                                               film reviews, 10 minutes
    python train_mlm.py --data my_texts/ --run runs/my-texts  your own .txt files
    python train_mlm.py --steps 500 --run runs/mlm-quick      on a slow laptop
    torchrun --nproc-per-node 2 -- train_mlm.py --run runs/mlm-two      two processes
    python train_mlm.py --run runs/my-texts --resume          continue a run
    python train_mlm.py --fill "returns a [MASK] of strings"  ask the trained model
    python finetune.py runs/mlm                               measure whether it helped
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from minissl import UserError, transformer
from minissl.data.batches import WholeTexts, Windows, generator
from minissl.data.splits import TRAIN, fingerprint
from minissl.data.text_sources import load_texts
from minissl.data.texts import SAMPLE_TEXTS, announce, count_terms, frequent_pairs
from minissl.evaluation.load import fill, tokenizer_of
from minissl.evaluation.previews import TextPreview
from minissl.optim import Muon, lr_schedule, step_optimizers
from minissl.tokenizer import PAD
from minissl.training.distributed import (
    average_gradients,
    average_over_processes,
    main_process_first,
    shard,
)
from minissl.training.machine import choose_machine, move_to_device
from minissl.training.run import Run
from minissl.training.settings import (
    read_settings,
    require_above,
    require_at_least,
    require_at_most,
    run_script,
)


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    data: str = "pydocs"  # pydocs, imdb, a .txt file, or a folder of .txt files
    data_dir: str = "data"  # the folder for downloads and caches
    limit: int = 0  # for a trial: at most this many texts of each split; 0: all
    run: str = "runs/mlm"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 1500  # optimizer steps of both stages together
    embedding_steps: int = -1  # steps of the first stage; below 0: a third of --steps
    batch_size: int = 32  # windows in a step, if all are full; first stage: 8 times as many texts
    learning_rate: float = 0.02  # peak rate of the blocks; all other layers take a fraction
    seed: int = 0  # seed of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured
    compile: bool = False  # torch.compile the encoder; it takes a minute at the start
    vocabulary_size: int = 8192  # number of subwords
    pairs: int = 16384  # number of frequent word pairs with an embedding
    width: int = 256  # columns of a token vector
    layers: int = 2  # number of blocks
    heads: int = 4  # attention heads in each block
    window: int = 128  # tokens that attend to each other
    mask_share: float = 0.15  # share of the tokens to predict, at least one of each window
    masked_weight: float = 1.0  # weight of the masked loss; 0 turns it off
    document_weight: float = 4.0  # weight of the document loss; 0 turns it and the first stage off
    evaluate_every: int = 500  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints
    fill: str = ""  # do not train, but fill in each [MASK] of this text with the run in --run

    def __post_init__(self):
        if self.masked_weight == 0 and self.document_weight == 0:
            raise UserError(
                "--masked-weight 0 and --document-weight 0: nothing is left to learn; "
                "give at least one of them a value above 0"
            )
        if self.document_weight == 0:
            if self.embedding_steps > 0:
                raise UserError(
                    f"--embedding-steps {self.embedding_steps}: leave it out, "
                    f"--document-weight 0 has no first stage"
                )
            self.embedding_steps = 0
        elif self.embedding_steps < 0:
            self.embedding_steps = self.steps // 3
        require_at_least(self, 1, "steps", "batch_size", "width", "heads", "window")
        require_at_least(self, 1, "evaluate_every")
        require_at_least(self, 0, "limit", "embedding_steps", "layers", "pairs")
        require_at_least(self, 0, "masked_weight", "document_weight", "save_every")
        require_above(self, 0, "learning_rate", "mask_share")
        # 258 entries are bytes and special tokens. Below 300 hardly any merge would be left.
        require_at_least(self, 300, "vocabulary_size")
        if self.width % (2 * self.heads):       # rotary positions turn pairs of columns
            raise UserError(
                f"--width {self.width}: must be a multiple of {2 * self.heads}, "
                f"twice the number of --heads"
            )
        require_at_most(self, 1, "mask_share")
        # The masked loss is learned in the second stage alone, so it needs a step there.
        most = self.steps if self.masked_weight == 0 else self.steps - 1
        if self.embedding_steps > most:
            raise UserError(
                f"--embedding-steps {self.embedding_steps}: must be at most {most} "
                f"with --steps {self.steps}"
            )


# ---------------------------------------------------------------- The losses of the stages

def document_loss_of_whole_texts(model, read, rest):
    """First stage: predict half of a document's words from the mean of the others.

    read and rest (B, T) have PAD where the other one has a token. Everything is computed in
    float32, because bfloat16 cannot count beyond 256. Returns the loss, and the losses by name.

    --document-weight is not used here: with one loss alone, its weight would only scale the
    gradient, and Adam divides by the size of the gradient.
    """
    vector = model.mean_of_embeddings(model.count_terms(read))            # (B, d)
    bag = model.bag_of_terms(rest)                                        # (B, V + P)
    # This process's sum is divided by the average count. The mean of these quotients over the
    # processes, which average_gradients takes, is then the sum of all over the count of all.
    count = average_over_processes(transformer.count_nonempty(bag))
    document = transformer.document_loss(model.term_logits(vector), bag, count)
    return document, dict(document=document)


def masked_and_document_loss(model, inputs, targets, lengths, rest, settings, autocast):
    """Second stage: predict masked words, and the words of the rest of the document.

    inputs and targets (B, T), lengths (B,), and rest (B, R), what the documents have
    outside their windows. Returns the weighted sum of both losses, and the losses by name.
    """
    loss, losses = 0.0, {}
    with autocast:
        h = model(inputs, lengths)                                        # (B, T, D)
        if settings.masked_weight > 0:
            is_masked = targets != transformer.IGNORE_INDEX               # (B, T)
            count = average_over_processes(is_masked.sum())
            logits = model.token_logits(h[is_masked])                     # (M, V)
            losses["masked"] = transformer.masked_language_model_loss(
                logits, targets[is_masked], count
            )
            loss = loss + settings.masked_weight * losses["masked"]
        if settings.document_weight > 0:
            logits = model.term_logits(model.document_vector(h, lengths))     # (B, V + P)
            bag = model.bag_of_terms(rest)                                # (B, V + P)
            count = average_over_processes(transformer.count_nonempty(bag))
            losses["document"] = transformer.document_loss(logits, bag, count)
            loss = loss + settings.document_weight * losses["document"]
    return loss, losses


def main():
    settings = read_settings(Settings, __doc__)
    if settings.fill:
        return fill(settings.run, settings.fill)
    run = Run(settings)
    device, precision, autocast = choose_machine(settings)

    # ------------------------------------------------------------ Data

    with main_process_first():
        tokenizer = tokenizer_of(run.checkpoint, run.folder) if run.checkpoint else None
        texts = load_texts(
            settings.data, settings.data_dir, settings.vocabulary_size, settings.limit, tokenizer
        )
    train_texts = texts.select(texts.split == TRAIN)
    V = len(texts.tokenizer)
    size = announce(settings.data, train_texts)
    train_texts = train_texts.cut_long_texts(settings.window)

    B = settings.batch_size
    has_document_loss = settings.document_weight > 0
    # The first stage computes means of embeddings alone, so its steps can have more texts.
    whole_texts = WholeTexts(train_texts, 8 * B, settings.seed)
    windows = Windows(
        train_texts, settings.window, B, settings.seed, leave_rest=has_document_loss
    )

    def whole_text_batch(step):
        """This process's read and rest (B, T), both on the device, at a step of the first stage."""
        return [x.to(device) for x in shard(*whole_texts(step))]

    def masked_window_batch(step):
        """This process's inputs, targets, lengths and rest at a step of the second stage.

        Tokens are hidden even with --masked-weight 0. So that flag switches off the loss and
        nothing else, and the document loss sees the same inputs with and without it.
        """
        tokens, lengths, rest = windows(step - settings.embedding_steps)
        rng = generator(settings.seed, "mask", step)
        inputs, targets = transformer.mask_tokens(tokens, lengths, V, settings.mask_share, rng)
        return [x.to(device) for x in shard(inputs, targets, lengths, rest)]

    # ------------------------------------------------------------ Model

    torch.manual_seed(settings.seed)
    sample = train_texts.sample(SAMPLE_TEXTS)
    pairs = frequent_pairs(sample, settings.pairs)
    document_columns = transformer.DOCUMENT_COLUMNS if has_document_loss else settings.width
    model_settings = dict(
        vocabulary_size=V,
        pairs=pairs,
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        window=settings.window,
        document_columns=document_columns,
    )
    model = transformer.TextEncoder(**model_settings)
    model.init_from_counts(count_terms(sample, model))
    model = move_to_device(model, device)

    # Muon trains the blocks, and Adam everything else. `update_parameters` sets its rates.
    blocks = list(model.blocks.parameters())
    embeddings = [model.token_embedding.weight, model.pair_embedding.weight]
    output_layers = [
        *model.term_head.parameters(),
        *model.token_dense.parameters(),
        model.token_bias,
    ]
    adam = torch.optim.Adam(
        [dict(params=embeddings), dict(params=output_layers)],
        betas=(0.9, 0.99),
        fused=device.type != "mps",
    )
    optimizers = [adam]
    if blocks:
        optimizers.append(Muon(blocks, settings.learning_rate, precision=precision))

    def update_parameters(step):
        """One step of the optimizers. The learning rates rise and fall once in each stage.

        Adam's shares of the rate (`scales`) were not measured: EXPERIMENTS.md has no entry.
        """
        first = settings.embedding_steps
        if step < first:
            lr = settings.learning_rate * lr_schedule(step, first, warmup=20, decay=1)
            scales = [0.5, 0.5]                               # of embeddings and output layers
        else:
            steps = settings.steps - first
            lr = settings.learning_rate * lr_schedule(step - first, steps, warmup=100)
            scales = [0.05, 0.15]
        for group, scale in zip(adam.param_groups, scales):
            group["lr_scale"] = scale
        step_optimizers(optimizers, lr)

    # ------------------------------------------------------------ Run

    first_step = run.begin(
        model,
        optimizers,
        data=f"{size}, {len(pairs):,} pairs, checksum {fingerprint(texts)}",
        method="mlm",
        model_settings=model_settings,
        tokenizer=texts.tokenizer.to_json(),
        chance=dict(masked=math.log(V), document=math.log(V + len(pairs))),
        preview=TextPreview(
            texts, settings.window, settings.mask_share, run.folder, autocast, device,
            fills_in=settings.masked_weight > 0,
        ),
        log_every=100,
        first_stage=settings.embedding_steps,
    )
    if settings.compile:
        model.compile()
    parameters = sum(p.numel() for p in model.parameters())
    in_blocks = sum(p.numel() for p in blocks)
    print(f"model: {parameters:,} parameters, {in_blocks:,} of them in the blocks")

    # ------------------------------------------------------------ Training

    for step in range(first_step, settings.steps):
        if step < settings.embedding_steps:                   # first stage
            read, rest = whole_text_batch(step)
            loss, losses = document_loss_of_whole_texts(model, read, rest)
            tokens = (read != PAD).sum() + (rest != PAD).sum()
        else:                                                 # second stage
            inputs, targets, lengths, rest = masked_window_batch(step)
            loss, losses = masked_and_document_loss(
                model, inputs, targets, lengths, rest, settings, autocast
            )
            tokens = lengths.sum()
        loss.backward()
        average_gradients(model)
        update_parameters(step)
        run.end_step(step, losses, items=tokens)
    run.finish()


if __name__ == "__main__":
    run_script(main)
