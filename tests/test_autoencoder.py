"""The autoencoder's loss against loops, its corruptions, its sizes, and what each regularizer does to the codes."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl import autoencoder
from minissl.autoencoder import Autoencoder, autoencoder_loss, corrupt


def loss_by_loops(x, x_hat, z, beta, regularizer):
    B, C, H, W = x.shape
    D = z.shape[1]
    error = sum(sum((x[place] - x_hat[place]) ** 2 for place in np.ndindex(x.shape) if place[0] == b) / (C * H * W)
                for b in range(B)) / B
    penalty = 0.0
    if regularizer == "sparse":
        penalty = sum(sum(abs(z[b, i]) for i in range(D)) / D for b in range(B)) / B
    if regularizer == "decorrelated":
        mean = [sum(z[b, i] for b in range(B)) / B for i in range(D)]
        for i in range(D):
            for j in range(D):
                if i != j:
                    covariance = sum((z[b, i] - mean[i]) * (z[b, j] - mean[j]) for b in range(B)) / (B - 1)
                    penalty += covariance**2 / D
    return error + beta * penalty


@pytest.mark.parametrize("regularizer", ["none", "sparse", "decorrelated"])
def test_the_loss_is_the_formula_by_value_and_gradient(regularizer):
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(3, 4))]
    x, x_hat, z = (torch.tensor(a, requires_grad=True) for a in given)
    loss, error, penalty = autoencoder_loss(x, x_hat, z, 0.7, regularizer)
    assert loss.item() == pytest.approx(loss_by_loops(*given, 0.7, regularizer), rel=1e-12)
    assert loss.item() == pytest.approx(error.item() + 0.7 * penalty.item(), rel=1e-12)
    loss.backward()
    for array, tensor in ((given[1], x_hat), (given[2], z)):
        for place in np.ndindex(array.shape):
            kept, slope = array[place], 0.0
            for sign in (1, -1):
                array[place] = kept + sign * 1e-5
                slope += sign * loss_by_loops(*given, 0.7, regularizer) / 2e-5
            array[place] = kept
            found = 0.0 if tensor.grad is None else tensor.grad[place].item()
            assert found == pytest.approx(slope, abs=1e-8)


def test_worked_examples():
    x, z = torch.zeros(1, 1, 2, 2), torch.tensor([[3.0, -1.0]])
    assert [t.item() for t in autoencoder_loss(x, x + 0.5, z, 2.0, "sparse")] == [0.25 + 2 * 2, 0.25, 2]
    same = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])                     # covariance 1 everywhere, D = 2
    assert autoencoder_loss(x, x, same, 1.0, "decorrelated")[2].item() == pytest.approx(1)


@pytest.mark.parametrize("regularizer", ["sparse", "decorrelated"])
def test_beta_means_the_same_at_every_size_of_image_batch_and_code(regularizer):
    """Everything repeated: pixels, images and columns. Neither term changes, but for the covariance, whose columns now
    come in equal pairs."""
    torch.manual_seed(0)
    x, x_hat, z = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.randn(4, 6)
    small = autoencoder_loss(x, x_hat, z, 1.0, regularizer)
    big = autoencoder_loss(x.repeat(1, 1, 2, 3), x_hat.repeat(1, 1, 2, 3), z, 1.0, regularizer)
    torch.testing.assert_close(small, big)
    if regularizer == "sparse":
        torch.testing.assert_close(small, autoencoder_loss(x.repeat(5, 1, 1, 1), x_hat.repeat(5, 1, 1, 1),
                                                           z.repeat(5, 2), 1.0, "sparse"))


@pytest.mark.parametrize("z, beta, regularizer, sentence", [
    ((2, 3), -1.0, "sparse", "beta must be at least 0"), ((2, 3), float("nan"), "none", "beta must be at least 0"),
    ((1, 3), 1.0, "decorrelated", "at least 2 codes"), ((2, 3), 1.0, "l2", "none, sparse or decorrelated")])
def test_what_the_loss_cannot_take_is_refused(z, beta, regularizer, sentence):
    with pytest.raises(ValueError, match=sentence):
        autoencoder_loss(torch.zeros(z[0], 1, 2, 2), torch.zeros(z[0], 1, 2, 2), torch.zeros(z), beta, regularizer)


# ---------------------------------------------------------------- corruption

def test_exactly_the_share_of_patches_is_hidden_in_each_image_elsewhere_nothing_changes():
    x = torch.rand(5, 3, 32, 32)
    kept = x.clone()
    y = corrupt(x, masked=0.6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, kept)                                                    # a copy
    places = []
    for image, original in zip(y, x):
        hidden = [(i, j) for i in range(4) for j in range(4)
                  if not torch.equal(image[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8],
                                     original[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8])]
        assert len(hidden) == round(0.6 * 16)
        for i, j in hidden:
            patch = image[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8]
            torch.testing.assert_close(patch, x.mean((0, 2, 3))[:, None, None].expand_as(patch))
        places.append(tuple(hidden))
    assert len(set(places)) == 5                                                   # each image has its own draw


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.5, 2), (0.95, 3)])
def test_of_few_patches_at_least_one_is_hidden_and_never_all(share, count):
    x = torch.rand(5, 3, 16, 16)
    y = corrupt(x, masked=share, generator=torch.Generator().manual_seed(0))
    changed = (x != y).any(1).unflatten(1, (2, 8)).unflatten(3, (2, 8)).all((2, 4))          # (5, 2, 2) patches
    assert changed.flatten(1).sum(1).tolist() == [count] * 5


def test_noise_has_its_deviation_and_no_corruption_is_none():
    x = torch.rand(8, 3, 32, 32)
    noise = corrupt(x, noise=0.2, generator=torch.Generator().manual_seed(0)) - x
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02) and abs(float(noise.mean())) < 0.01
    assert corrupt(x) is x
    assert corrupt(torch.rand(2, 1, 33, 47), masked=0.5).shape == (2, 1, 33, 47)


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize("C, H, W", [(3, 32, 32), (1, 28, 28), (3, 33, 47), (1, 8, 9), (3, 64, 64)])
def test_the_reconstruction_has_the_size_of_the_input(C, H, W):
    model = Autoencoder((H, W), torch.zeros(C), torch.ones(C), code=16)
    x_hat, z = model(torch.rand(3, C, H, W))
    assert x_hat.shape == (3, C, H, W) and z.shape == (3, 16)
    assert model.eval().encode(torch.rand(5, C, H, W)).shape == (5, 512)


@functools.cache
def trained(regularizer="none", beta=0.0):
    """An autoencoder after 60 steps on `structured` images, 8 numbers a code."""
    torch.manual_seed(0)
    images = structured(256)
    model = Autoencoder(images.shape[2:], images.mean((0, 2, 3)), images.std((0, 2, 3)), code=8, width=16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        batch = images[torch.randperm(len(images))[:64]]
        x_hat, z = model(batch)
        loss, _, _ = autoencoder_loss(batch, x_hat, z, beta, regularizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.train()


def structured(n):
    """A bright 6 × 6 square on a dark ground, at a random place: two numbers say all, but no linear code does."""
    x = torch.full((n, 1, 16, 16), 0.2)
    place = torch.randint(0, 11, (n, 2), generator=torch.Generator().manual_seed(1)).tolist()
    for image, (i, j) in zip(x, place):
        image[:, i:i + 6, j:j + 6] = 0.9
    return x


def test_the_autoencoder_rebuilds_better_than_pca_with_as_many_components():
    images = structured(256)
    model = trained()
    with torch.no_grad():
        error = float((model(images)[0] - images).square().mean())
    flat = images.flatten(1) - images.flatten(1).mean(0)
    left = torch.linalg.svdvals(flat)[8:].square().sum() / flat.numel()            # what 8 components lose
    assert error < 0.8 * float(left), (error, float(left))


def test_each_regularizer_has_its_effect():
    images = structured(256)
    plain, sparse, decorrelated = trained(), trained("sparse", 1.0), trained("decorrelated", 1.0)
    with torch.no_grad():
        codes = [model(images)[1] for model in (plain, sparse, decorrelated)]
    assert autoencoder.sparsity(codes[1]) > autoencoder.sparsity(codes[0]) + 0.2
    assert autoencoder.correlation(codes[2]) < 0.5 * autoencoder.correlation(codes[0])


def test_sparsity_and_correlation_of_known_cases():
    assert autoencoder.sparsity(torch.tensor([[0.0, 0, 5, 0]]).T).item() == pytest.approx(3 / 4)
    assert autoencoder.sparsity(torch.tensor([[2.0, -2, 2, 2]]).T).item() == pytest.approx(0)
    assert autoencoder.sparsity(torch.randn(20_000, 3)).item() == pytest.approx(1 - 2 / np.pi, abs=0.01)
    x = torch.randn(100, 1)
    assert autoencoder.correlation(torch.cat([x, -x], 1)).item() == pytest.approx(1, abs=1e-4)
    unrelated = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert autoencoder.correlation(unrelated).item() == pytest.approx(0, abs=1e-6)
    a, b = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    assert autoencoder.correlation(torch.stack([a, 0.6 * a + 0.8 * b], 1)).item() == pytest.approx(0.6)
    unlike = torch.tensor([[2.0, -2, 2], [0.1, 0.1, -0.1]]).T    # each column by its own scale
    assert autoencoder.sparsity(unlike).item() == pytest.approx(0, abs=1e-6)


def test_features_are_means_over_the_quadrants_of_the_map_before_the_last():
    model = Autoencoder((32, 32), torch.zeros(3), torch.ones(3), 8, width=8).eval()
    x = torch.rand(2, 3, 32, 32)
    maps, features = model.maps(x), model.encode(x).view(2, -1, 2, 2)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(features[:, :, i, j], maps[:, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4].mean((2, 3)))


def test_an_image_of_another_size_is_padded_with_its_own_border():
    model = Autoencoder((9, 12), torch.zeros(1), torch.ones(1), 4, width=8).eval()
    x, whole = torch.rand(2, 1, 9, 12), Autoencoder((16, 16), torch.zeros(1), torch.ones(1), 4, width=8).eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.maps(x), whole.maps(F.pad(x, (0, 4, 0, 7), mode="replicate")))


def test_an_image_of_another_size_than_the_models_is_refused():
    model = Autoencoder((32, 32), [0.5], [0.2], code=8, width=8)
    with pytest.raises(ValueError, match="images of 64 × 64, where this model was made for 32 × 32"):
        model.encode(torch.rand(2, 1, 64, 64))


def test_no_weight_makes_the_numbers_of_a_code_larger_or_smaller():
    model = Autoencoder((16, 16), torch.zeros(1), torch.ones(1), 4, width=8)
    for parameter in model.parameters():
        parameter.data *= 3
    _, z = model(torch.rand(64, 1, 16, 16))
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_every_parameter_receives_a_gradient():
    model = Autoencoder((16, 16), torch.zeros(3), torch.ones(3), 8, width=8)
    for module in model.modules():
        if isinstance(module, autoencoder.ResidualBlock):
            torch.nn.init.ones_(module.layers[-1].weight)                          # it starts at 0: wake the block up
    x = torch.rand(4, 3, 16, 16)
    autoencoder_loss(x, *model(x), 0.1, "sparse")[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
