"""TreeNet: members share their early layers and branch after them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from ray_subnets import masks
from ray_subnets.baselines.fitting import check_members
from ray_subnets.baselines.method import Bench, Build, Method, Progress, Trained
from ray_subnets.data import Batch
from ray_subnets.inputs import made_up
from ray_subnets.models.wide_resnet import WideResNet
from ray_subnets.recipes import Count, Training, derive
from ray_subnets.supervised import Objective

FITS = "networks fit that torch.fx can trace and that narrow to one tensor between layers"
_BY_MODE = {  # functions that are told at tracing whether this is training
    *[functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d],
    *[functional.alpha_dropout, functional.feature_alpha_dropout, functional.batch_norm],
}


class Tree(nn.Module):
    """`(N, *shape)` -> `(M, N, C)`: the trunk once, then every branch."""

    def __init__(self, trunk: nn.Module, branches: list[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.branches = trunk, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.trunk(x)
        return torch.stack([branch(shared) for branch in self.branches])


def _traced(model: nn.Module) -> fx.Graph:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # the tracer raises whatever the network's code runs into
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"tree_net: cannot trace this network ({reason}); {FITS}") from None
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _BY_MODE:
            name = getattr(node.target, "__name__", "")
            raise ValueError(
                f"tree_net: this network calls the function {name}; use its layer from torch.nn"
            )
    return graph


def _cuts(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose output is all that later ones read of what was computed before."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    place = {node: i for i, node in enumerate(nodes)}
    last = {node: max((place[user] for user in node.users), default=0) for node in nodes}
    found, reach = [], 0  # how far anything before is read
    for i, node in enumerate(nodes[:-1]):
        if node.op != "placeholder" and reach <= i:
            found.append(node)
        reach = max(reach, last[node])
    return found


def _layers_until(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, int]:
    """Convolution and linear layers that have run once a node is done."""
    count, result = 0, {}
    for node in graph.nodes:
        if node.op == "call_module":
            count += isinstance(model.get_submodule(str(node.target)), masks.MASKABLE)
        result[node] = count
    return result


def _halves(model: nn.Module, graph: fx.Graph, cut: fx.Node) -> tuple[nn.Module, nn.Module]:
    """The network as two: up to `cut`, and what follows; their layers are those of `model`."""
    halves = fx.Graph(), fx.Graph()
    known: list[dict[fx.Node, fx.Node]] = [{}, {cut: halves[1].placeholder("shared")}]
    part = 0
    for node in graph.nodes:
        if node.op == "get_attr":  # a weight that the code names: for whoever reads it
            for half, nodes in list(zip(halves, known, strict=True))[part:]:
                nodes[node] = half.node_copy(node)
            continue
        known[part][node] = halves[part].node_copy(node, known[part].__getitem__)
        if node is cut:
            halves[0].output(known[0][cut])
            part = 1
    for half in halves:
        for node in list(half.nodes):
            if node.op == "get_attr" and not node.users:
                half.erase_node(node)
    return fx.GraphModule(model, halves[0], "Trunk"), fx.GraphModule(model, halves[1], "Branch")


@dataclass(frozen=True, kw_only=True)
class TreeNet(Method):
    """A shared trunk and M copies of what follows, each with initial weights of its own.

    Published (Lee et al. 2015): losses of the branches are summed. Where Table 5.2 splits a wide
    ResNet is not stated; its 1.52x FLOPs are nearest to a split after the first block of the third
    group: 1.54x or 1.48x, by which convolution of a block has the stride.
    """

    title: ClassVar[str] = "TreeNet-like"
    source: ClassVar[str] = "Lee et al. 2015"
    deviation: ClassVar[str] = "the published code is not known; trained as a single model is"
    method: Literal["tree_net"] = "tree_net"
    members: Count = 3
    """branches"""
    split: Annotated[float, Gt(0), Lt(1)] | str | None = None
    """fraction of the layers that is shared, or the name of the last module that is; default: in a
    wide ResNet up to the first block of the third group, else a half"""

    def _where(self, model: nn.Module, graph: fx.Graph) -> fx.Node:
        split = self.split
        if split is None:
            split = f"blocks.{len(model.blocks) * 2 // 3}" if isinstance(model, WideResNet) else 0.5
        cuts, done = _cuts(graph), _layers_until(model, graph)
        total = max(done.values())
        cuts = [node for node in cuts if 0 < done[node] < total]
        if not cuts:
            raise ValueError(f"tree_net: this network has no place to branch; {FITS}")
        if isinstance(split, str):
            return _named(graph, cuts, split)
        # Of places with the same layers before them the last: less is done in each branch.
        return min(reversed(cuts), key=lambda node: (abs(done[node] - split * total), done[node]))

    def network(self, build: Build, seed: int) -> nn.Module:
        model = build(seed)
        graph = _traced(model)
        cut = self._where(model, graph)
        trunk, branch = _halves(model, graph, cut)
        branches = [branch]
        for m in range(1, self.members):
            branches.append(_halves(build(derive(seed, "branch", m)), graph, cut)[1])
        return Tree(trunk, branches)

    def objective(self, training: Training) -> Objective:
        """Sum over branches of their cross-entropy, summed over images."""
        loss = partial(cross_entropy, reduction="sum", label_smoothing=training.label_smoothing)

        def summed(model: nn.Module, batch: Batch) -> Tensor:
            logits = model(batch.x).float()
            return loss(logits.flatten(0, 1), batch.y.repeat(self.members))

        return summed

    def train(self, bench: Bench) -> Generator[Progress, None, Trained]:
        model = self.network(bench.build, derive(bench.seed, "weights", 0)).to(bench.device)
        check_members(model, self.members, bench.data, "tree_net", FITS)
        _check_apart(model, bench)
        yield from bench.fit(
            model,
            bench.training,
            seed=derive(bench.seed, "fit", 0),
            objective=self.objective(bench.training),
        )
        return Trained(networks=[model])


def _named(graph: fx.Graph, cuts: list[fx.Node], name: str) -> fx.Node:
    """The cut after the last node of module `name`."""
    inside = [node for node in graph.nodes if name in _owners(node)]
    if not inside:
        raise ValueError(f"split: {name!r} is not a module that this network runs")
    if inside[-1] not in cuts:
        known = [owner for cut in cuts for owner in _ends(graph, cut)]
        raise ValueError(
            f"split: what follows {name!r} reads more than its output, or has no layers; "
            f"possible: {', '.join(dict.fromkeys(known))}"
        )
    return inside[-1]


def _owners(node: fx.Node) -> list[str]:
    """Names of the modules in whose code a node is, from outside in."""
    return list(node.meta.get("nn_module_stack", {}))


def _ends(graph: fx.Graph, cut: fx.Node) -> list[str]:
    """Modules whose last node is `cut`."""
    return [
        name
        for name in _owners(cut)
        if [node for node in graph.nodes if name in _owners(node)][-1] is cut
    ]


@torch.no_grad()
def _check_apart(model: nn.Module, bench: Bench) -> None:
    """Does a branch leave what it reads as it is, for the next one?

    Raises:
        ValueError: it does not.
    """
    assert isinstance(model, Tree)
    model.eval()
    shared = model.trunk(
        made_up(1, bench.data.input_shape, bench.data.input_dtype).to(bench.device)
    )
    version = shared._version
    model.branches[0](shared)
    model.train()
    if shared._version != version:
        raise ValueError("split: what follows changes its input in place; branch after it")
