"""Run by torchrun (test_processes.py): N processes against one, in float64, different data in each, plain gradients.

Each task is written once, as its training script has it. The first time it runs as the only process there is, with the
whole batch; the second time as one of N, with its slice. Loss and gradients must be the same.
"""

import sys
from copy import deepcopy
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minissl import autoencoder, contrastive, processes, transformer
from minissl.processes import average_gradients, gather, share, share_batch_norm, sum_over

B = 8


def simclr(model, data):
    views = torch.stack([share(view) for view in data["views"]])
    return contrastive.info_nce(gather(model.project(views), 1), 0.2)


def byol(model, data):
    views = torch.stack([share(view) for view in data["views"]])
    projections = model.project(views)
    targets = model.project_by_target(views).roll(1, 0)
    return contrastive.byol_loss(model.predict(projections).flatten(0, 1), targets.flatten(0, 1))


def ae(model, data):
    images = share(data["views"][0])
    rebuilt, z = model(images)
    return autoencoder.autoencoder_loss(images, rebuilt, gather(z), 0.5, "decorrelated")[0]


def mlm(model, data):
    """Different numbers of masked tokens in each slice, and a document without words to guess."""
    tokens, lengths, bag = data["tokens"], data["lengths"], data["bag"]
    T, W = tokens.shape[1], processes.WORLD
    inputs, positions, targets = transformer.mask_tokens(tokens, lengths, 30, 0.3, torch.Generator().manual_seed(0))
    rows = torch.arange(B).tensor_split(W)[processes.RANK]
    part, low = slice(rows[0], rows[-1] + 1), rows[0] * T
    here = (positions >= low) & (positions < low + len(rows) * T)
    x = model(inputs[part], lengths[part])
    masked = transformer.masked_language_model_loss(model.token_logits(x.flatten(0, 1)[positions[here] - low]),
                                                    targets[here], len(targets) / W)
    filled = sum_over((bag[part].sum(1) > 0).sum()).clamp(min=1)
    z = transformer.norm(model.mean(x, lengths[part]).double())
    return masked + 4 * transformer.document_loss(model.term_head(z), bag[part], filled / W)


def main():
    processes.join(torch.device("cpu"))
    torch.manual_seed(0)
    data = dict(views=torch.rand(2, B, 3, 16, 16, dtype=torch.float64), tokens=torch.randint(2, 30, (B, 12)),
                lengths=torch.tensor([12, 3, 7, 12, 1, 9, 12, 5]), bag=torch.rand(B, 30, dtype=torch.float64))
    data["bag"][2] = 0
    mean, deviation = torch.zeros(3), torch.ones(3)
    models = [(simclr, contrastive.ContrastiveModel(mean, deviation, width=4)),
              (byol, contrastive.ContrastiveModel(mean, deviation, byol=True, width=4)),
              (ae, autoencoder.Autoencoder((16, 16), mean, deviation, 5, width=4)),
              (mlm, transformer.TextEncoder(30, torch.empty(0, dtype=torch.int64), 16, 1, 2, 12, 16))]
    world, rank = processes.WORLD, processes.RANK
    worst = 0.0
    for task, model in models:
        model = model.double().train()
        for p in model.parameters():                  # what starts at zero would hide a wrong gradient
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.3)
        if task is byol:
            model.target.load_state_dict(torch.nn.Sequential(model.encoder, model.projection_head).state_dict())
        alone, together = deepcopy(model), share_batch_norm(model)
        processes.WORLD, processes.RANK = 1, 0
        expected = task(alone, data)
        expected.backward()
        expected = expected.detach()
        processes.WORLD, processes.RANK = world, rank
        loss = task(together, data)
        loss.backward()
        average_gradients(together.parameters())
        loss = sum_over(loss.detach()) / world
        gradient = max(float((p.grad - q.grad).abs().max()) for p, q in zip(alone.parameters(), together.parameters())
                       if p.grad is not None)
        size = max(float(p.grad.abs().max()) for p in alone.parameters() if p.grad is not None)
        buffers = max([float((a - b).abs().max()) for a, b in zip(alone.buffers(), together.buffers()) if a.numel()]
                      + [0.0])
        print(f"{task.__name__}: loss {abs(float(loss - expected)):.1e}, "
              f"gradients {gradient:.1e} (largest {size:.1e}), running statistics {buffers:.1e}")
        worst = max(worst, abs(float(loss - expected)) / 1e-10, gradient / 1e-8, buffers / 1e-6)
    processes.leave()
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
