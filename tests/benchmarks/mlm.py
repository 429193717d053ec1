"""How fast is the masked pretraining step, beside Hugging Face's BertForMaskedLM of its size?

    python tests/benchmarks/mlm.py                     a few minutes on two cores
    python tests/benchmarks/mlm.py --plain-malloc      without keep_freed_memory()
    python tests/benchmarks/mlm.py --rounds 2 --batch 4 --layers 1 --width 64 --window 32 \\
                                   --vocabulary 512    does it run?

A step is mask_tokens, forward, loss, backward and optimizer. Both sides get the same tokens and
masks, no padding, no dropout, a tied output layer and torch's fused AdamW, so the models are
compared. They take turns in one process (A B C D A B C D ...), so a slow minute of the machine
affects all. keep_freed_memory() changes malloc for the whole process, so **both sides get it**.
The tokens are random, because this measures speed alone.

    minissl, AdamW            logits at the masked positions only
    Hugging Face, AdamW       as it comes, with sdpa attention; labels are -100 where nothing is
                              masked, but logits are computed at all positions
    minissl, Muon             Muon on the blocks, as in train_mlm.py, and AdamW on all else
    minissl, all positions    AdamW, logits at all positions. The difference to the first row is
                              that one trick. The difference to Hugging Face is the rest (in
                              bfloat16 on a CPU also its attention; see AttentionByHand)

"of peak": the floating-point operations (FLOPs) of a row's own matrix products, without those of
the optimizer, in a second, divided by the measured rate of a large matrix product. Of the rates
before and after the rounds, the better one counts.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minissl.data.batches import generator
from minissl.optim import Muon
from minissl.training.machine import (
    autocast_context,
    keep_freed_memory,
    matrix_product_rate,
    name_of,
    speed_up_on_cpu,
)
from minissl.transformer import (
    FIRST_ORDINARY,
    IGNORE_INDEX,
    TextEncoder,
    mask_tokens,
    masked_language_model_loss,
)


missing = ""
try:
    # transformers imports torchvision where it finds it, and fails if it does not fit torch.
    sys.modules["torchvision"] = None
    import transformers
    from transformers import BertConfig, BertForMaskedLM
except ImportError as error:
    missing = f"transformers cannot be imported ({error}), so our side is measured alone"

CPU = torch.device("cpu")
HEADS, SHARE = 4, 0.15
OURS, THEIRS = "minissl, AdamW", "Hugging Face, AdamW"
MUON, EVERYWHERE = "minissl, Muon", "minissl, all positions"


@dataclass
class Row:
    """One of the models that are measured."""
    name: str
    model: torch.nn.Module
    optimizers: list
    flops: float                        # of a training step
    rates: list = field(default_factory=list)       # tokens a second, of each round


# ---------------------------------------------------------------- the models and their losses

def masked_loss(name, model, inputs, targets):
    """The loss of a row; inputs and targets (B, T) as from mask_tokens."""
    if name == THEIRS:
        return model(input_ids=inputs, labels=targets).loss
    x = model(inputs)                                         # (B, T, D)
    is_masked = targets != IGNORE_INDEX                       # (B, T)
    if name == EVERYWHERE:
        logits = model.token_logits(x.flatten(0, 1))          # (B·T, V)
        # cross_entropy leaves out the targets of -100.
        return masked_language_model_loss(logits, targets.flatten(), is_masked.sum())
    logits = model.token_logits(x[is_masked])                 # (M, V)
    return masked_language_model_loss(logits, targets[is_masked])


def our_model(options):
    no_pairs = torch.empty(0, dtype=torch.int64)
    model = TextEncoder(
        options.vocabulary, no_pairs, options.width, options.layers, HEADS, options.window
    )
    return speed_up_on_cpu(model)


def their_model(options):
    return BertForMaskedLM(BertConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        intermediate_size=4 * options.width,
        max_position_embeddings=options.window,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    ))


def flops_of_a_step(options, positions):
    """The FLOPs of a training step's matrix products, with logits at so many positions."""
    B, T, D, V = options.batch, options.window, options.width, options.vocabulary
    matrices = 12 * D * D * B * T                             # of a block
    attention = 2 * D * B * T * T                             # q kᵀ, and softmax · v
    head = (V * D + D * D) * positions                        # tied layer, dense layer
    multiply_adds = options.layers * (matrices + attention) + head
    # Two operations for a multiplication with its addition; a backward pass has twice the
    # products of a forward pass.
    return 2 * 3 * multiply_adds


def new_row(name, options, dtype):
    """A Row with weights of its own."""
    B, T = options.batch, options.window
    positions = B * T
    if name in (OURS, MUON):
        positions = B * max(1, int(SHARE * T + 0.5))          # as mask_tokens chooses them
    model = their_model(options) if name == THEIRS else our_model(options)
    model.train()
    blocks = []
    if name == MUON:
        blocks = list(model.blocks.parameters())
    in_blocks = {id(parameter) for parameter in blocks}
    rest = [p for p in model.parameters() if id(p) not in in_blocks]
    optimizers = [torch.optim.AdamW(rest, lr=1e-3, fused=True)]
    if blocks:
        optimizers.append(Muon(blocks, lr=0.02, precision=dtype))
    return Row(name, model, optimizers, flops_of_a_step(options, positions))


