"""minissl: self-supervised learning from scratch, in plain PyTorch.

A model that learns from unlabelled data needs few labels afterwards.
This is the map of the package, in the order to read it.

The lecture. Each of these files can be read, copied and used alone:

    contrastive.py    recognise views of one image: InfoNCE, BYOL
    transformer.py    a small transformer, masked words, the rest of the document
    autoencoder.py    rebuild an image from a code: ‖x − x̂‖² + β R(z)
    tokenizer.py      from text to numbers: byte-pair encoding
    optim.py          Muon, the learning-rate schedule, one step of all optimizers

Beside them stand the scripts train_mlm.py, train_ae.py and train_contrastive.py,
one for each method, and finetune.py, which measures what a run has learned.

What the scripts need, in three folders:

    evaluation/
        features.py      what an encoder says about whole texts and images
        probes.py        nearest neighbours, logistic regression, draws of labels
        ngrams.py        the baseline of texts: tf-idf, naive Bayes weights
        columns.py       a column of finetune.py's table
        classifier.py    an encoder with a linear layer, and its file
        text_table.py    the columns for texts
        co_training.py   texts: n-grams that also learn from texts without labels
        image_table.py   the columns for images
        self_training.py images: a probe that also learns from images without labels
        measurements.py  the table, printed and kept in a file
        load.py          a finished run, opened again
        previews.py      what training shows while it runs
    data/
        batches.py       random numbers and batches, as functions of the step
        splits.py        training, held-out and test examples; duplicates
        texts.py         texts as one array of tokens
        text_sources.py  docstrings, IMDb, your own files
        images.py        CIFAR-10, your own arrays
        shapes.py        images that our own code draws
    training/
        settings.py      a dataclass becomes the command line
        machine.py       device, precision, and what makes a CPU faster
        run.py           the folder of a run: log, checkpoints, resuming
        distributed.py   several processes
        files.py         downloads, archives, writing files safely
        accuracies.py    what finetune.py measured, grouped and averaged
        errors.py        errors of memory and of the compiler, in the libraries' words
        wording.py       numbers and names as words, for messages
        report.py        the page of a run, and its pictures

To add a method, copy examples/rotation.py. It holds in one file what a fork divides into
a lecture file, a script, and a line in MODELS of evaluation/load.py.

Imports run in one direction: scripts -> evaluation -> data -> training -> the lecture.
"""


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one sentence: what is wrong, then what to do. The scripts print it and
    exit with code 2.
    """


def __getattr__(name):
    """`minissl.load_encoder`, imported when it is first used.

    So importing one lecture file stays as light as the file itself.
    """
    if name == "load_encoder":
        from minissl.evaluation.load import load_encoder
        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
