"""The autoencoder's loss against loops, the corruptions, the sizes, and what R does to codes."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_residual_block, slope

from minissl import autoencoder
from minissl.autoencoder import Autoencoder, autoencoder_loss, corrupt, normalize_patches


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the loss

def squared_error_by_loops(x, x_hat):
    B, C, H, W = x.shape
    error = 0.0
    for place in np.ndindex(x.shape):
        error += (x[place] - x_hat[place]) ** 2 / (C * H * W)
    return error / B


def sparse_by_loops(z):
    B, D = z.shape
    total = 0.0
    for b, i in np.ndindex(B, D):
        total += abs(z[b, i])
    return total / D / B


def decorrelated_by_loops(z):
    B, D = z.shape
    mean = [sum(z[:, i]) / B for i in range(D)]
    total = 0.0
    for i, j in np.ndindex(D, D):
        if i != j:
            products = [(z[b, i] - mean[i]) * (z[b, j] - mean[j]) for b in range(B)]
            covariance = sum(products) / (B - 1)
            total += covariance ** 2
    return total / D


PENALTIES = {
    "none": lambda z: 0.0,
    "sparse": sparse_by_loops,
    "decorrelated": decorrelated_by_loops,
}


@pytest.mark.parametrize("regularizer", PENALTIES)
def test_the_loss_equals_loops_by_value_and_gradient(regularizer):
    penalty_by_loops = PENALTIES[regularizer]
    rng = np.random.default_rng(0)
    image, rebuilt = rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(3, 2, 2, 3))
    code = rng.normal(size=(3, 4))

    def error_of(x_hat):
        return squared_error_by_loops(image, x_hat)

    def penalty_of(z):
        return 0.7 * penalty_by_loops(z)

    x = torch.tensor(image)
    x_hat, z = torch.tensor(rebuilt, requires_grad=True), torch.tensor(code, requires_grad=True)
    loss, error, penalty = autoencoder_loss(x, x_hat, z, 0.7, regularizer)
    assert error.item() == pytest.approx(error_of(rebuilt), rel=1e-12)
    assert penalty.item() == pytest.approx(penalty_by_loops(code), rel=1e-12)
    assert loss.item() == pytest.approx(error_of(rebuilt) + penalty_of(code), rel=1e-12)
    loss.backward()
    for place in np.ndindex(rebuilt.shape):
        expected = slope(error_of, rebuilt, place)
        assert x_hat.grad[place].item() == pytest.approx(expected, abs=1e-8)
    for place in np.ndindex(code.shape):
        expected = slope(penalty_of, code, place)
        found = 0.0 if z.grad is None else z.grad[place].item()
        assert found == pytest.approx(expected, abs=1e-8)


def test_the_sparse_loss_by_hand():
    x = torch.zeros(1, 1, 2, 2)
    z = torch.tensor([[3.0, -1.0]])
    loss, error, penalty = autoencoder_loss(x, x + 0.5, z, 2.0, "sparse")
    assert error.item() == 0.5 ** 2
    assert penalty.item() == (3 + 1) / 2
    assert loss.item() == 0.25 + 2 * 2


def test_the_decorrelated_loss_by_hand():
    """Two equal columns with variance 1: both entries beside the diagonal are 1, D is 2."""
    x = torch.zeros(1, 1, 2, 2)
    same = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    _, _, penalty = autoencoder_loss(x, x, same, 1.0, "decorrelated")
    assert penalty.item() == pytest.approx(1)


@pytest.mark.parametrize("regularizer", ["sparse", "decorrelated"])
def test_beta_means_the_same_for_every_image_size(regularizer):
    torch.manual_seed(0)
    x, x_hat, z = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.randn(4, 6)
    small = autoencoder_loss(x, x_hat, z, 1.0, regularizer)
    large = autoencoder_loss(
        x.repeat(1, 1, 2, 3), x_hat.repeat(1, 1, 2, 3), z, 1.0, regularizer
    )
    torch.testing.assert_close(small, large)


def test_beta_means_the_same_for_every_batch_and_code():
    torch.manual_seed(0)
    x, x_hat, z = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.randn(4, 6)
    small = autoencoder_loss(x, x_hat, z, 1.0, "sparse")
    five_times, twice = (5, 1, 1, 1), (5, 2)
    large = autoencoder_loss(
        x.repeat(five_times), x_hat.repeat(five_times), z.repeat(twice), 1.0, "sparse"
    )
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize("shape, beta, regularizer, sentence", [
    ((2, 3), -1.0, "sparse", "beta must be at least 0, but is -1"),
    ((2, 3), float("nan"), "none", "beta must be at least 0"),
    ((1, 3), 1.0, "decorrelated", "at least 2 codes, but there is 1"),
    ((2, 3), 1.0, "l2", "must be none, sparse or decorrelated, but is 'l2'"),
])
def test_what_the_loss_cannot_take_is_refused(shape, beta, regularizer, sentence):
    x = torch.zeros(shape[0], 1, 2, 2)
    with pytest.raises(ValueError, match=sentence):
        autoencoder_loss(x, x, torch.zeros(shape), beta, regularizer)


# ---------------------------------------------------------------- normalized patches

def normalized_by_loops(x, patch):
    normalized = np.empty_like(x)
    B, _, H, W = x.shape
    for b, i, j in np.ndindex(B, H, W):
        top, left = i - i % patch, j - j % patch
        square = x[b, :, top:top + patch, left:left + patch]  # smaller at the border
        mean = square.sum() / square.size
        variance = ((square - mean) ** 2).sum() / square.size
        normalized[b, :, i, j] = (x[b, :, i, j] - mean) / max(variance, 1e-6) ** 0.5
    return normalized


@pytest.mark.parametrize("shape, patch", [((2, 3, 8, 8), 4), ((2, 1, 7, 10), 4)])
def test_normalized_patches_equal_loops(shape, patch):
    x = np.random.default_rng(0).uniform(size=shape)
    found, mean, std = normalize_patches(torch.tensor(x), patch)
    np.testing.assert_allclose(found, normalized_by_loops(x, patch), rtol=1e-10)
    assert mean.shape == std.shape == (shape[0], 1, *shape[2:])


def test_the_loss_of_hidden_patches_equals_loops():
    """By value and by gradient. The images lose 1 and 2 of their four patches."""
    rng = np.random.default_rng(0)
    image, rebuilt = rng.uniform(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4))
    hidden = np.zeros((2, 1, 4, 4), bool)
    hidden[0, :, :2, 2:] = True
    hidden[1, :, 2:] = True
    target = normalized_by_loops(image, 2)

    def error_of(x_hat):
        total = 0.0
        for b in range(2):
            places = np.argwhere(hidden[b, 0])
            for i, j in places:
                for c in range(3):
                    error = (target[b, c, i, j] - x_hat[b, c, i, j]) ** 2
                    total += error / (3 * len(places)) / 2
        return total

    x_hat = torch.tensor(rebuilt, requires_grad=True)
    targets, _, _ = normalize_patches(torch.tensor(image), 2)
    loss, _, _ = autoencoder_loss(targets, x_hat, torch.zeros(2, 1), hidden=torch.tensor(hidden))
    assert loss.item() == pytest.approx(error_of(rebuilt), rel=1e-12)
    loss.backward()
    for place in np.ndindex(rebuilt.shape):
        expected = slope(error_of, rebuilt, place)
        assert x_hat.grad[place].item() == pytest.approx(expected, abs=1e-8)
    visible = ~torch.tensor(hidden).expand_as(x_hat)
    assert (x_hat.grad[visible] == 0).all()


def test_predicting_0_has_the_error_1():
    """So 1 is the chance level. Grey patches without a pattern are easier: they are 0."""
    x = torch.rand(4, 3, 32, 32, generator=draws())
    _, hidden = corrupt(x, masked=0.6, generator=draws())
    targets, _, _ = normalize_patches(x)
    z = torch.zeros(4, 2)
    error, _, _ = autoencoder_loss(targets, torch.zeros_like(x), z, hidden=hidden)
    assert error.item() == pytest.approx(1, abs=1e-5)
    flat = torch.full((4, 3, 32, 32), 0.7)
    targets, _, _ = normalize_patches(flat)
    error, _, _ = autoencoder_loss(targets, torch.zeros_like(x), z, hidden=hidden)
    assert error.item() < 1e-6


def test_a_patch_of_one_colour_keeps_its_hue():
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.9
    normalized, _, _ = normalize_patches(red)
    # (0.9, 0, 0) has the mean 0.3 and the standard deviation 0.3 · √2.
    expected = [2 / math.sqrt(2), -1 / math.sqrt(2), -1 / math.sqrt(2)]
    assert normalized[0, :, 3, 5].tolist() == pytest.approx(expected)


def test_brightness_and_contrast_do_not_change_a_normalized_patch():
    x = torch.rand(2, 3, 16, 16, generator=draws(), dtype=torch.float64)
    expected, _, _ = normalize_patches(x)
    found, _, _ = normalize_patches(0.5 * x + 0.2)
    torch.testing.assert_close(found, expected)


def test_mean_and_std_give_the_patches_back():
    x = torch.rand(2, 3, 20, 33, generator=draws(), dtype=torch.float64)
    normalized, mean, std = normalize_patches(x)
    torch.testing.assert_close(normalized * std + mean, x)


# ---------------------------------------------------------------- corruption

def patches_of(image):
    """{(row, column): (C, 8, 8)} of an image (C, 32, 32)."""
    patches = {}
    for i, j in np.ndindex(4, 4):
        patches[i, j] = image[:, 8 * i:8 * i + 8, 8 * j:8 * j + 8]
    return patches


def test_exactly_the_share_of_patches_is_hidden():
    torch.manual_seed(0)
    x = torch.rand(5, 3, 32, 32)
    kept = x.clone()
    y, hidden_pixels = corrupt(x, masked=0.6, generator=draws())
    assert torch.equal(x, kept)                               # the images were copied
    assert torch.equal(hidden_pixels, (x != y).any(1, keepdim=True))
    mean_colour = x.mean((0, 2, 3))[:, None, None]            # (C, 1, 1)
    hidden_places = set()
    for image, corrupted in zip(x, y):
        before, after = patches_of(image), patches_of(corrupted)
        hidden = [p for p in before if not torch.equal(before[p], after[p])]
        assert len(hidden) == round(0.6 * 16)
        for place in hidden:
            patch = after[place]
            torch.testing.assert_close(patch, mean_colour.expand_as(patch))
        hidden_places.add(tuple(hidden))
    assert len(hidden_places) == 5                            # each image has its own draw


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.5, 2), (0.95, 3)])
def test_of_four_patches_one_to_three_are_hidden(share, count):
    torch.manual_seed(0)
    x = torch.rand(5, 3, 16, 16)
    y, _ = corrupt(x, masked=share, generator=draws())
    changed = (x != y).any(1)                                 # (5, 16, 16)
    changed = changed.view(5, 2, 8, 2, 8).all(4).all(2)       # (5, 2, 2) patches
    assert changed.flatten(1).sum(1).tolist() == [count] * 5


def test_noise_has_its_std():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 32, 32)
    noisy, hidden = corrupt(x, noise=0.2, generator=draws())
    assert not hidden.any()
    noise = noisy - x
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    assert abs(float(noise.mean())) < 0.01


def test_without_corruption_the_images_stay():
    x = torch.rand(8, 3, 32, 32)
    y, hidden = corrupt(x)
    assert y is x
    assert hidden.shape == (8, 1, 32, 32) and not hidden.any()


def test_patches_at_the_border_may_be_smaller():
    y, hidden = corrupt(torch.rand(2, 1, 33, 47), masked=0.5)
    assert y.shape == hidden.shape == (2, 1, 33, 47)


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize("C, H, W", [
    (3, 32, 32), (1, 28, 28), (3, 33, 47), (1, 8, 9), (3, 64, 64),
])
def test_the_reconstruction_has_the_size_of_the_input(C, H, W):
    model = Autoencoder((H, W), torch.zeros(C), torch.ones(C), torch.eye(4 * C), code=16)
    x_hat, z = model(torch.rand(3, C, H, W))
    assert x_hat.shape == (3, C, H, W) and z.shape == (3, 16)
    assert model.eval().encode(torch.rand(5, C, H, W)).shape == (5, 18 * 64 + 16)


def squares(n):
    """Images (n, 1, 16, 16) of a bright 6 × 6 square on a dark ground, at a random place.

    Two numbers describe such an image, but no two numbers of a linear code do.
    """
    x = torch.full((n, 1, 16, 16), 0.2)
    places = torch.randint(0, 11, (n, 2), generator=draws(1)).tolist()
    for image, (i, j) in zip(x, places):
        image[:, i:i + 6, j:j + 6] = 0.9
    return x


@functools.cache
def trained_on_squares(regularizer="none", beta=0.0):
    """An autoencoder with 8 numbers in its code, after 60 steps on squares."""
    torch.manual_seed(0)
    images = squares(256)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    whitening = torch.eye(4 * len(mean)) / std.mean()
    model = Autoencoder((16, 16), mean, std, whitening, code=8, width=16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        batch = images[torch.randperm(len(images))[:64]]
        x_hat, z = model(batch)
        loss, _, _ = autoencoder_loss(batch, x_hat, z, beta, regularizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.train()


def test_an_autoencoder_rebuilds_better_than_pca():
    images, model = squares(256), trained_on_squares()
    with torch.no_grad():
        rebuilt, _ = model(images)
    error = float((rebuilt - images).square().mean())
    flat = images.flatten(1)
    values = torch.linalg.svdvals(flat - flat.mean(0))
    error_of_8_components = float(values[8:].square().sum()) / flat.numel()
    assert error < 0.8 * error_of_8_components


def test_each_regularizer_has_its_effect():
    images = squares(256)
    _, plain = trained_on_squares()(images)
    _, sparse = trained_on_squares("sparse", 1.0)(images)
    _, decorrelated = trained_on_squares("decorrelated", 1.0)(images)
    assert autoencoder.sparsity(sparse) > autoencoder.sparsity(plain) + 0.2
    assert autoencoder.correlation(decorrelated) < 0.5 * autoencoder.correlation(plain)


def test_sparsity_of_known_cases():
    torch.manual_seed(0)
    one_of_four = torch.tensor([[0.0, 0, 5, 0]]).T
    assert autoencoder.sparsity(one_of_four).item() == pytest.approx(3 / 4)
    never_zero = torch.tensor([[2.0, -2, 2, 2]]).T
    assert autoencoder.sparsity(never_zero).item() == pytest.approx(0)
    normal = torch.randn(20_000, 3)
    assert autoencoder.sparsity(normal).item() == pytest.approx(1 - 2 / np.pi, abs=0.01)
    unlike = torch.tensor([[2.0, -2, 2], [0.1, 0.1, -0.1]]).T     # each by its own scale
    assert autoencoder.sparsity(unlike).item() == pytest.approx(0, abs=1e-6)


def test_correlation_of_known_cases():
    torch.manual_seed(0)
    x = torch.randn(100, 1)
    opposite = torch.cat([x, -x], 1)
    assert autoencoder.correlation(opposite).item() == pytest.approx(1, abs=1e-4)
    three = torch.cat([x, -x, 2 * x], 1)
    assert autoencoder.correlation(three).item() == pytest.approx(1, abs=1e-4)
    with_a_constant = torch.cat([x, torch.ones(100, 1)], 1)
    assert autoencoder.correlation(with_a_constant).item() == 0
    unrelated = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert autoencoder.correlation(unrelated).item() == pytest.approx(0, abs=1e-6)
    a, b = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    related = torch.stack([a, 0.6 * a + 0.8 * b], 1)
    assert autoencoder.correlation(related).item() == pytest.approx(0.6)


@pytest.mark.parametrize("H, W", [(32, 32), (33, 20)])
def test_features_are_the_means_of_strips_and_the_code(H, W):
    """Each part has length 1. In torch the strips are an adaptive pooling."""
    torch.manual_seed(0)
    model = Autoencoder((H, W), torch.zeros(3), torch.ones(3), torch.eye(12), 8, width=8).eval()
    x = torch.rand(2, 3, H, W)
    seen = []

    def keep(layer, inputs, output):
        seen.append(output)

    for layer in (model.to_second[0], model.to_second[2], model.to_last):
        layer.register_forward_hook(keep)
    _, code = model(x)                                        # the hooks see each depth
    parts = []
    for maps, n in zip(seen, (2, 4, 2)):
        pooled = F.adaptive_avg_pool2d(maps, (n, 1))          # (2, C, n, 1)
        parts.append(pooled.transpose(1, 2).flatten(1))
    parts.append(code)
    expected = [part / part.norm(dim=1, keepdim=True) for part in parts]
    torch.testing.assert_close(model.encode(x), torch.cat(expected, 1))


def test_a_residual_block_begins_as_the_identity_and_adds_two_convolutions():
    block = autoencoder.ResidualBlock(8)
    first, second, last_norm = block.layers[0][0], block.layers[1], block.layers[2]
    assert_residual_block(block, first, second, last_norm)


def test_whitening_penalty_and_loss_are_computed_in_float32():
    torch.manual_seed(0)
    model = Autoencoder((16, 16), [0.5], [0.2], torch.randn(4, 4), code=8, width=8)
    x, z = torch.rand(4, 1, 16, 16), torch.randn(4, 6)
    halves = x.bfloat16(), (x + 0.1).bfloat16(), z.bfloat16()
    expected = autoencoder_loss(*[half.float() for half in halves], 0.5, "decorrelated")
    squares_of_x, penalty = model.prepare(x), autoencoder.covariance_penalty(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.prepare(x), squares_of_x)
        assert torch.equal(autoencoder.covariance_penalty(z), penalty)
        found = autoencoder_loss(*halves, 0.5, "decorrelated")
    for value, other in zip(found, expected):
        assert value.dtype == torch.float32
        assert torch.equal(value, other)


def squares_by_loops(images, mean):
    """All 2 × 2 squares of images (N, C, H, W), minus the mean, a row for each: (n, 4C)."""
    rows = []
    N, C, H, W = images.shape
    for b, i, j in np.ndindex(N, H // 2, W // 2):
        row = []
        for c, di, dj in np.ndindex(C, 2, 2):
            pixel = images[b, c, 2 * i + di, 2 * j + dj] / 255
            row.append(pixel - mean[c])
        rows.append(row)
    return np.array(rows)


def test_the_first_convolution_gets_whitened_squares():
    torch.manual_seed(0)
    matrix = torch.randn(12, 12)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    model = Autoencoder((8, 8), mean, std, matrix.tolist(), code=8, width=8)
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=draws())
    seen = []
    model.to_second[0][0].register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))
    model.eval()
    model(images / 255)
    model.encode(images / 255)
    assert len(seen) == 2
    expected = squares_by_loops(images.numpy(), mean) @ matrix.numpy().T
    for squares_seen in seen:                                             # (2, 12, 4, 4)
        found = squares_seen.permute(0, 2, 3, 1).flatten(0, 2)            # (2 · 4 · 4, 12)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_code_of_normalized_patches_is_decoded_as_it_is():
    """They have the scale of the patches, so mean and std of the images are not applied."""
    torch.manual_seed(0)
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])
    model = Autoencoder((16, 16), mean, std, torch.eye(4), code=8, width=8).eval()
    patches = Autoencoder((16, 16), mean, std, torch.eye(4), 8, width=8, targets="normalized")
    patches.eval()
    patches.load_state_dict(model.state_dict())
    z = torch.randn(3, 8)
    torch.testing.assert_close(patches.decode(z) * 0.2 + 0.4, model.decode(z))


def test_images_are_padded_with_their_border():
    torch.manual_seed(0)
    model = Autoencoder((9, 12), torch.zeros(1), torch.ones(1), torch.eye(4), 4, width=8).eval()
    whole = Autoencoder((16, 16), torch.zeros(1), torch.ones(1), torch.eye(4), 4, width=8).eval()
    whole.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 9, 12)
    padded = F.pad(x, (0, 4, 0, 7), mode="replicate")
    torch.testing.assert_close(model.prepare(x), whole.prepare(padded))


def test_images_of_another_size_are_refused():
    model = Autoencoder((32, 32), [0.5], [0.2], torch.eye(4), code=8, width=8)
    sentence = "the images have 64 × 64 pixels, but this model was made for 32 × 32"
    with pytest.raises(ValueError, match=sentence):
        model.encode(torch.rand(2, 1, 64, 64))


def test_no_weight_makes_a_code_larger_or_smaller():
    torch.manual_seed(0)
    model = Autoencoder((16, 16), torch.zeros(1), torch.ones(1), torch.eye(4), 4, width=8)
    for parameter in model.parameters():
        parameter.data *= 3
    _, z = model(torch.rand(64, 1, 16, 16))
    spread = z.std(0, correction=0)
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-2, rtol=0)


def test_every_parameter_receives_a_gradient():
    torch.manual_seed(0)
    model = Autoencoder((16, 16), torch.zeros(3), torch.ones(3), torch.eye(12), 8, width=8)
    for module in model.modules():
        if isinstance(module, autoencoder.ResidualBlock):
            last_norm = module.layers[-1]
            torch.nn.init.ones_(last_norm.weight)             # it starts at 0: wake the block up
    x = torch.rand(4, 3, 16, 16)
    x_hat, z = model(x)
    loss, _, _ = autoencoder_loss(x, x_hat, z, 0.1, "sparse")
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
