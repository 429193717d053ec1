"""How fast is the masked pretraining step, beside Hugging Face's BertForMaskedLM of the same size?

    python tests/benchmarks/mlm.py                              a few minutes on two cores
    python tests/benchmarks/mlm.py --plain-malloc               without keep_freed_memory()
    python tests/benchmarks/mlm.py --rounds 2 --batch 4 --layers 1 --width 64 --window 32 --vocabulary 512  does it run?

A step is mask_tokens, forward, loss, backward, optimizer. Both sides get the same tokens and masks, no padding, no
dropout, a tied output layer and torch.optim.AdamW(fused=True), so that the models are compared. They take turns in one
process (A B C D A B C D ...): a slow minute of the machine meets all. keep_freed_memory() changes malloc for the whole
process, so **both sides get it**. Tokens are random: this measures speed alone.

    minissl, AdamW            logits at the masked positions only
    Hugging Face, AdamW       as it comes, with sdpa attention; labels are -100 where nothing is masked, but logits are
                              computed everywhere
    minissl, Muon             the optimizers of train_mlm.py: Muon on the blocks, AdamW on all else
    minissl, all positions    AdamW, logits everywhere: from here to the first row is that one trick, from here to
                              Hugging Face is the rest (in bfloat16 on a CPU also its sdpa: transformer.py, Attention)

"of peak": FLOPs of the row's own matrix products (as in train_mlm.py; none of the optimizer's) per second, divided by
the measured rate of a large matrix product, the better one of before and after the rounds.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minissl.muon import Muon
from minissl.training import generator, keep_freed_memory, matrix_product_rate
from minissl.transformer import FIRST_ORDINARY, TextEncoder, mask_tokens, masked_language_model_loss

missing = ""
try:
    sys.modules["torchvision"] = None  # transformers imports it where it is found, and fails if it does not fit torch
    from transformers import BertConfig, BertForMaskedLM, __version__ as transformers_version
except ImportError as error:
    missing = f"Hugging Face transformers cannot be imported ({error}), so our side is measured alone."

HEADS, SHARE = 4, 0.15
OURS, THEIRS, MUON, EVERYWHERE = "minissl, AdamW", "Hugging Face, AdamW", "minissl, Muon", "minissl, all positions"


def labels(inputs, positions, targets):
    """(B, T): the targets at the masked positions, elsewhere -100, which cross_entropy leaves out."""
    return torch.full((inputs.numel(),), -100).index_put((positions,), targets).view_as(inputs)


def loss(row, model, inputs, positions, targets):
    if row == THEIRS:
        return model(input_ids=inputs, labels=labels(inputs, positions, targets)).loss
    x = model(inputs).flatten(0, 1)                                       # (B·T, D)
    if row == EVERYWHERE:
        wanted = labels(inputs, positions, targets).flatten()             # (B·T,)
        return masked_language_model_loss(model.token_logits(x), wanted, len(targets))
    return masked_language_model_loss(model.token_logits(x[positions]), targets)


def new_rows(o, dtype):
    """-> {row: (model, optimizers, multiply-adds of a forward pass)}; each row has weights of its own."""
    B, T, D, V = o.batch, o.window, o.width, o.vocabulary
    masked = len(mask_tokens(torch.zeros(B, T, dtype=torch.int64), torch.full((B,), T), V, SHARE)[1])
    encoder = o.layers * (12 * D * D * B * T + 2 * D * B * T * T)         # a block's matrices; q kᵀ and softmax · v
    head = V * D + D * D                                                  # of each position: tied layer, dense layer
    rows = {OURS: masked, THEIRS: B * T, MUON: masked, EVERYWHERE: B * T}  # how many positions get logits
    if missing:
        del rows[THEIRS]
    for row, positions in rows.items():
        model = TextEncoder(V, torch.empty(0, dtype=torch.int64), D, o.layers, HEADS, T) if row != THEIRS else (
            BertForMaskedLM(BertConfig(
                vocab_size=V, hidden_size=D, num_hidden_layers=o.layers, num_attention_heads=HEADS,
                intermediate_size=4 * D, max_position_embeddings=T, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, tie_word_embeddings=True, attn_implementation="sdpa")))
        blocks = list(model.blocks.parameters()) if row == MUON else []
        rest = [p for name, p in model.named_parameters() if not (blocks and name.startswith("blocks."))]
        optimizers = [torch.optim.AdamW(rest, lr=1e-3, fused=True)]
        optimizers += [Muon(blocks, lr=0.02, precision=dtype)] if blocks else []
        rows[row] = model.train(), optimizers, encoder + head * positions
    return rows


def check(o, rows):
    """The sizes of the models; and with the same logits and targets, in float64, our loss must be theirs."""
    for row in [OURS] + [THEIRS] * (not missing):
        size = {name: p.numel() for name, p in rows[row][0].named_parameters()}
        idle = sum(n for name, n in size.items() if name.startswith("term_head"))
        print(f"{row}: {sum(size.values()) - idle:,} parameters" + f", and {idle:,} idle (document term)" * (idle > 0))
    if not missing:
        tokens = torch.randint(FIRST_ORDINARY, o.vocabulary, (2, o.window))
        batch = inputs, positions, targets = mask_tokens(tokens, torch.full((2,), o.window), o.vocabulary, SHARE)
        with torch.no_grad():
            theirs, logits = rows[THEIRS][0].double()(input_ids=inputs, labels=labels(*batch))[:2]
            ours = masked_language_model_loss(logits.flatten(0, 1)[positions], targets)
        rows[THEIRS][0].float()                                           # loses nothing: float64 came from float32
        print(f"the same logits, two losses: ours {ours:.9f}, Hugging Face {theirs:.9f}")
        assert abs(ours - theirs) < 1e-6, "the two sides compute different losses: their speeds cannot be compared"


def measure(o, dtype):
    rows = new_rows(o, dtype)
    if dtype == torch.float32:
        check(o, rows)
    rates, lengths = {row: [] for row in rows}, torch.full((o.batch,), o.window)
    peaks = [matrix_product_rate(torch.device("cpu"), dtype)]
    for n in range(-2, o.rounds):    # two rounds of warm-up: memory, optimizer state
        tokens = torch.randint(FIRST_ORDINARY, o.vocabulary, (o.batch, o.window), generator=generator(0, "tokens", n))
        for row, (model, optimizers, _) in rows.items():
            start = time.perf_counter()
            batch = mask_tokens(tokens, lengths, o.vocabulary, SHARE, generator(0, "mask", n))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                value = loss(row, model, *batch)
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            rates[row] += [tokens.numel() / (time.perf_counter() - start)] * (n >= 0)
            assert value.isfinite(), f"{row}: the loss is {value}"
    peaks.append(matrix_product_rate(torch.device("cpu"), dtype))

    print(f"\n{str(dtype)[6:]}: matrix product {peaks[0] / 1e9:,.0f} GFLOP/s before, {peaks[1] / 1e9:,.0f} after")
    print(f"{'tokens/s':<24}   median      min      max  of peak  / Hugging Face: medians  median of pairs")
    for row, r in rates.items():
        share = 6 * rows[row][2] / tokens.numel() * median(r) / max(peaks)    # 6: 2 FLOPs, forward + 2 backward
        theirs = rates.get(THEIRS)
        ratio = f"{median(r) / median(theirs):25.2f}{median(a / b for a, b in zip(r, theirs)):17.2f}" if theirs else ""
        print(f"{row:<24}{median(r):9,.0f}{min(r):9,.0f}{max(r):9,.0f}{share:9.1%}{ratio}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in dict(rounds=10, batch=64, layers=6, width=256, window=128, vocabulary=8192).items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--plain-malloc", action="store_true", help="leave malloc as it is, for both sides")
    options = parser.parse_args()
    if min(options.rounds, options.batch, options.layers, options.window) < 1 or options.vocabulary < 3 or (
            options.width < 64 or options.width % HEADS):                 # 64: the document columns
        parser.error(f"sizes must be at least 1, --vocabulary 3, --width 64 and a multiple of the {HEADS} heads")
    if not options.plain_malloc:
        keep_freed_memory()
    print(missing or f"transformers {transformers_version}",
          f"torch {torch.__version__}, {torch.get_num_threads()} threads",
          "plain malloc" if options.plain_malloc else "keep_freed_memory()", sep="\n")
    measure(options, torch.float32)
    if all(matrix_product_rate(torch.device("cpu"), torch.bfloat16, n) > matrix_product_rate(
            torch.device("cpu"), torch.float32, n) for n in (256, 1536)):
        measure(options, torch.bfloat16)
    else:
        print("\nbfloat16: slower than float32 on this machine, so nobody would train in it here; not measured")
