"""The contrastive losses against loops, the augmentations against formulas, and what must never happen."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl import contrastive
from minissl.contrastive import ContrastiveModel, ImageEncoder, augment, byol_loss, crop_and_flip, info_nce, recolour


# ---------------------------------------------------------------- InfoNCE

def info_nce_by_loops(views, temperature, similarity):
    """views: NumPy (V, B, D). One term for each anchor and each of its positives."""
    V, B, _ = views.shape

    def s(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return dot / norms if similarity == "cosine" else dot
    terms = []
    for v in range(V):
        for b in range(B):
            others = [(w, c) for w in range(V) for c in range(B) if (w, c) != (v, b)]
            candidates = {o: s(views[v, b], views[o]) / temperature for o in others}
            largest = max(candidates.values())
            total = largest + math.log(sum(math.exp(x - largest) for x in candidates.values()))
            terms += [total - candidates[w, b] for w in range(V) if w != v]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("similarity, temperature", [("cosine", 0.5), ("cosine", 0.07), ("dot", 1.0), ("dot", 0.3)])
def test_info_nce_is_the_formula_by_value_and_gradient(V, similarity, temperature):
    views = np.random.default_rng(V).normal(size=(V, 4, 3))
    x = torch.tensor(views, requires_grad=True)
    loss = info_nce(x, temperature, similarity)
    assert loss.item() == pytest.approx(info_nce_by_loops(views, temperature, similarity), rel=1e-12)
    loss.backward()
    for place in np.ndindex(views.shape):                         # central differences of the loop
        up, down = views.copy(), views.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slope = (info_nce_by_loops(up, temperature, similarity)
                 - info_nce_by_loops(down, temperature, similarity)) / 2e-5
        assert float(x.grad[place]) == pytest.approx(slope, abs=1e-7)


def test_a_worked_example():
    """Two images, two views, all at right angles but for the positives, which agree: each row is softmax(1, 0, 0)."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    loss = info_nce(torch.tensor([[a, b], [a, b]]), temperature=1.0)
    assert float(loss) == pytest.approx(-math.log(math.e / (math.e + 2)))


