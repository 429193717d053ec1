"""The optimizers of all scripts: Muon for matrices, Adam for the rest, one schedule.

A step along the gradient of a matrix mostly follows a few strong directions.
Muon makes the step orthogonal, so that every direction of the matrix learns at the
same speed. It trains the blocks of the text encoder, and every matrix and kernel of
the image models. torch's Adam trains everything else: the embeddings and output
layers of the text encoder, and the vectors of the image models.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
                        https://kellerjordan.github.io/posts/muon
    Kingma and Ba 2014, "Adam", arXiv 1412.6980

Differences from Jordan's post: the first convolution and the last layers of an image model learn
by Muon as well, and there may be weight decay.

This file needs torch alone. (torch 2.9 and later have a Muon of their own; it
refuses convolution kernels, and minissl also runs on older versions.)
"""

import torch


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal.

    With G the gradient, M the momentum and μ its decay, one step for W (out, in) is

        M ← μ M + G
        U = orthogonalize(G + μ M)                       Nesterov's momentum
        W ← (1 − lr · weight_decay) W − lr · √max(1, out / in) · U

    A convolution kernel (out, in, k, k) is treated as a matrix (out, in · k · k).

    Arguments: parameters, an iterable of tensors with at least two axes; lr, the
    learning rate; precision, the dtype of the orthogonalization (bfloat16 is enough).
    """

    def __init__(
        self, parameters, lr, momentum=0.95, weight_decay=0.0, precision=torch.float32
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(parameters, defaults)
        self.precision = precision

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter, group):
        gradient = parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        M, mu = state["momentum"], group["momentum"]
        M.mul_(mu).add_(gradient)
        nesterov = gradient.add(M, alpha=mu)
        matrix = nesterov.flatten(1)                          # (out, in · k · k)
        update = orthogonalize(matrix, self.precision)
        rows, columns = matrix.shape
        scale = max(1, rows / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalize(matrix, precision=torch.float32):
    """Approximately P Qᵀ for matrix = P S Qᵀ, of the same shape and dtype.

    Five steps of a Newton-Schulz iteration. Its polynomial a x + b x³ + c x⁵ moves the
    singular values above about 0.002 of the Frobenius norm to between 0.68 and 1.2, without
    computing any of them. Smaller ones grow, but do not get there.
    """
    # Jordan chose these so that small singular values grow fast (by 3.4 a step) and the others
    # stay near 1. They do not converge to 1.
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrix.to(precision)
    tall = X.shape[0] > X.shape[1]
    if tall:                                                  # the smaller product
        X = X.T
    X = X / (X.norm() + 1e-7)                                 # all singular values ≤ 1
    for _ in range(5):
        XXt = X @ X.T
        factor = torch.addmm(XXt, XXt, XXt, beta=b, alpha=c)  # b XXᵀ + c (XXᵀ)²
        X = torch.addmm(X, factor, X, beta=a)                 # a X + factor X
    if tall:
        X = X.T
    return X.to(matrix.dtype)


def muon_and_adam(model, lr, weight_decay=0.0, precision=torch.float32):
    """The two optimizers of an image model: [Muon, Adam].

    Muon trains matrices and kernels at the rate lr, with the weight decay. Adam trains vectors
    (batch norm's scales and shifts, biases) and single numbers at a tenth of lr, without.
    `step_optimizers` sets both rates anew at each step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    fused = trained[0].device.type != "mps"   # one kernel for all tensors; older MPS has none
    return [
        Muon(matrices, lr, weight_decay=weight_decay, precision=precision),
        torch.optim.Adam([dict(params=vectors, lr=0.1 * lr, lr_scale=0.1)], fused=fused),
    ]


def lr_schedule(step, steps, warmup, decay=0.5):
    """The share of the peak learning rate at one step, from 0 to 1.

    It is the smallest of three: a line that rises to 1 within `warmup` steps, 1, and a line
    that falls from 1 to 0 over the last steps, whose share of all is `decay`. If the two lines
    cross below 1, the rate never reaches its peak: in the scripts on images it gets to 0.95 of it.

    >>> [round(lr_schedule(s, 10, 2), 2) for s in range(10)]
    [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    """
    rising = (step + 1) / max(warmup, 1)
    falling = (steps - step) / max(decay * steps, 1)
    return min(1, rising, falling)


def step_optimizers(optimizers, lr):
    """One step of each optimizer, then the gradients are cleared.

    A parameter group learns at the rate lr times its own "lr_scale" (1 if it has none).
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        optimizer.step()
        optimizer.zero_grad()
