"""How good are the features of Hugging Face's BERT after the same minutes of pretraining?

    python tests/benchmarks/bert_features.py                  ten minutes, then the probe, on IMDb
    python tests/benchmarks/bert_features.py --minutes 0      the control: the same, untrained
    python tests/benchmarks/bert_features.py --minutes 0.2 --limit 300         a quick trial

mlm.py measures the speed of a step alone. This program trains the model that one would take
instead, and measures what it has learned. It needs `pip install transformers tokenizers`.

    tokenizer     WordPiece, lower case, trained on the training texts by `tokenizers`
    windows       as in the example run_mlm of transformers: all training texts end to end,
                  each between [CLS] and [SEP], cut into windows of 128 tokens
    masks         DataCollatorForLanguageModeling: 15 % of the tokens, drawn anew each time
    model         BertForMaskedLM of the size of train_mlm.py: width 256, 2 layers, 4 heads,
                  128 tokens, vocabulary 8,192; everything else as BertConfig has it
    training      AdamW without weight decay, gradients clipped at norm 1, a learning rate that
                  rises linearly for a tenth of the time and then falls linearly to 0
    features      the mean of the last hidden layer over all tokens of a text

The minutes are the wall time of the training alone. Neither the tokenizer nor the probe counts.
The process gets keep_freed_memory() of minissl, as in mlm.py. The texts and their split are
those of train_mlm.py, so held-out texts and test texts are not trained on. The table is that of
`finetune.py RUN --probe`, by the same code: the same standardization, the same draws of labels,
the same logistic regression, the same test set.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from timed_training import print_probe, train_for

import finetune
from minissl import UserError
from minissl.data.splits import TRAIN
from minissl.data.text_sources import load_texts
from minissl.evaluation.columns import Task
from minissl.evaluation.features import text_features
from minissl.evaluation.text_table import TEXT_LABELS
from minissl.training.files import progress
from minissl.training.machine import choose_machine
from minissl.training.settings import read_settings, require_above, require_at_least, run_script


missing = ""
try:
    # transformers imports torchvision where it finds it, and fails if it does not fit torch.
    sys.modules.setdefault("torchvision", None)
    import tokenizers
    import transformers
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
    )
except ImportError as error:
    missing = (f"transformers or tokenizers cannot be imported ({error}): "
               f"pip install transformers tokenizers")

SPECIAL = dict(
    pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    mask_token="[MASK]",
)
WARM_UP = 0.1       # share of the time in which the learning rate rises


# ---------------------------------------------------------------- settings

@dataclass
class Settings:
    data: str = "imdb"  # as for train_mlm.py, with labels
    data_dir: str = "data"  # the folder for downloads and caches
    limit: int = 0  # for a trial: this many each for training, held-out, test; 0: all
    minutes: float = 10  # wall time of the training; 0: leave the model untrained
    seed: int = 0  # of the weights, the order and the masks
    batch_size: int = 32  # windows in a step
    learning_rate: float = 0.001  # the highest
    dropout: float = 0.1  # of hidden layers and of attention
    vocabulary_size: int = 8192
    width: int = 256
    layers: int = 2
    heads: int = 4
    window: int = 128  # tokens that attend to each other
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured

    def __post_init__(self):
        require_at_least(self, 1, "batch_size", "width", "layers", "heads", "window")
        require_at_least(self, 0, "limit", "minutes", "dropout")
        require_at_least(self, 300, "vocabulary_size")
        require_above(self, 0, "learning_rate")
        if self.dropout >= 1:
            raise UserError(f"--dropout {self.dropout}: must be below 1")
        if self.width % self.heads:
            raise UserError(f"--width {self.width}: must be a multiple of --heads {self.heads}")


# ---------------------------------------------------------------- texts as WordPiece tokens

def strings(texts):
    """Yield Texts as strings: in lower case and with single spaces, as train_mlm.py reads them."""
    for i in range(len(texts)):
        yield texts.tokenizer.decode(texts[i].tolist())


def train_wordpiece(texts, vocabulary_size):
    """A tokenizer of BERT's kind for transformers, trained on Texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    # min_frequency and limit_alphabet are those of tokenizers.BertWordPieceTokenizer.
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        limit_alphabet=1000,
        special_tokens=list(SPECIAL.values()),          # so [PAD] is 0, as in minissl
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings(texts), trainer)
    first, last = SPECIAL["cls_token"], SPECIAL["sep_token"]
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        (last, tokenizer.token_to_id(last)), (first, tokenizer.token_to_id(first))
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def encode(texts, tokenizer):
    """The same Texts with WordPiece tokens, each text between [CLS] and [SEP].

    Their attribute `tokenizer` is still the one of minissl.
    """
    tokens, lengths = [], []
    for indices in texts.chunks(1000):
        part = list(strings(texts.select(indices)))
        for ids in tokenizer(part)["input_ids"]:
            tokens.append(np.array(ids, np.int32))
            lengths.append(len(ids))
        progress(f"WordPiece: {len(lengths):,} of {len(texts):,} texts")
    lengths = np.array(lengths, np.int64)
    return replace(
        texts,
        tokens=np.concatenate(tokens),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
    )


