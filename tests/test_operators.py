"""Which operators run on the device, so that Apple's MPS, which lacks many, can run all.

The tests run on a CPU. Each step is recorded from the moment when its batch has been cut to
this process's share, and moves to the device, to the end of the optimizers' step. Draws with
a generator are left out: a generator lives on the CPU, and so do the numbers drawn by it.
"""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_ae
import train_contrastive
import train_mlm
from minissl import autoencoder, contrastive, optim, transformer
from minissl.data.images import load_images
from minissl.evaluation.features import image_features
from minissl.evaluation.image_table import ImageOption, ImageTask
from minissl.training.run import Run


# All operators that may run on the device, by their names in PyTorch's native_functions.yaml.
ALLOWED = set("""
    abs add add_ addcdiv_ addcmul_ all bitwise_not clamp clamp_ clamp_min clamp_min_ cos div
    eq equal exp ge gt le lerp lerp_ lt maximum minimum mul mul_ ne neg pow rsub sgn sin sqrt
    sub

    alias arange cat clone constant_pad_nd copy_ detach empty expand eye fill_ lift_fresh
    new_ones new_zeros ones ones_like permute roll scalar_tensor slice slice_backward squeeze
    stack t transpose unbind unsqueeze view _to_copy _unsafe_view zeros zeros_like

    diagonal diagonal_backward index index_put masked_fill masked_fill_ nan_to_num
    scatter_add_ searchsorted select where

    linalg_vector_norm logsumexp mean sum _local_scalar_dense

    addmm baddbmm bmm mm mv

    affine_grid_generator convolution convolution_backward embedding
    embedding_dense_backward grid_sampler_2d native_batch_norm native_batch_norm_backward
    native_layer_norm native_layer_norm_backward nll_loss_backward nll_loss_forward
    pixel_shuffle pixel_unshuffle promote_types relu replication_pad2d threshold_backward
    _adaptive_avg_pool2d _log_softmax _log_softmax_backward_data

    _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward
""".split())

# F.scaled_dot_product_attention picks one of these by the device. On MPS it takes another
# one, or plain softmax(q kᵀ) v.
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Recorder(TorchDispatchMode):
    """Collects the operators that run inside of a `with` block, such as "add.Tensor".

    Fails at a float64 tensor, at a sparse tensor, and at a pooling of unequal cells.
    """

    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return result
        namespace, name = operator.name().split("::")
        if namespace == "aten":
            self.operators.add(name)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                assert value.dtype != torch.float64, f"{name}: float64"
                assert value.layout == torch.strided, f"{name}: {value.layout}"
        if name == "_adaptive_avg_pool2d":
            x, cells = args
            assert x.shape[2] % cells[0] == 0 and x.shape[3] % cells[1] == 0, x.shape
        return result


def assert_allowed(recorder):
    names = {name.split(".")[0] for name in recorder.operators}
    assert names, "nothing was recorded"
    assert names - ALLOWED == set()
    assert operators_missing_on_mps(recorder.operators) == []


# ---------------------------------------------------------------- what MPS has

def read_native_functions():
    """{operator: its entry} of the file from which PyTorch's dispatcher is generated."""
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    path = folder / "native_functions.yaml"
    if not path.exists():
        pytest.skip("this PyTorch comes without native_functions.yaml")
    entries = path.read_text(encoding="utf-8").split("\n- func: ")
    return {entry.split("(")[0]: entry for entry in entries}


def has_mps(name, entries):
    """Whether MPS has a kernel, or the operator is made of others on every device."""
    entry = entries[name]
    delegate = re.search(r"structured_delegate: (\S+)", entry)
    if delegate:                                              # the kernel of another variant
        return has_mps(delegate[1], entries)
    if "\n  dispatch:" not in entry:
        return True
    dispatch = entry.split("\n  dispatch:")[1]
    return re.search(r"^    [\w, ]*(MPS|Composite\w+)\b.*:", dispatch, re.MULTILINE) is not None


def operators_missing_on_mps(operators):
    entries = read_native_functions()
    missing = []
    for name in sorted(operators):
        if not name.startswith(ATTENTION) and not has_mps(name, entries):
            missing.append(name)
    return missing


def test_known_gaps_of_mps_are_seen():
    entries = read_native_functions()
    assert has_mps("add.Tensor", entries)                     # a kernel of another variant
    assert has_mps("grid_sampler_2d", entries)                # a kernel
    assert has_mps("logsumexp", entries)                      # made of others
    assert not has_mps("linalg_eig", entries)
    assert not has_mps("mode", entries)
    assert operators_missing_on_mps(["add.Tensor", "linalg_eig"]) == ["linalg_eig"]


