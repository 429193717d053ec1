"""Pretrain a tiny transformer on text without labels: fill in masked words, guess the rest of the document.

Two stages, one model. For `--embedding-steps` steps the transformer's blocks are still zero, and the embeddings
alone learn the document term, from whole texts, half a million tokens a second. Then both losses train everything.

    python train_mlm.py                                         docstrings of this machine's Python, under 5 minutes
    python train_mlm.py --data imdb --run runs/imdb --steps 3800 --embedding-steps 1400       film reviews, 10 minutes
    python train_mlm.py --data my_texts/ --run runs/mine        your own .txt files
    python train_mlm.py --steps 500 --run runs/quick            a slow laptop: a third of the time
    torchrun --nproc-per-node 2 -- train_mlm.py                 several processes that make the step of one
    python train_mlm.py --run runs/mine --resume                go on where Ctrl-C stopped
    python train_mlm.py --fill "returns a [MASK] of strings"    ask the trained model
    python finetune.py runs/mlm                                 what was it worth? a table
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from minissl import UserError, evaluation, runs, transformer
from minissl.datasets import SAMPLE_TEXTS, TRAIN, WholeTexts, Windows, fingerprint, frequent_pairs
from minissl.documents import load_texts
from minissl.muon import Muon
from minissl.processes import RANK, WORLD, average_gradients, first_alone, sum_over
from minissl.training import Run, at_least, choose_machine, generator, rate_at, read_settings, run_script, take_step


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    data: str = "pydocs"  # pydocs, imdb, a .txt file or a folder of them
    data_dir: str = "data"  # where archives and caches lie
    limit: int = 0  # take this many texts of each split only, for a trial; 0: all
    run: str = "runs/mlm"  # the run's folder
    resume: bool = False  # go on with the run in --run
    steps: int = 1500  # in all, both stages
    embedding_steps: int = -1  # how many of these train the embeddings alone; below 0: a third
    batch_size: int = 32  # × window = tokens a step; the first stage takes 8 times as many whole texts
    gradient_accumulation: int = 1  # split a step of the second stage, for little memory: the gradient stays the same
    learning_rate: float = 0.02  # Muon's, on the blocks; the other rates are fixed multiples of it
    seed: int = 0  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is measurably faster
    compile: bool = False  # torch.compile the encoder: a minute first; meant for a GPU, not measured
    vocabulary_size: int = 8192  # subwords
    pairs: int = 16384  # frequent word pairs with an embedding of their own: +3 points at 10 labels (a prototype)
    width: int = 256  # of a token vector
    layers: int = 2  # blocks
    heads: int = 4  # of attention; 64 columns each
    window: int = 128  # tokens that attend to each other
    mask_share: float = 0.15  # of each window's tokens (BERT)
    masked_weight: float = 1.0  # of the masked loss; 0 turns it off
    document_weight: float = 4.0  # of the document term (1: a point less at 100 labels); 0: off, and no first stage
    evaluate_every: int = 500  # steps
    save_every: float = 30  # seconds; a run that is killed loses no more
    fill: str = ""  # instead of training: what the run in --run puts for each [MASK] of this text

    def __post_init__(self):
        if self.embedding_steps < 0 or not self.document_weight:
            self.embedding_steps = self.steps // 3 if self.document_weight else 0
        at_least(self, 1, "steps", "batch_size", "gradient_accumulation", "width", "heads", "window", "evaluate_every")
        at_least(self, 0, "limit", "embedding_steps", "layers", "pairs", "masked_weight", "document_weight",
                 "mask_share")
        at_least(self, 1e-9, "learning_rate")
        at_least(self, 300, "vocabulary_size")
        if self.width % (2 * self.heads):     # twice: rotary positions turn pairs of columns
            raise UserError(f"--width {self.width} must be a multiple of twice the --heads, {2 * self.heads}")
        if self.mask_share > 1:
            raise UserError(f"--mask-share {self.mask_share}: must be a share, at most 1")
        if not self.masked_weight and not self.document_weight:
            raise UserError("--masked-weight 0 and --document-weight 0: nothing is left to learn; keep one above 0")
        if self.embedding_steps > (most := self.steps - bool(self.masked_weight)):
            raise UserError(f"--embedding-steps {self.embedding_steps}: at most {most} of --steps {self.steps}")


# ---------------------------------------------------------------- Training

def main():
    settings = read_settings(Settings, __doc__)
    if settings.fill:
        return runs.fill(settings.run, settings.fill)
    run = Run(settings)
    device, precision, cast, peak = choose_machine(settings)
    with first_alone():
        texts = load_texts(settings.data, settings.data_dir, settings.vocabulary_size, settings.limit,
                           runs.tokenizer_of(run.checkpoint) if run.checkpoint else None)
    V, D, nothing = len(texts.tokenizer), settings.width, torch.zeros((), device=device)
    pool = texts.select(texts.split == TRAIN).cut(max(1024, 4 * settings.window))    # a book is not one document
    print(f"data: {settings.data}, {len(pool):,} texts to learn from, {pool.lengths.sum():,} tokens, vocabulary {V:,}"
          + "".join(f"; {note}" for note in texts.notes))
    windows = Windows(pool, settings.window, settings.batch_size, settings.seed, rest=settings.document_weight > 0)
    whole_texts = WholeTexts(pool, 8 * settings.batch_size, settings.seed)
    look = evaluation.MaskedText(texts, settings.window, settings.mask_share, run.folder, cast, device)

    torch.manual_seed(settings.seed)
    sample = pool.spaced(SAMPLE_TEXTS)
    columns = min(64, D) if settings.document_weight else D
    shape = dict(vocabulary_size=V, pairs=frequent_pairs(sample, settings.pairs), width=D, layers=settings.layers,
                 heads=settings.heads, window=settings.window, document_columns=columns)
    model = transformer.TextEncoder(**shape)
    counts = sum(model.count_terms(torch.from_numpy(sample.flat(which)[0]), 0, 1)[0]
                 for which in sample.slices(4096))                       # (V + P,)
    weights = model.start_at(counts).to(device)                          # of each term in a bag
    model = model.to(device)
    matrices = list(model.blocks.parameters())      # these learn by Muon, all else by Adam, at the rates of a prototype
    embeddings = [model.token_embedding.weight, model.pair_embedding.weight]
    heads = [*model.term_head.parameters(), *model.token_dense.parameters(), model.token_bias]
    adam = torch.optim.Adam([dict(params=embeddings, times=0.05), dict(params=heads, times=0.15)], betas=(0.9, 0.99),
                            fused=device.type != "mps")
    optimizers = [adam] + ([Muon(matrices, settings.learning_rate, precision=precision)] if matrices else [])
    first = run.begin(model, optimizers, peak, f"{len(pool):,} texts of {pool.lengths.sum():,} tokens, "
                      f"{len(model.pairs):,} pairs, checksum {fingerprint(texts)}",
                      method="mlm", model_settings=shape, tokenizer=texts.tokenizer.to_json())
    chance = dict(masked=math.log(V), document=math.log(V + len(model.pairs)))
    if settings.compile:
        model.compile()
    blocks = sum(p.numel() for p in matrices)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {blocks:,} of them in the blocks")

    for step in range(first, settings.steps):
        if step < settings.embedding_steps:                              # First stage: embeddings alone, whole texts
            read, unread, owner, B = whole_texts(step)
            low, high = RANK * B // WORLD, (RANK + 1) * B // WORLD       # a process takes b = high − low documents
            mine = (owner >= low) & (owner < high)
            owner = owner[mine].to(device) - low
            counts = model.count_terms(read[mine].to(device), owner, high - low)                  # (b, V + P)
            z = transformer.norm(model.mean_of_embeddings(counts))                                # (b, d)
            bag = model.count_terms(unread[mine].to(device), owner, high - low) * weights         # (b, V + P)
            filled = sum_over((bag.sum(1) > 0).sum()).clamp(min=1)       # documents with a word to guess
            masked, document = nothing, transformer.document_loss(model.term_head(z), bag, filled / WORLD)
            document.backward()
            rate = rate_at(step, settings.embedding_steps, warmup=20, decay=1)
            run.count(len(read), 0, masked, document)
        else:                                                            # Second stage: the transformer, windows
            tokens, lengths, rest, owner = windows(step - settings.embedding_steps)
            (B, T), real = tokens.shape, int(lengths.sum())
            inputs, positions, targets = transformer.mask_tokens(tokens, lengths, V, settings.mask_share,
                                                                 generator(settings.seed, "mask", step))
            bag = model.count_terms(rest.to(device), owner.to(device), B) * weights               # (B, V + P)
            filled = (bag.sum(1) > 0).sum().clamp(min=1)
            # One part, unless gradients are accumulated (parts add up) or other processes have theirs (then the mean).
            for rows in torch.arange(B).tensor_split(min(settings.gradient_accumulation * WORLD, B))[RANK::WORLD]:
                part, low = slice(rows[0], rows[-1] + 1), rows[0] * T
                here = (positions >= low) & (positions < low + len(rows) * T)
                size = lengths[part].to(device)
                with cast:
                    x = model(inputs[part].to(device), None if lengths[part].min() == T else size)           # (b, T, D)
                    hidden = x.flatten(0, 1)[(positions[here] - low).to(device)]                  # (m, D)
                    z = transformer.norm(model.mean(x, size))                                     # (b, d)
                    masked = document = nothing
                    if settings.masked_weight:
                        masked = transformer.masked_language_model_loss(
                            model.token_logits(hidden), targets[here].to(device), len(targets) / WORLD)
                    if settings.document_weight:
                        document = transformer.document_loss(model.term_head(z), bag[part], filled / WORLD)
                (settings.masked_weight * masked + settings.document_weight * document).backward()
                run.count(0, 0, masked, document)
            rate = rate_at(step - settings.embedding_steps, settings.steps - settings.embedding_steps, warmup=100)
            # 6: 2 for multiply and add, 3 for forward and backward; attention: q kᵀ and the product with v, T²D each
            multiply_adds = blocks * real + 2 * settings.layers * D * int((lengths**2).sum())
            multiply_adds += V * D * len(positions) * (settings.masked_weight > 0)
            run.count(real, 6 * multiply_adds, nothing, nothing)         # nothing: for a process that had no part

        stopping = average_gradients(model.parameters(), run.stopping)
        take_step(optimizers, settings.learning_rate * rate, times=0.5 if step < settings.embedding_steps else None)
        run.after(step, stopping, look, chance, log_every=100)
    run.done()


if __name__ == "__main__":
    run_script(main)