class Windows(torch.utils.data.Dataset):
    """Texts end to end, cut into windows of so many tokens. What is left at the end is dropped.

    A window is a dict of lists, as a data collator expects it.
    """

    def __init__(self, texts, size, special_ids):
        tokens = np.concatenate([texts[i] for i in range(len(texts))])
        count = len(tokens) // size
        self.windows = tokens[:count * size].reshape(count, size)         # (n, T)
        self.special_ids = special_ids

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        ids = self.windows[i]                                             # (T,)
        is_special = np.isin(ids, self.special_ids)
        return dict(input_ids=ids.tolist(), special_tokens_mask=is_special.astype(int).tolist())


# ---------------------------------------------------------------- training

def new_model(settings, vocabulary_size):
    return BertForMaskedLM(BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        max_position_embeddings=settings.window,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    ))


def rate_at(share):
    """The share of the highest learning rate after a share of the time.

    >>> [round(rate_at(share), 2) for share in (0, 0.05, 0.1, 0.55, 1)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return max(0.0, min(share / WARM_UP, (1 - share) / (1 - WARM_UP)))


def train(settings, model, loader, device, autocast):
    """Train the model until the time is over: a dict, as `train_for` returns it.

    The loss is in nats for a masked token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model.train()

    def train_step(batch, share):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate_at(share)
        batch = {name: value.to(device) for name, value in batch.items()}
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), batch["input_ids"].numel()

    chance = math.log(model.config.vocab_size)
    return train_for(settings.minutes, loader, train_step, "tokens", chance)


# ---------------------------------------------------------------- features and their probe

class MeanOfTokens:
    """BERT in the form in which text_features asks for an encoder."""

    def __init__(self, model):
        self.bert = model.eval().bert
        self.token_embedding = model.get_input_embeddings()
        self.window = model.config.max_position_embeddings
        self.document_columns = model.config.hidden_size

    def encode(self, tokens, lengths):
        """The mean of the last hidden layer, (B, D), of tokens (B, T) with padding."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        is_token = places < lengths[:, None]                              # (B, T)
        output = self.bert(input_ids=tokens, attention_mask=is_token.long())
        x = output.last_hidden_state.float()                              # (B, T, D)
        x = x.masked_fill(~is_token[:, :, None], 0)
        return x.sum(1) / lengths[:, None]


class ProbeTask(Task):
    """What finetune.measure_table asks of a task, for features (N, D) of labelled Texts."""

    default_labels = TEXT_LABELS
    choice_draws = 1        # nothing is chosen on held-out texts

    def __init__(self, texts, features):
        super().__init__(texts)
        self.make_probe(features)


def main():
    settings = read_settings(Settings, __doc__)
    if missing:
        raise UserError(missing)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    device, _, autocast = choose_machine(settings)

    # ------------------------------------------------------------ Data

    texts = load_texts(settings.data, settings.data_dir, settings.vocabulary_size, settings.limit)
    is_training = texts.split == TRAIN
    tokenizer = train_wordpiece(texts.select(is_training), settings.vocabulary_size)
    texts = encode(texts, tokenizer)
    labelled = finetune.keep_complete_classes(texts, settings.data)
    special_ids = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    windows = Windows(texts.select(is_training), settings.window, special_ids)
    if len(windows) < settings.batch_size:
        raise UserError(f"--batch-size {settings.batch_size}: the texts fill only {len(windows)} "
                        f"windows; give a larger --limit or a smaller --batch-size")
    print(f"data: {settings.data}, {is_training.sum():,} texts in {len(windows):,} windows of "
          f"{settings.window} tokens to learn from, vocabulary {len(tokenizer):,}")

    # ------------------------------------------------------------ Training

    transformers.set_seed(settings.seed)
    model = new_model(settings, len(tokenizer)).to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    loader = torch.utils.data.DataLoader(
        windows,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    figures = dict(steps=0)
    if settings.minutes > 0:
        figures = train(settings, model, loader, device, autocast)

    # ------------------------------------------------------------ Table

    features = text_features(MeanOfTokens(model), labelled, autocast, device, progress)
    task = ProbeTask(labelled, features)
    print_probe(task, settings.limit, figures)


if __name__ == "__main__":
    run_script(main)
