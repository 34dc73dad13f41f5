"""Operators and transformations whose derivatives are easily lost. Each step is a function of its inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pattern import EXAMPLES, REFUSABLE, Training, features, mean, pattern, randn, seeded, training
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def weighted(each: Tensor, b, z) -> Tensor:
    return (z["w"][b["i"]] * each).mean()


def on_inputs(*shape: int, seed: int = 9):
    """An objective for models of other inputs: the mean square of the output."""
    x = randn(*shape, g=seed)
    return lambda m: m.eval()(x).square().mean()


def checkpointed(use: bool) -> Training:
    def loss(m, b, z):
        hidden = lambda x: features(m, x)
        h = checkpoint(hidden, b["x"], use_reentrant=False) if use else hidden(b["x"])
        return weighted((m[2](h) - b["y"]).square()[:, 0], b, z)

    return training(loss)


@pattern(plain=lambda: checkpointed(False))
def activation_checkpoint() -> Training:
    return checkpointed(True)


def reentrant(use: bool) -> Training:
    def loss(m, b, z):
        rest = lambda h: m[2](torch.tanh(h))
        h = m[0](b["x"])
        o = checkpoint(rest, h, use_reentrant=True) if use else rest(h)
        return weighted((o - b["y"]).square()[:, 0], b, z)

    return training(loss)


@pattern(REFUSABLE, plain=lambda: reentrant(False))
def reentrant_checkpoint() -> Training:
    """torch has `.backward()` through it, and refuses `autograd.grad`."""
    return reentrant(True)


def checkpointed_dropout(use: bool) -> Training:
    """The random stream is put back for the recomputation."""

    def loss(m, b, z):
        hidden = lambda x: F.dropout(features(m, x), 0.5)
        h = checkpoint(hidden, b["x"], use_reentrant=False) if use else hidden(b["x"])
        return weighted((m[2](F.dropout(h, 0.2)) - b["y"]).square()[:, 0], b, z)

    return training(loss)


@pattern(plain=lambda: checkpointed_dropout(False))
def checkpoint_around_dropout() -> Training:
    return checkpointed_dropout(True)


@pattern()
def dropout() -> Training:
    return training(mean, seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))))


@pattern()
def stochastic_depth_by_torch() -> Training:
    """Python branches on a number of the step's own random stream."""

    def loss(m, b, z):
        x = b["x"]
        for _ in range(3):
            if torch.rand(()).item() < 0.5:
                x = x + features(m, x)[:, :4]
        return mean(m, b | {"x": x}, z)

    return training(loss)


@pattern()
def mixup_by_torch() -> Training:
    def loss(m, b, z):
        lam = torch.distributions.Beta(torch.tensor(2.0), torch.tensor(2.0)).sample().double()
        p = torch.randperm(EXAMPLES)
        o, y = m(lam * b["x"] + (1 - lam) * b["x"][p]), b["y"]
        return weighted((lam * (o - y).square() + (1 - lam) * (o - y[p]).square())[:, 0], b, z)

    return training(loss)


@pattern(plain=lambda: normalised(Running()))
def batch_norm() -> Training:
    """The objective reads the running statistics; the reference writes the layer from its definition."""
    return normalised(nn.BatchNorm1d(6))


