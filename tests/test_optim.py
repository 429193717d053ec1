"""Muon against the singular value decomposition, the schedule, and one step of all optimizers."""

import pytest
import torch
from torch import nn

from minissl.optim import (
    Muon,
    lr_schedule,
    muon_and_adam,
    orthogonalize,
    step_optimizers,
)


# ---------------------------------------------------------------- the schedule

def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [lr_schedule(step, 100, warmup=10, decay=0.5) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1
    assert rates[50] == 1
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)                   # the last step still learns
    assert rates[100] == 0
    assert min(rates[:100]) > 0


# ---------------------------------------------------------------- Muon

@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_orthogonalize_keeps_directions_and_evens_lengths(shape):
    """M = U S Vᵀ becomes U S' Vᵀ, with all of S' near 1."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    lengths = u.T @ orthogonalize(matrix) @ v.T
    beside_the_diagonal = lengths - torch.diag(lengths.diagonal())
    assert beside_the_diagonal.abs().max() < 1e-3
    assert lengths.diagonal().min() > 0.6                     # about 0.7 to 1.2
    assert lengths.diagonal().max() < 1.3


def test_orthogonalize_of_a_rotation_by_hand():
    """All singular values of X / ‖X‖ are 1/√2. Five times a x + b x³ + c x⁵ gives s."""
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    s = 1 / 2**0.5
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(3 * rotation), s * rotation)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (8, 3, 3, 3)])
def test_muon_steps_by_the_orthogonal_matrix(shape):
    """By √max(1, out / in) times that matrix. A kernel counts as (out, in · k · k)."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = gradient.clone()
    Muon([parameter], lr=1.0).step()
    matrix = gradient.flatten(1)
    rows, columns = matrix.shape
    scale = max(1, rows / columns) ** 0.5
    moved = -parameter.detach().flatten(1)
    torch.testing.assert_close(moved, scale * orthogonalize(matrix), rtol=1e-3, atol=1e-4)


def test_muon_computes_in_the_precision_it_is_given():
    torch.manual_seed(0)
    gradient = torch.randn(4, 4)
    moved = []
    for precision in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(4, 4))
        parameter.grad = gradient.clone()
        Muon([parameter], lr=1.0, precision=precision).step()
        moved.append(parameter.detach())
    assert not torch.equal(*moved)
    torch.testing.assert_close(*moved, rtol=0, atol=0.1)


def test_muon_decays_weights_beside_the_momentum():
    parameter = nn.Parameter(torch.full((3, 2), 4.0))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5)
    for expected in (4 * 0.95, 4 * 0.95**2):
        parameter.grad = torch.zeros(3, 2)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.full((3, 2), expected))


def test_muon_sums_gradients_in_its_momentum():
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([parameter], lr=0.0, momentum=0.5)
    for _ in range(3):
        parameter.grad = torch.eye(2)
        optimizer.step()
    momentum = optimizer.state[parameter]["momentum"]
    assert momentum.tolist() == [[1.75, 0], [0, 1.75]]        # 1 + 1/2 + 1/4


def test_muon_looks_ahead_as_nesterov_does():
    """Of a matrix with one row, only the direction of the step counts."""
    row = nn.Parameter(torch.zeros(1, 2))
    optimizer = Muon([row], lr=1.0, momentum=0.5)
    for gradient in ([1.0, 0.0], [0.0, 1.0]):
        before = row.detach().clone()
        row.grad = torch.tensor([gradient])
        optimizer.step()
    moved = before - row.detach()
    # The gradient (0, 1), plus half of the momentum (1/2, 1).
    assert float(moved[0, 0] / moved[0, 1]) == pytest.approx(0.25 / 1.5, rel=1e-4)


def test_muon_leaves_a_parameter_without_gradient_alone():
    parameter = nn.Parameter(torch.ones(2, 2))
    Muon([parameter], lr=1.0, weight_decay=1.0).step()
    assert torch.equal(parameter.detach(), torch.ones(2, 2))


# ---------------------------------------------------------------- both optimizers

def test_muon_gets_the_matrices_and_adam_the_vectors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    model.append(frozen)
    muon, adam = muon_and_adam(model, 0.02)
    convolution, norm, linear, _ = model
    assert muon.param_groups[0]["params"] == [convolution.weight, linear.weight]
    vectors = [convolution.bias, norm.weight, norm.bias, linear.bias]
    assert adam.param_groups[0]["params"] == vectors


def test_adam_also_gets_a_single_number():
    model = nn.Linear(2, 2)
    model.temperature = nn.Parameter(torch.tensor(0.1))
    _, adam = muon_and_adam(model, 0.02)
    assert any(p is model.temperature for p in adam.param_groups[0]["params"])


def test_a_step_uses_each_groups_own_rate():
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    plain = torch.optim.SGD([dict(params=[first]), dict(params=[second], lr_scale=0.1)], lr=9.0)
    other = torch.optim.SGD([third], lr=9.0)
    for parameter in (first, second, third):
        parameter.grad = torch.ones(1)
    step_optimizers([plain, other], 0.5)
    moved = [-p.item() for p in (first, second, third)]
    assert moved == pytest.approx([0.5, 0.05, 0.5])


def test_after_a_step_no_gradient_is_left():
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    step_optimizers([torch.optim.SGD([parameter], lr=1.0)], 0.5)
    assert parameter.grad is None