# ---------------------------------------------------------------- are they the same?

def print_sizes(rows):
    for row in rows:
        if row.name not in (OURS, THEIRS):
            continue
        total, idle = 0, 0
        for name, parameter in row.model.named_parameters():
            if name.startswith("term_head"):                  # the document loss's, unused here
                idle += parameter.numel()
            else:
                total += parameter.numel()
        remark = f", and {idle:,} idle (document loss)" if idle else ""
        print(f"{row.name}: {total:,} parameters{remark}")


def check_losses(options, model):
    """With the same logits and targets, in float64, our loss must be Hugging Face's."""
    tokens = torch.randint(FIRST_ORDINARY, options.vocabulary, (2, options.window))
    lengths = torch.full((2,), options.window)
    inputs, targets = mask_tokens(tokens, lengths, options.vocabulary, SHARE)
    with torch.no_grad():
        theirs, logits = model.double()(input_ids=inputs, labels=targets)[:2]
    model.float()                       # loses nothing, because float64 came from float32
    is_masked = targets != IGNORE_INDEX
    ours = masked_language_model_loss(logits[is_masked], targets[is_masked])
    print(f"the same logits, two losses: ours {ours:.9f}, Hugging Face {theirs:.9f}")
    if abs(ours - theirs) > 1e-6:
        raise SystemExit("the two losses differ, so the speeds cannot be compared")


# ---------------------------------------------------------------- the rounds

def measure_step(options, row, tokens, dtype, round_number):
    """Tokens a second of one step."""
    lengths = torch.full((options.batch,), options.window)
    start = time.perf_counter()
    masks = generator(0, "mask", round_number)
    inputs, targets = mask_tokens(tokens, lengths, options.vocabulary, SHARE, masks)
    with autocast_context(CPU, dtype):
        loss = masked_loss(row.name, row.model, inputs, targets)
    loss.backward()
    for optimizer in row.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    rate = tokens.numel() / (time.perf_counter() - start)
    if not loss.isfinite():
        raise SystemExit(f"{row.name}: the loss is {loss}, so its speed says nothing")
    return rate


def measure(options, dtype):
    """Measure all rows in a precision, and print the table."""
    names = [OURS, THEIRS, MUON, EVERYWHERE]
    if missing:
        names.remove(THEIRS)
    rows = [new_row(name, options, dtype) for name in names]
    if dtype == torch.float32:
        print_sizes(rows)
        if not missing:
            check_losses(options, rows[1].model)
    before = matrix_product_rate(CPU, dtype)
    for round_number in range(-2, options.rounds):            # two rounds of warm-up
        draws = generator(0, "tokens", round_number)
        shape = (options.batch, options.window)
        tokens = torch.randint(FIRST_ORDINARY, options.vocabulary, shape, generator=draws)
        for row in rows:
            rate = measure_step(options, row, tokens, dtype, round_number)
            if round_number >= 0:
                row.rates.append(rate)
    after = matrix_product_rate(CPU, dtype)
    print(f"\n{name_of(dtype)}: matrix product {before / 1e9:,.0f} GFLOP/s before, "
          f"{after / 1e9:,.0f} after")
    print_table(rows, options.batch * options.window, max(before, after))


def print_table(rows, tokens, peak):
    """tokens: of a step; peak: FLOP/s of a large matrix product."""
    print(f"{'tokens/s':<24}   median      min      max  of peak"
          f"  / Hugging Face: medians  median of pairs")
    theirs = [row.rates for row in rows if row.name == THEIRS]
    for row in rows:
        rate = median(row.rates)
        share = row.flops / tokens * rate / peak
        line = f"{row.name:<24}{rate:9,.0f}{min(row.rates):9,.0f}{max(row.rates):9,.0f}"
        line += f"{share:9.1%}"
        if theirs:
            pairs = median(a / b for a, b in zip(row.rates, theirs[0]))
            line += f"{rate / median(theirs[0]):25.2f}{pairs:17.2f}"
        print(line, flush=True)


def bfloat16_is_faster():
    """Whether a small and a large matrix product are faster in bfloat16 than in float32."""
    for n in (256, 1536):
        fast = matrix_product_rate(CPU, torch.bfloat16, n)
        if fast <= matrix_product_rate(CPU, torch.float32, n):
            return False
    return True


def main(options):
    print(missing or f"transformers {transformers.__version__}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.plain_malloc:
        print("plain malloc")
    else:
        print("keep_freed_memory()")
        keep_freed_memory()
    measure(options, torch.float32)
    if bfloat16_is_faster():
        measure(options, torch.bfloat16)
    else:
        print("\nbfloat16: not measured, because it is slower than float32 on this machine")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(rounds=10, batch=64, layers=6, width=256, window=128, vocabulary=8192)
    for flag, default in sizes.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--plain-malloc", action="store_true",
                        help="leave malloc as it is, for both sides")
    options = parser.parse_args()
    if min(options.rounds, options.batch, options.layers, options.window) < 1:
        parser.error("--rounds, --batch, --layers and --window must be at least 1")
    if options.vocabulary < 3:
        parser.error("--vocabulary must be at least 3")
    if options.width < 64 or options.width % HEADS:
        parser.error(f"--width must be a multiple of {HEADS} heads, and at least 64")
    main(options)
