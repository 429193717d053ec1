"""minissl: self-supervised learning from scratch, in plain PyTorch.

A model that learns from unlabelled data needs few labels afterwards. Here is the map, in the order to read it:

    transformer.py   a tiny transformer encoder, masking, the masked loss, the document term     <- train_mlm.py
    tokenizer.py     the subwords that it reads, learned from the text
    datasets.py      texts: embedded ones, downloads, the reader's own files; batches
    evaluation.py    what features are worth: nearest neighbours, probes, label draws, the baseline   <- finetune.py
    training.py      plumbing: settings, device, randomness, optimizers, the run's folder
    report.py        the run's page

`transformer.py` needs torch alone: it can be copied out and used on its own. The scripts at the top level hold their
training loops whole. Arrows run one way: scripts -> minissl, and nothing here imports a script.

The letters of the shapes, everywhere:

    B   batch: sequences, documents          V   entries of the vocabulary
    T   tokens of a sequence                 N   word pairs with an embedding (where texts are counted: texts)
    D   width of a token vector              M   masked positions
    d   columns of the document vector       C   classes
    H   attention heads
"""


class UserError(Exception):
    """Something the user can mend: the message is one sentence that says what was given, what was expected and
    what to do. The scripts print it and exit with code 2."""