class Running(nn.Module):
    """BatchNorm1d from its definition, out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean = x.mean(0)
            var = (x - mean).square().mean(0)
            self.mean = 0.9 * self.mean + 0.1 * mean
            self.var = 0.9 * self.var + 0.1 * var * len(x) / (len(x) - 1)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


def normalised(norm: nn.Module) -> Training:
    return training(mean, seeded(lambda: nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 1))))


@pattern()
def buffers_replaced_by_assignment() -> Training:
    return normalised(Running())


class Arithmetic(nn.Module):
    """Normalisation over dimensions, in operators whose third derivatives torch has."""

    def __init__(self, dims: tuple[int, ...], groups: int = 1) -> None:
        super().__init__()
        self.dims, self.groups = dims, groups

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(len(x), self.groups, -1) if self.groups > 1 else x
        c = x - x.mean(self.dims, keepdim=True)
        return (c * (c.square().mean(self.dims, keepdim=True) + 0.1).rsqrt()).reshape(shape)


def penalised(norm: nn.Module) -> Training:
    """A gradient penalty (WGAN-GP, R1): third derivatives of everything between input and output."""

    def loss(m, b, z):
        x = b["x"].clone().requires_grad_()
        o = m(x)
        (g,) = torch.autograd.grad(o.sum(), x, create_graph=True)
        return weighted((o - b["y"]).square()[:, 0], b, z) + z["penalty"] * g.square().sum() / 8

    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 1)))
    held = randn(5, 4, g=9)
    return training(
        loss,
        model,
        objective=lambda m: m(held).square().mean(),
        z={"penalty": torch.tensor(0.1, dtype=torch.float64)},
    )


@pattern()
def gradient_penalty() -> Training:
    return penalised(nn.Identity())


@pattern(plain=lambda: penalised(Arithmetic((-1,))))
def gradient_penalty_through_layer_norm() -> Training:
    return penalised(nn.LayerNorm(6, eps=0.1, elementwise_affine=False))


@pattern(plain=lambda: penalised(Arithmetic((-1,), groups=2)))
def gradient_penalty_through_group_norm() -> Training:
    return penalised(nn.GroupNorm(2, 6, eps=0.1, affine=False))


@pattern(plain=lambda: penalised(Arithmetic((0,))))
def gradient_penalty_through_batch_norm() -> Training:
    return penalised(nn.BatchNorm1d(6, eps=0.1, affine=False, track_running_stats=False))


class Instance(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(len(x), 2, 3)).view(len(x), 6)


@pattern(plain=lambda: penalised(Instance(Arithmetic((-1,)))))
def gradient_penalty_through_instance_norm() -> Training:
    return penalised(Instance(nn.InstanceNorm1d(2, eps=0.1)))


@pattern()
def inner_step() -> Training:
    """MAML: the loss after one step of gradient descent inside the loss."""

    def loss(m, b, z):
        names, values = zip(*m.named_parameters(), strict=True)
        grads = torch.autograd.grad((m(b["x"][:4]) - b["y"][:4]).square().mean(), values, create_graph=True)
        fast = {n: v - 0.1 * g for n, v, g in zip(names, values, grads, strict=True)}
        o = torch.func.functional_call(m, fast, (b["x"],))
        return weighted((o - b["y"]).square()[:, 0], b, z)

    return training(loss)


@pattern()
def gradients_by_torch_func() -> Training:
    """A physics-informed residual: derivatives with respect to the inputs by vmap of grad."""

    def loss(m, b, z):
        slope = torch.func.vmap(torch.func.grad(lambda x: m(x).squeeze()))(b["x"])
        return weighted((m(b["x"]) - b["y"]).square()[:, 0] + slope.square().sum(1), b, z)

    return training(loss)


@pattern()
def vmap_over_examples() -> Training:
    return training(
        lambda m, b, z: weighted(torch.func.vmap(lambda x, y: (m(x) - y).square().sum())(b["x"], b["y"]), b, z)
    )


@pattern()
def functional_call_of_frozen_teacher() -> Training:
    teacher = {name: p.detach() + 0.3 for name, p in training(mean).model.named_parameters()}

    def loss(m, b, z):
        with torch.no_grad():
            target = torch.func.functional_call(m, teacher, (b["x"],))
        return weighted((m(b["x"]) - target).square()[:, 0], b, z)

    return training(loss)


@pattern(honest=False)
def self_distillation() -> Training:
    """The teacher is the model itself under no_grad."""

    def loss(m, b, z):
        with torch.no_grad():
            target = m(b["x"] + 0.1)
        return mean(m, b, z) + weighted((m(b["x"]) - target).square()[:, 0], b, z)

    return training(loss)


@pattern(honest=False)
def adaptive_weight() -> Training:
    """The weight of a second term is the ratio of two gradient norms, read as a number (VQGAN)."""

    def loss(m, b, z):
        e, h = mean(m, b, z), features(m, b["x"])
        other = weighted(m[2](h)[:, 0].cos(), b, z)
        p = m[2].weight
        a, c = (torch.autograd.grad(each, p, retain_graph=True)[0].norm() for each in (e, other))
        return e + 0.5 * (a / (c + 1e-4)).clamp(0, 10).detach() * other

    return training(loss)


@pattern(honest=False)
def divided_by_its_own_value() -> Training:
    def loss(m, b, z):
        value = mean(m, b, z)
        return value / value.item()

    return training(loss)


class Cube(torch.autograd.Function):
    """Written so that it can be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@pattern()
def autograd_function() -> Training:
    return training(lambda m, b, z: weighted((m[2](Cube.apply(m[0](b["x"]))) - b["y"]).square()[:, 0], b, z))


class OnceCube(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def _plain_cube() -> Training:
    return training(lambda m, b, z: weighted((m[2](m[0](b["x"]) ** 3) - b["y"]).square()[:, 0], b, z))


@pattern(REFUSABLE, plain=_plain_cube)
def once_differentiable_function() -> Training:
    return training(lambda m, b, z: weighted((m[2](OnceCube.apply(m[0](b["x"]))) - b["y"]).square()[:, 0], b, z))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


@pattern(honest=False)
def straight_through() -> Training:
    """Quantisation-aware training: the backward pass is not the derivative of the forward pass."""
    return training(lambda m, b, z: mean(m, b | {"x": Straight.apply(4 * features(m, b["x"])[:, :4]) / 4}, z))


@pattern(honest=False)
def straight_through_by_detach() -> Training:
    def loss(m, b, z):
        h = 4 * features(m, b["x"])[:, :4]
        return mean(m, b | {"x": (h + (h.round() - h).detach()) / 4}, z)

    return training(loss)


class Slices(nn.Module):
    """Writes into activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).clone()
        h[:, :3] += h[:, 3:].detach().sign() * 0.1
        h[:, 3:] = x[:, :3].sin() + h[:, :3]
        h.mul_(0.7)[:, 0].add_(0.2)
        return self.head(h.tanh_())


@pattern()
def activations_in_place() -> Training:
    return training(mean, seeded(Slices))


@pattern()
def compiled_model() -> Training:
    """The user compiled a part of the step already."""
    step = torch.compile(features, backend="eager")
    return training(lambda m, b, z: weighted((m[2](step(m, b["x"])) - b["y"]).square()[:, 0], b, z))


@pattern()
def activations_saved_elsewhere() -> Training:
    def loss(m, b, z):
        with torch.autograd.graph.save_on_cpu():
            return mean(m, b, z)

    return training(loss)


@pattern()
def sparse_adjacency() -> Training:
    def loss(m, b, z):
        ones = torch.ones(b["edges"].shape[1], dtype=torch.float64)
        graph = torch.sparse_coo_tensor(b["edges"], ones, (EXAMPLES, EXAMPLES), check_invariants=False)
        h = torch.sparse.mm(graph, features(m, b["x"]))
        return weighted((m[2](torch.tanh(h)) - b["y"]).square()[:, 0], b, z)

    return training(loss, edges=lambda t, g: torch.randint(EXAMPLES, (2, 9), generator=g))