# ---------------------------------------------------------------- the recorder itself

def test_the_recorder_sees_forward_and_backward():
    with Recorder() as recorder:
        x = torch.ones(2, 2, requires_grad=True)
        (x @ x).sum().backward()
    assert {"mm", "sum", "expand", "t"} <= recorder.operators


def test_the_recorder_leaves_out_draws_with_a_generator():
    with Recorder() as recorder:
        torch.rand(3, generator=torch.Generator())
    assert "rand.generator" not in recorder.operators


@pytest.mark.parametrize("operation, sentence", [
    (lambda: torch.ones(2).double(), "float64"),
    (lambda: torch.eye(2).to_sparse(), "sparse"),
    (lambda: torch.nn.functional.adaptive_avg_pool2d(torch.ones(1, 1, 5, 4), 2), "5, 4"),
])
def test_the_recorder_refuses_what_mps_cannot(operation, sentence):
    with pytest.raises(AssertionError, match=sentence), Recorder():
        operation()


# ---------------------------------------------------------------- steps of the scripts

SMALL_TEXTS = (
    "--steps 4 --embedding-steps 2 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 "
    "--vocabulary-size 400 --pairs 100 --device cpu --precision float32"
).split()
SMALL_IMAGES = (
    "--limit 40 --steps 2 --batch-size 16 --width 8 --device cpu --precision float32"
).split()


def use_adam_as_on_mps(monkeypatch):
    """The scripts ask for the fused Adam on all devices but MPS."""
    adam = torch.optim.Adam

    def plain_adam(*arguments, fused=None, **options):
        return adam(*arguments, fused=False, foreach=False, **options)

    monkeypatch.setattr(torch.optim, "Adam", plain_adam)


@pytest.fixture
def record_steps(run_script, tmp_path, monkeypatch):
    """record_steps(script, flags) -> the Recorder of all steps of the script."""
    use_adam_as_on_mps(monkeypatch)

    def record(script, flags):
        recorder = Recorder()
        shard, end_step = script.shard, Run.end_step
        steps = []

        def shard_and_start(*tensors):
            recorder.__enter__()
            return shard(*tensors)

        def stop_and_end_step(self, step, *arguments, **options):
            recorder.__exit__(None, None, None)
            steps.append(step)
            return end_step(self, step, *arguments, **options)

        monkeypatch.setattr(script, "shard", shard_and_start)
        monkeypatch.setattr(Run, "end_step", stop_and_end_step)
        code, printed = run_script(script, "--run", tmp_path / "run", *flags)
        assert code == 0, printed
        assert len(steps) >= 2
        return recorder

    return record


def test_both_stages_of_the_text_step(record_steps, corpus, tmp_path):
    data = ["--data", corpus, "--data-dir", tmp_path]
    recorder = record_steps(train_mlm, [*data, *SMALL_TEXTS])
    assert {"scatter_add_", "searchsorted.Tensor", ATTENTION} <= recorder.operators
    assert_allowed(recorder)


@pytest.mark.parametrize("flags", [
    [],
    ["--beta", 0.1, "--regularizer", "sparse"],
    ["--beta", 0.1, "--regularizer", "decorrelated"],
    ["--noise", 0.1, "--masked", 0.5],
])
def test_the_autoencoder_step(flags, record_steps):
    recorder = record_steps(train_ae, [*SMALL_IMAGES, *flags])
    assert {"convolution_backward", "pixel_shuffle"} <= recorder.operators
    assert_allowed(recorder)


@pytest.mark.parametrize("flags", [
    ["--method", "simclr"],
    ["--method", "simclr", "--views", 3, "--similarity", "dot"],
    ["--method", "byol"],
])
def test_the_contrastive_step(flags, record_steps):
    recorder = record_steps(train_contrastive, [*SMALL_IMAGES, *flags])
    assert {"convolution_backward", "grid_sampler_2d"} <= recorder.operators
    assert_allowed(recorder)


def test_views_of_grey_images():
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    with Recorder() as recorder:
        numbers = torch.rand(4, 11, generator=torch.Generator())
        contrastive.augment(images, (12, 12), numbers, **contrastive.VIEWS_OF_PHOTOGRAPHS)
    assert_allowed(recorder)


