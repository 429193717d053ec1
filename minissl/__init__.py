"""minissl: self-supervised learning from scratch, in plain PyTorch.

A model that learns from unlabelled data needs few labels afterwards. Here is the map, in the order to read it:

    transformer.py   a tiny transformer encoder, masking, the masked loss, the document term     <- train_mlm.py
    autoencoder.py   a convolutional encoder and decoder, ‖x − x̂‖² + β R(z)                      <- train_ae.py
    contrastive.py   a convolutional encoder, two views of an image, InfoNCE; BYOL               <- train_contrastive.py
    tokenizer.py     the subwords that the transformer reads, learned from the text
    datasets.py      texts as one array of tokens: splits, a cache, batches
    documents.py     where they come from: docstrings of this machine, downloads, the reader's own files
    images.py        images: drawn ones, downloads, the reader's own arrays; batches
    evaluation.py    what features are worth: nearest neighbours, probes, label draws, baselines
    finetuning.py    the columns of the table: from scratch, linear probe, fine-tuned, ...        <- finetune.py
    runs.py          a run opened again: its encoder, its answers
    muon.py          the optimizer of matrices and kernels
    training.py      plumbing: settings, device, randomness, the run's folder
    files.py         plumbing: archives, downloads, checkpoints, writing that is whole or not at all
    processes.py     plumbing: several processes that make the step of one
    figures.py       plumbing: pictures and curves
    report.py        plumbing: the run's page

The three model files need torch alone: each can be copied out and used on its own. The scripts at the top level hold
their training loops whole. Arrows run one way: scripts -> minissl, and nothing here imports a script.

The letters of the shapes, everywhere:

    B   batch: sequences, documents, images  V   entries of the vocabulary; views of an image
    T   tokens of a sequence                 P   word pairs with an embedding
    D   width of a token vector, of          M   masked positions
        features, of a code                  N   all texts or images of a data set
    d   columns of the document vector       C   classes; channels of an image, where there is an H and a W
    b m n   a part of B, M, N                H   attention heads; height of an image, and W its width
"""


class UserError(Exception):
    """Something the user can mend: the message is one sentence that says what was given, what was expected and
    what to do. The scripts print it and exit with code 2."""
