"""Models with everything that makes a step more than a formula, against the unrolled reference."""

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    adamw,
    assert_exact,
    convnet,
    cross_entropy,
    gpt,
    initial,
    language,
    lstm,
    mlp,
    seeded,
    supervised,
    weighted,
    weights,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mgd_kernels import SGD


def with_everything(case):
    return case.but({"data_weights": weights(), "init": initial(case.model)}, loss=weighted)


def test_mlp_with_dropout():
    assert_exact(with_everything(supervised(mlp(0.3), (5,), 12)))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_running_statistics_that_the_objective_reads(microbatches):
    case = with_everything(supervised(convnet(), (1, 6, 6), microbatches=microbatches))
    assert_exact(case)


def test_running_statistics_carry_derivatives_by_themselves():
    """Only they depend on the metaparameter: the trained weights stand behind the normalisation's own scale."""

    def objective(model):
        return (model[1].running_mean ** 2).sum() + model[1].running_var.log().sum() + 0 * model[0].weight.sum()

    case = supervised(convnet(), (1, 6, 6))
    assert_exact(case.but({"init": initial(case.model)}, objective=objective))


def test_running_statistics_used_by_the_loss():
    """Some steps train in eval mode, so that running statistics enter the loss as well."""

    def loss(model, batch, z):
        model.train(bool(batch[2].sum() % 2))
        return cross_entropy(model, batch, z)

    case = supervised(convnet(), (1, 6, 6))
    odd = [bool(batch[2].sum() % 2) for batch in case.batches]
    assert any(odd) and not all(odd)
    assert_exact(case.but({"init": initial(case.model)}, loss=loss, trace=False))


def test_lstm():
    assert_exact(with_everything(supervised(lstm(), (4, 5))))


def test_gpt_with_tied_embedding_dropout_and_attention():
    case = language()
    assert_exact(case.but({"init": initial(case.model)}))


def test_a_tied_weight_has_one_gradient():
    names = set(initial(gpt()))
    assert "embedding.weight" in names and "head.weight" not in names


def test_frozen_parameters():
    case = supervised(mlp(0.2), (5,))
    case.model[0].weight.requires_grad_(False)
    case = with_everything(case)
    assert "0.weight" not in case.z["init"]
    assert_exact(case)


class _Adapter(nn.Module):
    """W + B A with W frozen (LoRA, arXiv 2106.09685)."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.a = nn.Parameter(0.3 * torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(0.1 * torch.randn(linear.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@seeded
def adapted():
    return nn.Sequential(_Adapter(nn.Linear(5, 8)), nn.Tanh(), _Adapter(nn.Linear(8, CLASSES)))


class _LowRank(nn.Module):
    def __init__(self, rows, columns, rank=2):
        super().__init__()
        self.a = nn.Parameter(0.3 * torch.randn(rank, columns))
        self.b = nn.Parameter(0.1 * torch.randn(rows, rank))

    def forward(self, weight):
        return weight + self.b @ self.a


@seeded
def parametrized():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).requires_grad_(False)
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", _LowRank(*layer.weight.shape))
    return model


@pytest.mark.parametrize("make", [adapted, parametrized])
def test_adapters(make):
    case = with_everything(supervised(make(), (5,)))
    assert len(case.z["init"]) == 4
    assert_exact(case)


@seeded
def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


class _PlainWeightNorm(nn.Module):
    def forward(self, magnitude, direction):
        return magnitude * direction / direction.norm(dim=1, keepdim=True)


def test_weight_normalisation():
    """torch's fused weight normalisation has a wrong second derivative; the reference uses the plain formula."""
    case = supervised(weight_normed(), (5,))
    plain = case.but(model=weight_normed())
    plain.model[0].parametrizations.weight[0].__class__ = _PlainWeightNorm
    result, expected = case.metagradient(), plain.unrolled()
    assert torch.allclose(result.grads["lr"], expected.grads["lr"], rtol=1e-10, atol=0)


def test_instance_norm_with_running_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm = nn.Linear(5, 5), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
            self.head = nn.Linear(20, CLASSES)

        def forward(self, x):
            return self.head(torch.tanh(self.norm(self.mix(x))).flatten(1))

    f = supervised(seeded(Net)(), (4, 5), optimizer=SGD(lr=0.1)).function()
    lr, h = torch.full((8,), 0.1, dtype=torch.float64), 1e-5
    difference = (f.value({"lr": lr + h}) - f.value({"lr": lr - h})) / (2 * h)
    # Central differences at h = 1e-5: h^2 + 1e-16/h, both about 1e-10, times a few hundred.
    assert f.metagradient({"lr": lr}).grads["lr"].sum().item() == pytest.approx(difference.item(), rel=1e-7)


class _Checkpointed(nn.Module):
    def __init__(self, saving, dropout):
        super().__init__()
        self.saving, self.head = saving, nn.Linear(8, CLASSES)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.saving else self.body(x))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(dropout, trace):
    """The recomputation sees the parameters of the step, not the model's own, and the same dropout masks."""
    saving, plain = (supervised(seeded(_Checkpointed)(on, dropout), (5,)) for on in (True, False))
    result, expected = saving.metagradient(trace=trace), plain.unrolled()
    assert torch.allclose(result.grads["lr"], expected.grads["lr"], rtol=1e-10, atol=1e-15)