def test_info_nce_ignores_self_similarity():
    """A column of its own for each embedding, long as it may be, enters its similarity with itself and no other one."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    own = (7 * torch.eye(6, dtype=torch.float64)).view(2, 3, 6).requires_grad_()
    loss = info_nce(torch.cat([x, own], dim=2), 0.5, "dot")
    loss.backward()
    torch.testing.assert_close(loss.detach(), info_nce(x, 0.5, "dot"))
    assert (own.grad.flatten(0, 1).diagonal() == 0).all() and own.grad.abs().sum() > 0


def test_the_order_of_samples_and_views_and_the_rotation_and_length_of_embeddings_do_not_matter():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    loss, turn = info_nce(x, 0.2), torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for other in (x[:, torch.randperm(5)], x[[2, 0, 1]], x @ turn, x * torch.rand(3, 5, 1) * 9):
        torch.testing.assert_close(info_nce(other, 0.2), loss)
    assert abs(info_nce(x[:, [1, 2, 3, 4, 0]][[0]].expand(3, -1, -1), 0.2) - loss) > 1e-3


@pytest.mark.parametrize("V, B", [(2, 2), (2, 37), (4, 8)])
def test_collapsed_embeddings_have_the_loss_of_a_guess(V, B):
    assert float(info_nce(torch.ones(V, B, 7), 0.1)) == pytest.approx(math.log(V * B - 1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_temperature_and_low_precision_do_not_overflow(dtype):
    x = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    loss = info_nce(x, 0.001)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):                    # the product of embeddings stays in float32
        torch.testing.assert_close(info_nce(x, 0.001), loss)


@pytest.mark.parametrize("views, options", [((1, 4, 3), {}), ((2, 1, 3), {}), ((2, 4, 3), dict(temperature=0)),
                                            ((2, 4, 3), dict(temperature=-1)), ((2, 4, 3), dict(similarity="l2"))])
def test_what_info_nce_cannot_compare_is_refused(views, options):
    with pytest.raises(ValueError, match="info_nce needs"):
        info_nce(torch.randn(*views), **options)


# ---------------------------------------------------------------- BYOL

def test_byol_loss_is_the_distance_of_unit_vectors_and_gives_the_target_no_gradient():
    rng = np.random.default_rng(0)
    q, z = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    wanted = np.mean([sum((a / np.linalg.norm(q[i]) - b / np.linalg.norm(z[i])) ** 2 for a, b in zip(q[i], z[i]))
                      for i in range(5)])
    prediction, target = torch.tensor(q, requires_grad=True), torch.tensor(z, requires_grad=True)
    loss = byol_loss(prediction, target)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    loss.backward()
    assert target.grad is None and prediction.grad.abs().sum() > 0


def test_the_target_takes_no_gradient_and_moves_by_exactly_its_rate_buffers_too():
    torch.manual_seed(0)
    model = ContrastiveModel(torch.zeros(3), torch.ones(3), byol=True)
    assert not any(p.requires_grad for p in model.target.parameters())
    online = [*torch.nn.Sequential(model.encoder, model.projection_head).state_dict().values()]
    before = [t.clone() for t in model.target.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(online, before))                  # it starts as a copy
    views = torch.rand(2, 4, 3, 16, 16)
    targets = model.project_by_target(views)
    assert all(torch.equal(a, b) for a, b in zip(model.target.state_dict().values(), before) if a.is_floating_point())
    loss = byol_loss(model.predict(model.project(views)).flatten(0, 1), targets.roll(1, 0).flatten(0, 1))
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    online = [t.clone() for t in torch.nn.Sequential(model.encoder, model.projection_head).state_dict().values()]
    model.update_target(0.75)
    moved = 0
    for old, new, now in zip(before, online, model.target.state_dict().values()):
        if now.is_floating_point():
            torch.testing.assert_close(now, 0.75 * old + 0.25 * new)
            moved += not torch.equal(old, now)
    assert moved > 20                                                              # running means among them
    assert not torch.equal(before[list(model.target.state_dict()).index("0.layers.1.running_mean")],
                           model.target[0].layers[1].running_mean)


def test_every_number_of_byols_projections_varies_as_much_as_every_other_its_targets_too():
    torch.manual_seed(0)
    views, spread = torch.rand(2, 32, 3, 16, 16), {}
    for byol in (False, True):
        model = ContrastiveModel(torch.zeros(3), torch.ones(3), byol=byol, width=8)
        projections = [model.project(views)] + ([model.project_by_target(views)] if byol else [])
        spread[byol] = [z.flatten(0, 1).std(0, correction=0) for z in projections]             # (D,) each
    assert all((s - 1).abs().max() < 0.01 for s in spread[True]) and (spread[False][0] - 1).abs().min() > 0.01


# ---------------------------------------------------------------- diagnostics

def test_alignment_uniformity_and_effective_rank_of_known_cases():
    apart = torch.eye(4)
    assert float(contrastive.alignment(torch.stack([apart, apart]))) == 0
    assert float(contrastive.alignment(torch.stack([apart, -apart]))) == pytest.approx(4)
    assert float(contrastive.uniformity(apart)) == pytest.approx(-4)               # every squared distance is 2
    assert float(contrastive.uniformity(torch.ones(5, 3))) == pytest.approx(0, abs=1e-5)
    spread = torch.cat([apart, -apart])                                            # centred, four equal directions
    assert float(contrastive.effective_rank(spread)) == pytest.approx(4, rel=1e-5)
    assert float(contrastive.effective_rank(torch.randn(50, 1) * torch.ones(1, 6))) == pytest.approx(1, rel=1e-2)
    assert float(contrastive.effective_rank(spread + 9)) == pytest.approx(4, rel=1e-4)             # of what varies
    z = torch.randn(2, 9, 4)                                                        # lengths say nothing
    torch.testing.assert_close(contrastive.alignment(z), contrastive.alignment(z * (0.1 + 9 * torch.rand(2, 9, 1))))
    torch.testing.assert_close(contrastive.uniformity(z[0]), contrastive.uniformity(5 * z[0]))


# ---------------------------------------------------------------- augmentations, one image at a time in NumPy

def bilinear(image, x, y):
    """image (C, H, W) at pixel coordinates (x, y), where pixel centres are whole numbers; the border repeats."""
    H, W = image.shape[1:]
    x, y = min(max(x, 0), W - 1), min(max(y, 0), H - 1)
    x0, y0 = min(int(x), W - 2), min(int(y), H - 2)
    u, v = x - x0, y - y0
    return ((1 - u) * (1 - v) * image[:, y0, x0] + u * (1 - v) * image[:, y0, x0 + 1]
            + (1 - u) * v * image[:, y0 + 1, x0] + u * v * image[:, y0 + 1, x0 + 1])


@pytest.mark.parametrize("H, W", [(12, 12), (9, 15)])
def test_crop_and_flip_is_bilinear_resampling_of_a_box(H, W):
    torch.manual_seed(0)
    images, numbers, crop, (h, w) = (torch.randint(0, 256, (6, 3, H, W), dtype=torch.uint8), torch.rand(6, 5),
                                     0.2, (6, 8))
    views = crop_and_flip(images, (h, w), numbers, crop, True)
    for image, n, view in zip(images.numpy() / 255.0, numbers.double().tolist(), views.double().numpy()):
        area, ratio = crop + (1 - crop) * n[0], (4 / 3) ** (2 * n[1] - 1)
        width, height = min(1, math.sqrt(area * ratio)) * W, min(1, math.sqrt(area / ratio)) * H
        left, top = n[2] * (W - width), n[3] * (H - height)
        for i in range(h):
            for j in range(w):
                column = w - 1 - j if n[4] < 0.5 else j
                wanted = bilinear(image, left + (column + 0.5) * width / w - 0.5, top + (i + 0.5) * height / h - 0.5)
                np.testing.assert_allclose(view[:, i, j], wanted, atol=2e-5)


def test_without_flip_no_view_is_mirrored():
    ramp = torch.arange(16.0).mul(16).byte().expand(64, 1, 16, 16)
    views = crop_and_flip(ramp, (8, 8), torch.rand(64, 5), 0.5, False)
    assert (views[..., -1] > views[..., 0]).all()


def test_recolour_is_brightness_contrast_saturation_hue_in_this_order():
    torch.manual_seed(0)
    x, numbers = torch.rand(20, 3, 4, 5) * 0.5 + 0.25, torch.rand(20, 7)
    result = recolour(x.clone(), numbers, jitter=0.2, hue=0.1, grey=0.3)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    kept = 0
    for image, n, got in zip(x.double().numpy(), numbers.double().tolist(), result.numpy()):
        b, c, s, turn = 1.0, 1.0, 1.0, 0.0
        if n[0] < 0.8:
            b, c, s = (1 + 0.2 * (2 * n[i] - 1) for i in (1, 2, 3))
            turn = 2 * math.pi * 0.1 * (2 * n[4] - 1)
        else:
            kept += 1
        if n[5] < 0.3:
            s = 0.0
        image = image * b
        mean = np.mean([to_yiq[0] @ image[:, i, j] for i in range(4) for j in range(5)])
        image = mean + c * (image - mean)
        for i in range(4):
            for j in range(5):
                y, u, v = to_yiq @ image[:, i, j]
                u, v = s * (math.cos(turn) * u - math.sin(turn) * v), s * (math.sin(turn) * u + math.cos(turn) * v)
                wanted = np.linalg.solve(to_yiq, [y, u, v]).clip(0, 1)
                np.testing.assert_allclose(got[:, i, j], wanted, atol=1e-5)
    assert 0 < kept < 20


def test_each_number_of_a_view_decides_one_thing():
    torch.manual_seed(0)
    images, numbers = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), torch.rand(40, 12)
    crops, other = crop_and_flip(images, (8, 8), numbers[:, :5], 0.2, True), numbers.clone()
    torch.testing.assert_close(augment(images, (8, 8), numbers), recolour(crops, numbers[:, 5:], 0.4, 0.1, 0.2))
    other[:, 4] = 1 - other[:, 4]    # the other side up: the same crop, in the same colours
    torch.testing.assert_close(augment(images, (8, 8), other), augment(images, (8, 8), numbers).flip(3),
                               atol=1e-5, rtol=0)


def test_grey_images_stay_grey_and_one_channel_works():
    grey = torch.rand(8, 1, 6, 6).expand(8, 3, 6, 6)
    result = recolour(grey.clone(), torch.rand(8, 7), 0.4, 0.2, 0.0)
    assert float((result - result[:, :1]).abs().max()) < 1e-4
    numbers = torch.rand(8, 7)
    one = recolour(grey[:, :1].clone(), numbers, 0.4, 0.2, 0.0)
    torch.testing.assert_close(one, recolour(grey.clone(), numbers, 0.4, 0.2, 0.0)[:, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("C", [1, 3])
def test_each_image_has_its_own_draw(C):
    image = torch.randint(0, 256, (1, C, 16, 16), dtype=torch.uint8)
    views = augment(image.expand(64, -1, -1, -1), (12, 12), torch.rand(64, 12)).flatten(1)
    assert torch.pdist(views).min() > 1e-3                         # 64 copies of one image, all views different
    assert views.min() >= 0 and views.max() <= 1
    alone = augment(image.expand(2, -1, -1, -1), (12, 12), numbers := torch.rand(2, 12))
    torch.testing.assert_close(augment(image, (12, 12), numbers[1:]), alone[1:])    # no image depends on its neighbours


# ---------------------------------------------------------------- the encoder

@pytest.mark.parametrize("B, H, W", [(1, 3, 3), (6, 9, 5), (7, 4, 7), (16, 6, 6), (8, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_images_of_a_batch_laid_side_by_side_do_not_touch(stride, B, H, W):
    """Whole numbers, which bfloat16 holds exactly: the wide images must give the very values and gradients of float32.
    (The library's own gradient in bfloat16 is no reference: of maps of 1 × 1 it has been seen to hold what lay in the
    memory.)"""
    torch.manual_seed(0)
    layer = contrastive.Convolution(4, 8, stride).to(torch.bfloat16)
    x, weight = torch.randint(-1, 2, (B, 4, H, W)).bfloat16(), torch.randint(-1, 2, layer.weight.shape)
    layer.weight.data.copy_(weight)
    x, plain, weight = x.requires_grad_(), x.float().requires_grad_(), weight.float().requires_grad_()
    y, wanted = layer(x), F.conv2d(plain, weight, padding=1, stride=stride)
    assert torch.equal(y, wanted.bfloat16())
    gradient = torch.randint(-1, 2, y.shape).float()
    for found, expected in zip(torch.autograd.grad(y, (x, layer.weight), gradient.bfloat16()),
                               torch.autograd.grad(wanted, (plain, weight), gradient)):
        assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("C, H, W", [(3, 32, 32), (1, 28, 28), (3, 33, 47), (1, 8, 8), (3, 64, 64)])
def test_the_encoder_takes_any_size(C, H, W):
    model = ContrastiveModel(torch.zeros(C), torch.ones(C))
    assert model.project(torch.rand(2, 3, C, H, W)).shape == (2, 3, 128)
    assert model.eval().encode(torch.rand(5, C, H, W)).shape == (5, 256)


def test_an_image_of_odd_size_is_padded_with_its_own_border():
    encoder, x = ImageEncoder(torch.zeros(3), torch.ones(3), width=8).eval(), torch.rand(2, 3, 9, 11)
    torch.testing.assert_close(encoder(x), encoder(F.pad(x, (0, 1, 0, 1), mode="replicate")))


def test_features_of_an_image_do_not_depend_on_the_batch_and_move_nothing():
    model = ContrastiveModel(torch.zeros(3), torch.ones(3)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.rand(7, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images)[3:4], model.encode(images[3:4]), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_every_parameter_receives_a_gradient():
    model = ContrastiveModel(torch.zeros(3), torch.ones(3))
    for block in model.encoder.layers:                             # their last scale starts at 0, so wake them up
        if hasattr(block, "norm2"):
            torch.nn.init.ones_(block.norm2.weight)
    info_nce(model.project(torch.rand(2, 8, 3, 16, 16))).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_encoder_is_the_network_that_its_docstring_counts():
    encoder, seen = ImageEncoder(torch.zeros(3), torch.ones(3)), []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.append(o[0, 0].numel() * m.weight.numel()))
    encoder(torch.rand(1, 3, 32, 32))
    assert round(sum(seen) / 1e6) == 49


def test_v_views_of_info_nce_reduce_to_cross_entropy_for_two():
    """With V = 2 and cosine it is NT-Xent: cross-entropy over the 2B × 2B matrix, labels i + B mod 2B."""
    x = torch.randn(2, 9, 5)
    z = F.normalize(x.flatten(0, 1), dim=1)
    s = (z @ z.T / 0.3).fill_diagonal_(float("-inf"))
    torch.testing.assert_close(info_nce(x, 0.3), F.cross_entropy(s, torch.arange(18).roll(9)))