def test_corruption_with_patches_chosen_on_the_cpu(monkeypatch):
    x = torch.rand(4, 3, 32, 32)
    hidden = autoencoder.choose_patches(x.shape, 0.5, 8, torch.Generator())
    monkeypatch.setattr(autoencoder, "choose_patches", lambda *arguments: hidden)
    with Recorder() as recorder:
        autoencoder.corrupt(x, noise=0.1, masked=0.5, generator=torch.Generator())
    assert_allowed(recorder)


def test_adam_with_one_loop_over_all_tensors():
    """torch's default on newer Macs: a _foreach_ operator for each line of Adam."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    model(torch.ones(2, 3)).sum().backward()
    with Recorder() as recorder:
        optim.step_optimizers([optimizer], 0.1)
    assert any(name.startswith("_foreach_") for name in recorder.operators)
    assert operators_missing_on_mps(recorder.operators) == []


# ---------------------------------------------------------------- encode and previews

def text_encoder():
    pairs = torch.tensor([2 * 20 + 3, 5 * 20 + 7])
    return transformer.TextEncoder(20, pairs, width=8, layers=1, heads=2, document_columns=4)


def image_models():
    return [
        autoencoder.Autoencoder((33, 20), [0.5] * 3, [0.2] * 3, torch.eye(12), code=8, width=8),
        contrastive.SimCLR([0.5] * 3, torch.eye(12), width=8),
    ]


def test_encode_of_texts():
    model = text_encoder().eval()
    tokens, lengths = torch.randint(2, 20, (4, 9)), torch.tensor([9, 3, 1, 5])
    with Recorder() as recorder, torch.no_grad():
        model.encode(tokens, lengths)
        model.token_logits(model(tokens)[:, 0])
    assert_allowed(recorder)


@pytest.mark.parametrize("model", image_models())
def test_encode_of_images(model):
    images = torch.zeros(6, 3, 33, 20, dtype=torch.uint8)
    with Recorder() as recorder:
        image_features(model.eval().encode, images, nullcontext())
    assert_allowed(recorder)


def test_the_preview_of_an_autoencoder():
    model, _ = image_models()
    with Recorder() as recorder, torch.no_grad():
        x = torch.zeros(6, 3, 33, 20)
        rebuilt, z = model.eval()(x)
        start, end = z[:2].float(), z.roll(1, 0)[:2].float()
        model.decode(start.lerp(end, 0.5))
        autoencoder.autoencoder_loss(x, rebuilt, z)
        autoencoder.sparsity(z)
        autoencoder.correlation(z)
    assert_allowed(recorder)


# ---------------------------------------------------------------- fine-tuning of images

@pytest.mark.parametrize("freeze_norm", [False, True])
def test_fine_tuning_of_images(freeze_norm, monkeypatch):
    use_adam_as_on_mps(monkeypatch)
    data = load_images("shapes", limit=40)
    model = contrastive.SimCLR([0.5] * 3, torch.eye(12), width=8)
    machine = torch.device("cpu"), torch.float32, nullcontext()
    task = ImageTask(data, model, machine, new_model=None, flip=True, code=None)
    fitted = {"linear probe": task.probe.fit(task.train[:16])}
    classifier = task.fit_fine_tuned(task.train[:16], ImageOption(0.0, 0.5), 0, fitted)
    with Recorder() as recorder:
        task.train_classifier(
            classifier, task.train[:16], ImageOption(0.01, 0.5, freeze_norm=freeze_norm), seed=0,
            smoothing=0.1, images_seen=48,
        )
        image_features(classifier, task.images.select(np.arange(4)), nullcontext())
    assert {"convolution_backward", "grid_sampler_2d"} <= recorder.operators
    assert_allowed(recorder)


# ---------------------------------------------------------------- autocast

def test_a_device_without_autocast_is_never_asked_for_it(monkeypatch):
    """torch 2.4 raises an error for torch.autocast("mps"), and for the question after it."""
    def refuse(*arguments, **options):
        raise RuntimeError("unsupported autocast device_type")

    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", lambda device: False)
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        monkeypatch.setattr(torch, name, refuse)
    contrastive.info_nce(torch.randn(2, 4, 8), 0.5)
    x, z = torch.rand(4, 3, 8, 8), torch.randn(4, 5)
    autoencoder.autoencoder_loss(x, x, z, beta=0.1, regularizer="decorrelated")
    model = text_encoder()
    model(torch.full((2, 6), 7))