def test_what_the_loss_computes_without_gradients_is_a_constant():
    def loss(model, batch, z):
        logits = model(batch[0])
        with torch.no_grad():
            confidence = model(batch[0]).softmax(1).amax(1)
        return (confidence * F.cross_entropy(logits, batch[1], reduction="none")).mean()

    assert_exact(supervised(mlp(), (5,)).but(loss=loss))


def test_a_buffer_that_is_a_view_of_a_parameter_keeps_its_value():
    """The buffer remembers the weights of the step; the optimizer then changes the weights, not the memory."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, CLASSES)
            self.register_buffer("last", torch.zeros(CLASSES, 5))

        def forward(self, x):
            drift = ((self.linear.weight - self.last) ** 2).sum()
            self.last = self.linear.weight.detach()
            return self.linear(x) + 0.1 * drift * torch.tensor([1.0, 0.0, -1.0]).to(x)

    assert_exact(supervised(seeded(Net)(), (5,)).but(per_example={}, trace=False))


class Centred(nn.Module):
    """Takes off a moving average of its inputs, which is updated through `.data` as older modules do it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        self.mean.data.mul_(0.8).add_(x.detach().mean(0), alpha=0.2)
        return x - self.mean


def test_a_buffer_that_is_written_through_data():
    case = supervised(nn.Sequential(Centred(), nn.Linear(5, CLASSES)), (5,))
    case = case.but(objective=lambda m, held_out=case.objective: held_out(m.eval()))
    result = assert_exact(case)
    assert result.model_state["0.mean"].norm() > 0.1


def test_a_gradient_penalty_inside_the_loss():
    def loss(model, batch, z):
        x = batch[0].clone().requires_grad_()
        value = F.cross_entropy(model(x), batch[1])
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + z["penalty"] * (slope**2).sum()

    case = supervised(mlp(), (5,), 5).but({"penalty": torch.tensor(0.5, dtype=torch.float64)}, loss=loss)
    assert_exact(case)


def test_fifty_steps():
    case = with_everything(supervised(mlp(0.1), (5,), 50, optimizer=adamw(lr=5e-3)))
    assert_exact(case)


class _Spare(nn.Module):
    """With a layer that nothing uses, and a parameter without elements."""

    def __init__(self):
        super().__init__()
        self.used, self.spare, self.empty = nn.Linear(5, CLASSES), nn.Linear(4, 4), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.used(x)


def test_parameters_that_the_loss_does_not_use():
    """They decay all the same, and the objective here reads them."""
    case = supervised(seeded(_Spare)(), (5,))
    case = case.but({"init": initial(case.model)}, objective=lambda m: sum(p.square().sum() for p in m.parameters()))
    assert_exact(case)


def test_a_loss_that_reads_parameters_by_name():
    def loss(model, batch, z):
        decay = sum(p.square().sum() for name, p in model.named_parameters() if "weight" in name)
        return cross_entropy(model, batch, z) + z["decay"] * decay

    assert_exact(supervised(mlp(), (5,)).but({"decay": torch.tensor(0.1, dtype=torch.float64)}, loss=loss))


@seeded
def shared():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, CLASSES))


def test_a_module_used_twice():
    assert_exact(with_everything(supervised(shared(), (5,))))


def test_parameters_of_different_dtypes():
    case = supervised(mlp(), (5,))
    case.model[0].float()
    z = case.z

    def run(model, x):
        return model[1:](model[0](x.float()).double())

    x, y, _ = case.batches[0]
    case = case.but(
        loss=lambda m, b, z: F.cross_entropy(run(m, b[0]), b[1]), objective=lambda m: F.cross_entropy(run(m, x), y)
    )
    expected, result = case.unrolled(), case.metagradient()
    # The first layer computes in float32 on both sides.
    assert torch.allclose(result.grads["lr"], expected.grads["lr"], rtol=1e-5, atol=0)
    assert result.grads["lr"].dtype == z["lr"].dtype


def test_one_step():
    case = supervised(mlp(0.2), (5,), 1)
    case = case.but({"init": initial(case.model), "weight_decay": torch.tensor([0.1], dtype=torch.float64)})
    assert_exact(case)


def vmapped(model, batch, z):
    """Examples one by one under torch.func.vmap."""
    own = dict(model.named_parameters())
    each = lambda x, y: F.cross_entropy(torch.func.functional_call(model, own, (x,)), y)
    return torch.func.vmap(each)(batch[0], batch[1]).mean()


def adapted_by_a_step(model, batch, z):
    """The loss after an inner step of gradient descent (MAML, arXiv 1703.03400)."""
    own = dict(model.named_parameters())
    inner = torch.autograd.grad(cross_entropy(model, batch, z), list(own.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(own.items(), inner, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (batch[0],)), batch[1])


@pytest.mark.parametrize("loss", [vmapped, adapted_by_a_step])
def test_losses_that_transform_the_model(loss):
    assert_exact(supervised(mlp(), (5,)).but(loss=loss))
