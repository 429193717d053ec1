"""A further pretext task in one file: which links are missing from this graph?

Hide some links of a graph, and let an encoder predict them from the others. The neighbours
of a node say much about the node itself, so the encoder learns about nodes without labels.

    z = Â relu(Â X W₀) W₁            Â = D^−½ (A + I) D^−½
    s_ij = z_i · z_j + b
    L = −½ (mean of log σ(s_ij) over links + mean of log σ(−s_ij) over non-links)

X holds the features of the nodes and A the links; D is diagonal and holds the row sums of
A + I. L is ln 2 for z = 0 and b = 0.

    Kipf and Welling 2016, "Variational Graph Auto-Encoders", arXiv 1611.07308: the
    autoencoder that is not variational

Differences from the paper:
- In each step the encoder sees one half of the training links and predicts the other half.
  In the paper it sees the links that it has to predict, but it will not see the test
  links. `--hide 0` does as the paper does.
- s has a bias b. Without it, two nodes with nothing in common (z_i · z_j = 0) are linked
  with probability ½. `--no-bias` does as the paper does.
- Each step draws as many non-links as links. The paper takes all non-links, weighted.
EXPERIMENTS.md, section "Graphs", measures the first two.

    python examples/graph.py                             the modules of this Python, 2 minutes
    python examples/graph.py --features none --run runs/graph-none      without their words
    python examples/graph.py --data links.csv --run runs/mine           your own links
    python examples/graph.py --run runs/graph --resume                  continue a run

links.csv has two columns. links.labels.csv beside it may give each node a class.
graph_data.py makes the graph and its splits, graph_baselines.py the tables. The codes of the
nodes are measured at the end of this script; finetune.py does not read its runs.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # to start it from anywhere

import graph_baselines as baselines
import graph_data

from minissl import UserError
from minissl.data.batches import generator
from minissl.optim import lr_schedule, step_optimizers
from minissl.training import distributed
from minissl.training.machine import choose_device, keep_freed_memory
from minissl.training.run import Run
from minissl.training.settings import read_settings, require_above, require_at_least, run_script


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    data: str = "modules"  # modules, or a .csv with a link in each line
    features: Literal["words", "none"] = "words"  # of docstrings; none: degree, random vectors
    run: str = "runs/graph"  # the folder of the run
    resume: bool = False  # continue the run in --run
    steps: int = 400  # optimizer steps
    learning_rate: float = 0.01  # of Adam
    width: int = 64  # numbers of a node after the first convolution
    size: int = 32  # numbers of a node in z
    hide: float = 0.5  # share of the training links that a step hides and asks for
    no_bias: bool = False  # leave out the bias b
    splits: int = 3  # how many splits of the links to learn from, side by side
    draws: int = 3  # of labels for each split, to predict the classes
    seed: int = 0  # of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that torch finds
    evaluate_every: int = 100  # steps between two previews
    save_every: float = 30  # seconds between two checkpoints

    def __post_init__(self):
        require_at_least(self, 1, "steps", "width", "size", "draws", "evaluate_every")
        require_at_least(self, 2, "splits")
        require_at_least(self, 0, "hide", "save_every")
        require_above(self, 0, "learning_rate")
        if self.hide > 0.9:
            raise UserError(f"--hide {self.hide}: must be at most 0.9, to leave some links")
        if distributed.WORLD_SIZE > 1:
            raise UserError("examples/graph.py runs in one process: start it with python")


# ---------------------------------------------------------------- The model

def convolve(h, links):
    """Â h: each node adds up its own vector and its neighbours', weighted by degrees.

    h (N, d); links (E, 2) int64, each once. Returns (N, d). The matrix Â is never built.
    """
    N = len(h)
    own = torch.arange(N, device=h.device)
    source = torch.cat([links[:, 0], links[:, 1], own])
    target = torch.cat([links[:, 1], links[:, 0], own])
    degree = torch.bincount(target, minlength=N).to(h.dtype)              # with itself
    weight = (degree[source] * degree[target]).rsqrt()                    # (2E + N,)
    # With two threads, the gradient of h[source] is added up in an order that changes from run to
    # run. That of index_select always has the same order.
    messages = weight[:, None] * h.index_select(0, source)
    return torch.zeros_like(h).index_add(0, target, messages)


class GraphAutoencoder(nn.Module):
    """Features of nodes and links between them -> codes z -> how likely a pair is linked.

    Arguments: features, their number F; width; size, of a code; has_bias.
    """

    def __init__(self, features, width=64, size=32, has_bias=True):
        super().__init__()
        self.W0 = nn.Parameter(torch.empty(features, width))
        self.W1 = nn.Parameter(torch.empty(width, size))
        self.b = nn.Parameter(torch.zeros(1), requires_grad=has_bias)
        nn.init.xavier_uniform_(self.W0)
        nn.init.xavier_uniform_(self.W1)

    def encode(self, x, seen):
        """Features (N, F) and the links that the encoder sees (S, 2) -> codes z (N, size)."""
        h = F.relu(convolve(x @ self.W0, seen))                           # (N, width)
        return convolve(h @ self.W1, seen)

    def logits(self, z, pairs):
        """s_ij (M,) of codes z (N, size) for pairs (M, 2)."""
        z_i, z_j = z.index_select(0, pairs[:, 0]), z.index_select(0, pairs[:, 1])
        return (z_i * z_j).sum(1) + self.b

    def forward(self, x, seen, asked, non_links):
        """The loss L of the links `asked`, when the encoder sees only the links `seen`."""
        z = self.encode(x, seen)
        return link_loss(self.logits(z, asked), self.logits(z, non_links))


def link_loss(link_logits, non_link_logits):
    """L: cross-entropy of links and non-links, both weighing one half."""
    of_links = -F.logsigmoid(link_logits).mean()
    of_non_links = -F.logsigmoid(-non_link_logits).mean()
    return (of_links + of_non_links) / 2


def make_models(settings, features):
    """For each split an encoder that sees its links, and the same one without any links.

    The second is a control: what the features alone tell about the links. Features without words
    hold the degrees, so then it also knows how many links a node has.
    """
    torch.manual_seed(settings.seed)
    models = nn.ModuleDict()
    for name in ("graph", "features_alone"):
        shape = features, settings.width, settings.size, not settings.no_bias
        models[name] = nn.ModuleList(GraphAutoencoder(*shape) for _ in range(settings.splits))
    return models


def main():
    settings = read_settings(Settings, __doc__)
    run = Run(settings)
    device, reason = choose_device(settings.device)
    print(f"device: {device} ({reason})")
    keep_freed_memory()

    # ------------------------------------------------------------ Data

    graph = graph_data.load_graph(settings.data)
    splits = [graph_data.LinkSplit(graph, settings.seed, n) for n in range(settings.splits)]
    xs = [graph_data.node_features(graph, settings, split).to(device) for split in splits]
    no_links = torch.empty(0, 2, dtype=torch.int64, device=device)
    print(
        f"data: {settings.data}, {len(graph.names):,} nodes with {xs[0].shape[1]:,} features, "
        f"{len(graph.links):,} links, {len(graph.classes)} classes"
    )
    for note in graph.notes:
        print(f"data: {note}")

    # ------------------------------------------------------------ Model

    models = make_models(settings, xs[0].shape[1]).to(device)
    trained = [p for p in models.parameters() if p.requires_grad]
    optimizers = [torch.optim.Adam(trained)]

    def learning_rate(step):
        return settings.learning_rate * lr_schedule(step, settings.steps, warmup=1)

    # ------------------------------------------------------------ Run

    @torch.no_grad()
    def codes(models, name):
        """For each split the codes z of all nodes, on the CPU."""
        of_splits = []
        for model, x, split in zip(models[name], xs, splits):
            seen = split.train.to(device) if name == "graph" else no_links
            of_splits.append(model.encode(x, seen).cpu())
        return of_splits

    def preview(models):
        return baselines.preview(codes(models, "graph"), splits, graph)

    first_step = run.begin(
        models,
        optimizers,
        data=f"{graph.describe()}, features: {settings.features}",
        method="graph",
        model_settings=dict(features=xs[0].shape[1], width=settings.width, size=settings.size),
        chance=dict(loss=math.log(2), features_alone=math.log(2)),
        preview=preview,
    )

    # ------------------------------------------------------------ Training

    # Each split has separate models. The mean over the splits divides every gradient by their
    # number, but a step of Adam does not depend on the scale of the gradient.
    for step in range(first_step, settings.steps):
        losses = dict(loss=[], features_alone=[])
        for n, (split, x) in enumerate(zip(splits, xs)):
            draws = generator(settings.seed, f"links {n}", step)
            parts = split.draw_step(settings.hide, draws)
            seen, asked, non_links = [part.to(device) for part in parts]
            with_links, alone = models["graph"][n], models["features_alone"][n]
            losses["loss"].append(with_links(x, seen, asked, non_links))
            losses["features_alone"].append(alone(x, no_links, asked, non_links))
        means = {name: torch.stack(values).mean() for name, values in losses.items()}
        sum(means.values()).backward()
        step_optimizers(optimizers, learning_rate(step))
        run.end_step(step, means, items=len(asked) * len(splits))

    # ------------------------------------------------------------ The tables

    run.finish(measure=None)
    untrained = make_models(settings, xs[0].shape[1]).to(device)
    inputs = [x.cpu() for x in xs]
    encoders = {
        "graph autoencoder": codes(models, "graph"),
        "untrained encoder": codes(untrained, "graph"),
        "smoothed features": baselines.smoothed_features(inputs, splits, convolve),
    }
    without_links = {"encoder without links": codes(models, "features_alone")}
    link_table = baselines.measure_links(encoders | without_links, splits)
    features = {"features alone": inputs}
    class_table = baselines.measure_classes(
        encoders | features, splits, graph, settings, convolve)
    baselines.print_tables(link_table, class_table)


if __name__ == "__main__":
    run_script(main)
