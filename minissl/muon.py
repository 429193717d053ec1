"""Muon optimizes the text encoder's blocks and every matrix and kernel of the image models, torch's Adam all else."""

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix learns at the same speed.

    For matrices and, flattened to (out, in · k · k), convolution kernels. Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks" (kellerjordan.github.io/posts/muon).
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.0, precision=torch.float32):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.precision = precision

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].mul_(group["momentum"]).add_(gradient)
                update = gradient.add(state["momentum"], alpha=group["momentum"]).flatten(1)     # Nesterov
                rows, columns = update.shape
                scale = max(1, rows / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalise(update, self.precision).view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalise(matrix, precision=torch.float32):
    """U Vᵀ for matrix = U S Vᵀ, nearly: five steps of a Newton–Schulz iteration whose polynomial pulls every singular
    value into about 0.7 … 1.2. bfloat16 is precise enough for that."""
    x = matrix.to(precision)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)  # 3.4445 x + (…a + …a²) x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
