"""Device, precision, and the layers that are faster on a CPU and compute the same."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minissl import UserError, contrastive, transformer
from minissl.training import machine
from minissl.training.machine import AttentionByHand, WideConvolution, speed_up_on_cpu


CPU = torch.device("cpu")


# ---------------------------------------------------------------- device

def test_auto_takes_the_best_device_there_is(monkeypatch):
    for cuda, mps, expected in (
        (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        device, _ = machine.choose_device("auto")
        assert device.type == expected
        device, reason = machine.choose_device("cpu")
        assert (device.type, reason) == ("cpu", "as requested")


def test_a_device_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        sentence = f"--device {name}: torch does not find this device here; available: cpu"
        with pytest.raises(UserError, match=sentence):
            machine.choose_device(name)


# ---------------------------------------------------------------- precision

def test_an_automatic_precision_says_what_was_measured():
    precision, reason = machine.choose_precision("auto", CPU)
    assert precision in (torch.float32, torch.bfloat16)
    assert "measured" in reason and "GFLOP/s" in reason


@pytest.mark.parametrize("bfloat16_rate, expected", [
    (131, torch.bfloat16),
    (129, torch.float32),
    (1, torch.float32),                                       # emulated
])
def test_bfloat16_is_chosen_if_1_3_times_as_fast(bfloat16_rate, expected, monkeypatch):
    rates = {torch.float32: 100e9, torch.bfloat16: bfloat16_rate * 1e9}
    measured = []

    def rate(device, dtype, n=1536, seconds=0.3):
        measured.append((dtype, n))
        return rates[dtype]

    monkeypatch.setattr(machine, "matrix_product_rate", rate)
    precision, reason = machine.choose_precision("auto", CPU)
    assert precision == expected
    assert "float32 100 GFLOP/s" in reason
    # An emulated product is a hundred times slower, so the large one is not tried.
    assert ((torch.bfloat16, 1536) in measured) == (bfloat16_rate > 1)


def test_a_requested_precision_is_not_measured(monkeypatch):
    monkeypatch.setattr(machine, "matrix_product_rate", None)
    choice = machine.choose_precision("bfloat16", CPU)
    assert choice == (torch.bfloat16, "as requested, or as the run began")
    choice = machine.choose_precision("auto", torch.device("mps"))
    assert choice == (torch.float32, "the default on MPS")


def test_a_multiplication_and_its_addition_are_two_operations(monkeypatch):
    """With a clock that goes one second at each look. (conftest.py makes n 64 in tests.)"""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(machine, "time", clock)
    assert machine.matrix_product_rate(CPU, torch.float32) == 2 * 64**3


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_forward_pass_has_the_chosen_precision(precision):
    with machine.autocast_context(CPU, precision):
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == precision


def test_the_choice_is_printed_and_kept_in_the_settings(monkeypatch, capsys):
    def choose_bfloat16(name, device):
        return torch.bfloat16, "measured: enough"

    monkeypatch.setattr(machine, "choose_precision", choose_bfloat16)
    settings = SimpleNamespace(device="cpu", precision="auto")
    device, precision, autocast = machine.choose_machine(settings)
    assert (device, precision) == (CPU, torch.bfloat16)
    assert settings.precision == "bfloat16"                   # a resumed run takes the same
    printed = capsys.readouterr().out
    assert "device: cpu (as requested)" in printed
    assert "precision: bfloat16 (measured: enough)" in printed
    with autocast:
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.bfloat16


# ---------------------------------------------------------------- wide convolutions

def whole_numbers(*shape):
    """−1, 0 and 1: bfloat16 holds them, and small sums of their products, exactly."""
    return torch.randint(-1, 2, shape).float()


@pytest.mark.parametrize("B, H, W", [(1, 3, 3), (6, 9, 5), (7, 4, 7), (16, 6, 6), (8, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_wide_convolution_equals_a_plain_one(stride, B, H, W):
    """By value and gradient, exactly: the images that lie side by side do not touch.

    The reference is float32. torch's own gradient in bfloat16 is none: for maps of 1 × 1
    it has been seen to hold what lay in the memory.
    """
    torch.manual_seed(0)
    x = whole_numbers(B, 4, H, W)
    weight = whole_numbers(8, 4, 3, 3)
    layer = WideConvolution(4, 8, 3, stride=stride, padding=1, bias=False)
    layer.weight.data.copy_(weight)
    layer = layer.to(torch.bfloat16)
    wide_x = x.bfloat16().requires_grad_()
    x, weight = x.requires_grad_(), weight.requires_grad_()

    y = layer(wide_x)
    expected = F.conv2d(x, weight, padding=1, stride=stride)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())

    direction = whole_numbers(*y.shape)
    found = torch.autograd.grad(y, (wide_x, layer.weight), direction.bfloat16())
    wanted = torch.autograd.grad(expected, (x, weight), direction)
    for gradient, reference in zip(found, wanted):
        assert torch.equal(gradient, reference.bfloat16())


def test_in_float32_the_convolution_is_torchs_own():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    wide = WideConvolution(4, 8, 3, padding=1, bias=False)
    wide.load_state_dict(plain.state_dict())
    x = torch.randn(8, 4, 6, 6)
    assert torch.equal(wide(x), plain(x))


# ---------------------------------------------------------------- attention by hand

def attention_and_by_hand():
    """Two layers with the same random weights, and an input with some padding."""
    torch.manual_seed(0)
    plain, by_hand = transformer.Attention(16, 2), AttentionByHand(16, 2)
    nn.init.normal_(plain.output.weight, std=0.3)             # it starts at 0
    by_hand.load_state_dict(plain.state_dict())
    x = torch.randn(3, 7, 16)
    lengths = torch.tensor([7, 4, 1])
    visible = transformer.is_real(lengths, 7)[:, None, None]
    return plain, by_hand, x, visible


@pytest.mark.parametrize("has_padding", [False, True])
def test_attention_by_hand_equals_attention(has_padding, monkeypatch):
    """The formula itself, in float32, by value and gradient."""
    monkeypatch.setattr(machine, "is_bfloat16_on_cpu", lambda x: True)
    plain, by_hand, x, visible = attention_and_by_hand()
    visible = visible if has_padding else None
    direction = torch.randn(3, 7, 16)
    results = []
    for layer in (plain, by_hand):
        y = layer(x, visible)
        gradients = torch.autograd.grad(y, list(layer.parameters()), direction)
        results.append([y, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_attention_by_hand_in_bfloat16_is_close():
    plain, by_hand, x, visible = attention_and_by_hand()
    y = by_hand.to(torch.bfloat16)(x.bfloat16(), visible)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x, visible), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- swapping the layers

def models():
    pairs = torch.tensor([2 * 20 + 3])
    return [
        contrastive.SimCLR([0.5] * 3, torch.eye(12), width=8),
        contrastive.BYOL([0.5] * 3, torch.eye(12), width=8),
        transformer.TextEncoder(20, pairs, width=8, layers=2, heads=2, document_columns=4),
    ]


@pytest.mark.parametrize("model", models())
def test_speed_up_on_cpu_keeps_names_and_values(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    assert speed_up_on_cpu(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


def test_speed_up_on_cpu_swaps_all_layers_it_knows():
    simclr, byol, text = (speed_up_on_cpu(model) for model in models())
    for model, swapped, count in (
        (simclr, WideConvolution, 7),
        (byol, WideConvolution, 14),                          # of the target as well
        (text, AttentionByHand, 2),
    ):
        assert sum(type(module) is swapped for module in model.modules()) == count
        assert not any(type(module) is nn.Conv2d for module in model.modules())
        assert not any(type(module) is transformer.Attention for module in model.modules())


def test_a_sped_up_model_computes_the_same_in_bfloat16():
    torch.manual_seed(0)
    model = contrastive.SimCLR([0.5] * 3, torch.eye(12), width=8)
    views = torch.rand(2, 8, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(views)
        found = speed_up_on_cpu(model)(views)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


def test_a_system_without_glibc_is_no_error(monkeypatch):
    def no_library(name):
        raise OSError("no such library")

    monkeypatch.setattr(machine.ctypes, "CDLL", no_library)
    machine.keep_freed_memory()
