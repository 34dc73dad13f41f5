"""Every kind of metaparameter, against the unrolled reference."""

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, adamw, assert_exact, generator, initial, mlp, seeded, supervised, weighted, weights
from torch import nn

from mgd_kernels import SGD, Adam

STEPS = 8
GROUPS = [{"params": "*.bias", "lr": 3e-2, "weight_decay": 0.0}]


def base(**options):
    return supervised(mlp(0.2), (5,), STEPS, **options)


HYPERS = {
    "adamw": (adamw, ("lr", "weight_decay", "beta1", "beta2", "eps", "eps_root")),
    "adam": (
        lambda **changes: Adam(lr=1e-2, betas=(0.9, 0.95), eps=1e-3, eps_root=1e-4, weight_decay=0.1, **changes),
        ("lr", "weight_decay", "beta1", "beta2", "eps", "eps_root"),
    ),
    "sgd": (
        lambda **changes: SGD(lr=0.1, momentum=0.8, dampening=0.2, weight_decay=0.1, **changes),
        ("lr", "weight_decay", "momentum", "dampening"),
    ),
}


@pytest.mark.parametrize("shape", ["[]", "[T]", "[G]", "[T, G]"])
@pytest.mark.parametrize("rule", HYPERS)
def test_every_hyperparameter_in_every_shape(rule, shape):
    make, names = HYPERS[rule]
    optimizer = make(param_groups=GROUPS)
    size = {"[]": (), "[T]": (STEPS,), "[G]": (2,), "[T, G]": (STEPS, 2)}[shape]
    spread = 1 + 0.1 * torch.rand(size, generator=generator(), dtype=torch.float64)
    z = {name: optimizer.defaults[name] * (2 - spread if name.startswith("beta") else spread) for name in names}
    assert_exact(base(optimizer=optimizer).but(z))


def test_groups_keep_their_own_values_where_z_is_silent():
    """z["beta1"] overrides the defaults of both groups; their learning rates stay those of the optimizer."""
    case = base(optimizer=adamw(param_groups=GROUPS)).but(loss=weighted, z={"data_weights": weights()})
    case.z = {"data_weights": case.z["data_weights"], "beta1": torch.tensor(0.85, dtype=torch.float64)}
    assert_exact(case)


def test_a_plain_number_is_a_metaparameter():
    case = base().but({"lr": 1e-2, "weight_decay": 0.1})
    assert_exact(case.but({k: torch.tensor(v, dtype=torch.float64) for k, v in case.z.items()}))
    result, expected = case.metagradient(), case.unrolled()
    assert result.grads["lr"].item() == pytest.approx(expected.grads["lr"].item(), rel=1e-10)


@pytest.mark.parametrize("names", [["0.weight", "3.bias"], None])
def test_initial_parameters(names):
    case = base()
    init = initial(case.model)
    init = {name: 1.3 * init[name] for name in names or init}
    assert_exact(case.but({"init": init}))


def test_data_weights():
    assert_exact(base().but(loss=weighted, z={"data_weights": weights()}))


def test_data_weights_by_example_are_the_same_to_the_bit():
    dense = base().but(loss=weighted, z={"data_weights": weights()})

    def gathered(model, batch, z):
        x, y, _ = batch
        return (z["data_weights"] * F.cross_entropy(model(x), y, reduction="none")).mean()

    case = dense.but(loss=gathered, per_example={"data_weights": lambda batch: batch[2]})
    result = assert_exact(case, (torch.float64,))
    assert torch.equal(result.value, dense.metagradient().value)
    assert torch.allclose(result.grads["data_weights"], dense.metagradient().grads["data_weights"], rtol=1e-12, atol=0)


def test_an_example_drawn_twice_in_a_batch_collects_both_shares():
    case = base().but(
        loss=lambda model, batch, z: (z["w"] * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean(),
        z={"w": weights()},
        per_example={"w": lambda batch: batch[2] % 2},
    )
    result = assert_exact(case)
    assert result.grads["w"][2:].abs().max() == 0


def images(case):
    x = torch.randn(20, 5, generator=generator(9), dtype=torch.float64)
    batches = [(y, i) for _, y, i in case.batches]
    return case.but({"images": x}, batches=batches)


def test_training_images():
    def loss(model, batch, z):
        y, index = batch
        return F.cross_entropy(model(z["images"][index]), y)

    assert_exact(images(base()).but(loss=loss))


def test_training_images_by_example():
    def loss(model, batch, z):
        return F.cross_entropy(model(z["images"]), batch[0])

    assert_exact(images(base()).but(loss=loss, per_example={"images": lambda batch: batch[1]}, microbatches=4))


def test_label_smoothing():
    def loss(model, batch, z):
        x, y, _ = batch
        smooth = torch.sigmoid(z["smoothing"])
        target = (1 - smooth) * F.one_hot(y, CLASSES) + smooth / CLASSES
        return F.cross_entropy(model(x), target)

    assert_exact(base().but({"smoothing": torch.tensor(-2.0, dtype=torch.float64)}, loss=loss))


def test_learned_loss():
    """The loss is a small network of logits and label, whose weights are a list of tensors in z."""

    def loss(model, batch, z):
        first, second = z["loss"]
        features = torch.cat([model(batch[0]), F.one_hot(batch[1], CLASSES)], 1)
        return F.softplus(torch.tanh(features @ first) @ second).mean()

    g = generator(5)
    learned = [torch.randn(2 * CLASSES, 4, generator=g).double(), torch.randn(4, generator=g).double()]
    assert_exact(base().but({"loss": learned}, loss=loss))


@seeded
def rater():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def test_weights_from_another_network():
    network = rater()

    def loss(model, batch, z):
        x, y, _ = batch
        scores = torch.func.functional_call(network, z["rater"], (x,)).squeeze(1)
        return (scores.softmax(0) * F.cross_entropy(model(x), y, reduction="none")).sum()

    case = base().but({"rater": {n: p.detach() for n, p in network.named_parameters()}}, loss=loss)
    result = assert_exact(case, (torch.float64,))
    assert set(result.grads["rater"]) == set(dict(network.named_parameters()))


def test_pytrees_come_back_in_their_own_shape():
    def loss(model, batch, z):
        (scale, shift), rest = z["nested"]["pair"], z["nested"]["rest"]
        return F.cross_entropy(scale * model(batch[0]) + shift + rest[0]["bias"], batch[1])

    nested = {
        "pair": (torch.tensor(1.2, dtype=torch.float64), torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)),
        "rest": [{"bias": torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64)}],
    }
    result = assert_exact(base().but({"nested": nested}, loss=loss))
    assert isinstance(result.grads["nested"]["pair"], tuple) and isinstance(result.grads["nested"]["rest"], list)


def test_all_kinds_at_once():
    def loss(model, batch, z):
        y, index = batch
        each = F.cross_entropy(z["temperature"] * model(z["images"][index]), y, reduction="none")
        return (z["data_weights"] * each).mean()

    case = images(base(optimizer=adamw(param_groups=GROUPS))).but(loss=loss, microbatches=2, max_grad_norm=0.3)
    z = {
        "data_weights": weights(),
        "temperature": torch.tensor(1.1, dtype=torch.float64),
        "init": initial(case.model),
        "weight_decay": torch.tensor([0.02, 0.01], dtype=torch.float64),
    }
    assert_exact(case.but(z, per_example={"data_weights": lambda batch: batch[1]}))
