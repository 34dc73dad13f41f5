"""The drop-in for TorchOpt: the numbers and derivatives of TorchOpt's own transformations, in less time and memory.

TorchOpt computes its bias corrections `1 - beta^k` in the default dtype, whatever the parameters' dtype: under float32
they are off by up to 6e-5 at beta2 = 0.999. Comparisons therefore run with float64 as the default dtype.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mgd_kernels import buffers, dispatch
from mgd_kernels.errors import BadArgument
from mgd_kernels.integrations import torchopt as fused

torchopt = pytest.importorskip("torchopt")

LINEAR = torchopt.schedule.linear_schedule(0.1, 0.02, 4)
SETTINGS = [
    ("adamw", {"lr": 0.1, "eps_root": 1e-6}),
    ("adamw", {"lr": 0.1, "eps_root": 1e-2, "weight_decay": 0.0, "maximize": True}),
    ("adamw", {"lr": LINEAR, "eps_root": 1e-6, "betas": (0.8, 0.95), "moment_requires_grad": True}),
    ("adam", {"lr": 0.1, "eps_root": 1e-6, "weight_decay": 0.1}),
    ("adam", {"lr": LINEAR, "eps": 1e-3, "eps_root": 1e-6}),
    ("sgd", {"lr": 0.02}),
    ("sgd", {"lr": LINEAR, "momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.02, "momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": 1e-4, "momentum": 0.5, "maximize": True}),
]


@pytest.fixture(autouse=True)
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem():
    torch.manual_seed(0)
    params = {
        "weight": torch.randn(7, 5, requires_grad=True),
        "rest": (torch.randn(5, requires_grad=True), [torch.randn((), requires_grad=True)]),
    }
    inputs, weights = torch.randn(11, 7), torch.ones(11, requires_grad=True)

    def loss(params):
        bias, (scale,) = params["rest"]
        out = torch.tanh(inputs @ params["weight"] + bias) * scale
        return (weights[:, None] * out**2).sum() + (scale - 1) ** 2

    return params, weights, loss


def grads_of(loss, params):
    leaves, spec = torchopt.pytree.tree_flatten(params)
    return torchopt.pytree.tree_unflatten(spec, torch.autograd.grad(loss(params), leaves, create_graph=True))


def unroll(transformation, steps=5):
    """The objective after an unrolled training, its gradient, and that gradient's own gradient in one direction."""
    params, weights, loss = problem()
    wanted = [*torchopt.pytree.tree_leaves(params), weights]
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(grads_of(loss, params), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    objective = sum((leaf**2).sum() for leaf in torchopt.pytree.tree_leaves(params))
    return objective, torch.autograd.grad(objective, wanted, create_graph=True), wanted


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_unrolled_training_agrees_with_torchopt(name, settings):
    expected, expected_grads, expected_at = unroll(getattr(torchopt, name)(**settings))
    value, grads, at = unroll(getattr(fused, name)(**settings))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)

    def second(grads, at):
        return torch.autograd.grad(sum((g * torch.cos(g.detach())).sum() for g in grads), at)

    torch.testing.assert_close(second(grads, at), second(expected_grads, expected_at), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("name", "settings"), [SETTINGS[0], SETTINGS[4], SETTINGS[6], SETTINGS[8]])
@pytest.mark.parametrize("mask", [None, {"weight": True, "rest": False}])
def test_backends_that_know_flat_buffers_only(name, settings, mask):
    """What runs on GPUs: the leaves are put into one buffer, here for the reference."""
    if mask is not None and name != "adamw":
        pytest.skip("weight decay with a mask is AdamW's")
    lr = torch.tensor(0.05, requires_grad=True)
    settings = settings | {"lr": lr} | ({"mask": mask} if mask else {})
    value, grads, _ = unroll(getattr(fused, name)(**settings))
    (at_lr,) = torch.autograd.grad(value, lr, retain_graph=True)
    with dispatch.use_backend("reference"):
        expected, expected_grads, _ = unroll(getattr(fused, name)(**settings))
        (expected_at_lr,) = torch.autograd.grad(expected, lr)
    torch.testing.assert_close((value, at_lr, *grads), (expected, expected_at_lr, *expected_grads), rtol=1e-9, atol=0)


def test_leaves_in_any_layout():
    """Transposed parameters, gradients and moments, and cotangents of one expanded element."""
    torch.manual_seed(11)
    found = []
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        torch.manual_seed(11)
        params, grads, mu, nu = (layout(torch.rand(5, 3) + 0.1).requires_grad_() for _ in range(4))
        state = (fused.AdamState([mu], [nu], torch.tensor([4])),)
        (update,), ((after, _, _),) = fused.adamw(0.1).update([grads], state, params=[params], inplace=False)
        total = update.sum() + after[0].sum()
        found.append(torch.autograd.grad(total, [params, grads, mu, nu]))
        with torch.no_grad():
            fused.adamw(0.1).update([grads], state, params=[params], inplace=True)
        found[-1] += (mu.detach(), nu.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_schedule_may_return_a_tensor_of_the_graph():
    found = []
    for module in (torchopt, fused):
        rates = torch.linspace(0.1, 0.02, 5, requires_grad=True)
        objective, _, _ = unroll(module.adamw(lambda count, rates=rates: rates[count], eps_root=1e-6))
        found.append(torch.autograd.grad(objective, rates)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)
    assert found[1].abs().min() > 0


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_every_hyperparameter_of_adam_is_differentiated(name):
    """Against finite differences, twice; TorchOpt itself refuses or ignores all but lr."""
    torch.manual_seed(1)
    shapes = [(3, 2), (4,)]
    params, grads, mu = ([torch.randn(s, requires_grad=True) for s in shapes] for _ in range(3))
    nu = [torch.rand(s).add_(0.1).requires_grad_() for s in shapes]
    hyper = [torch.tensor(x, requires_grad=True) for x in (0.1, 0.8, 0.9, 1e-2, 0.3, 1e-2)]

    def step(lr, beta1, beta2, eps, weight_decay, eps_root, *tensors):
        p, g, m, v = tensors[0:2], tensors[2:4], tensors[4:6], tensors[6:8]
        optimizer = getattr(fused, name)(lr, (beta1, beta2), eps, weight_decay, eps_root=eps_root)
        state = (fused.AdamState(list(m), list(v), torch.tensor([3, 3])),)
        updates, ((mu, nu, _),) = optimizer.update(list(g), state, params=list(p), inplace=False)
        return (*updates, *mu, *nu)

    inputs = (*hyper, *params, *grads, *mu, *nu)
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


def test_every_hyperparameter_of_sgd_is_differentiated():
    torch.manual_seed(1)
    params, grads, trace = ([torch.randn(4, requires_grad=True)] for _ in range(3))
    hyper = [torch.tensor(x, requires_grad=True) for x in (0.1, 0.8, 0.2, 0.3)]

    def step(lr, momentum, dampening, weight_decay, p, g, t):
        optimizer = fused.sgd(lr, momentum, dampening, weight_decay)
        state = (fused.TraceState([t], torch.tensor([3])),)
        (update,), ((trace, _),) = optimizer.update([g], state, params=[p], inplace=False)
        return update, *trace

    assert torch.autograd.gradcheck(step, (*hyper, *params, *grads, *trace))
    assert torch.autograd.gradgradcheck(step, (*hyper, *params, *grads, *trace))


@pytest.mark.parametrize(("name", "settings"), [SETTINGS[0], SETTINGS[6], SETTINGS[8]])
def test_the_first_trace_and_moments_are_leaves_of_the_graph(name, settings):
    found = []
    for module in (torchopt, fused):
        params, _, loss = problem()
        transformation = getattr(module, name)(**settings, moment_requires_grad=True)
        first = state = transformation.init(params)
        for _ in range(3):
            updates, state = transformation.update(grads_of(loss, params), state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        slots = [t for t in torchopt.pytree.tree_leaves(first) if t.is_floating_point()]
        assert all(t.requires_grad and t.is_leaf for t in slots)
        found.append(torch.autograd.grad(loss(params), slots))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_leaves_without_a_gradient_stay_and_keep_their_count():
    found = []
    for module in (torchopt, fused):
        torch.manual_seed(2)
        params = [torch.randn(3), None, torch.randn(2, 2)]
        transformation = module.adamw(LINEAR, eps_root=1e-6)
        state = transformation.init(params)
        for step in range(4):
            grads = [torch.randn(3) if step != 1 else None, None, torch.randn(2, 2)]
            updates, state = transformation.update(grads, state, params=params, inplace=False)
            assert updates[1] is None and (updates[0] is None) == (step == 1)
            params = torchopt.apply_updates(params, updates, inplace=False)
        found.append([params[0], params[2]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    assert state[0].count.tolist() == [3, 0, 4]


@pytest.mark.parametrize(("name", "settings"), [SETTINGS[0], SETTINGS[3], SETTINGS[6]])
def test_inplace_overwrites_the_moments_and_changes_no_number(name, settings):
    torch.manual_seed(3)
    params = {"w": torch.randn(9, 3), "b": torch.randn(3)}
    transformation = getattr(fused, name)(**settings)
    plain, inplace = transformation.init(params), transformation.init(params)
    memory = [t.data_ptr() for t in torchopt.pytree.tree_leaves(inplace) if t.is_floating_point()]
    for _ in range(3):
        grads = {"w": torch.randn(9, 3), "b": torch.randn(3)}
        expected, plain = transformation.update(grads, plain, params=params, inplace=False)
        updates, inplace = transformation.update(grads, inplace, params=params)
        torch.testing.assert_close(updates, expected, rtol=0, atol=0)
    assert [t.data_ptr() for t in torchopt.pytree.tree_leaves(inplace) if t.is_floating_point()] == memory
    # Leaves that lie apart are stepped in a joint buffer and copied back.
    apart = torchopt.pytree.tree_map(torch.clone, inplace)
    updates, after = transformation.update(grads, apart, params=params)
    expected, plain = transformation.update(grads, plain, params=params, inplace=False)
    torch.testing.assert_close((updates, after[0][:-1]), (expected, plain[0][:-1]), rtol=0, atol=0)
    assert after[0][0][0] is apart[0][0][0]


def test_a_plain_training_builds_no_chain_of_graphs():
    """Parameters that require gradients, gradients that do not: only the update itself may depend on anything."""
    params = [torch.randn(3, requires_grad=True)]
    transformation = fused.adamw(0.1)
    state = transformation.init(params)
    updates, state = transformation.update([torch.randn(3)], state, params=params, inplace=False)
    assert not any(t.requires_grad for t in torchopt.pytree.tree_leaves(state))
    (found,) = torch.autograd.grad(updates[0].sum(), params)
    torch.testing.assert_close(found, torch.full((3,), -0.1 * 0.01))
    updates, state = transformation.update([torch.randn(3)], state, params=params, inplace=True)
    assert not updates[0].requires_grad and not any(t.requires_grad for t in torchopt.pytree.tree_leaves(state))


def test_autograd_notices_moments_overwritten_under_a_graph():
    params, grads = [torch.randn(3)], [torch.randn(3, requires_grad=True)]
    transformation = fused.adamw(0.1, eps_root=1e-6)
    state = transformation.init(params)
    updates, _ = transformation.update(grads, state, params=params, inplace=False)
    transformation.update([torch.randn(3)], state, params=params, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(updates[0].sum(), grads)


def test_apply_updates_inplace_trains_as_torch():
    torch.manual_seed(4)
    model, twin = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    optimizer = torchopt.Optimizer(list(model.parameters()), fused.adamw(1e-2, weight_decay=0.1))
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        x = torch.randn(8, 5)
        for net, step in ((model, optimizer), (twin, reference)):
            step.zero_grad()
            net(x).square().mean().backward()
            step.step()
    # torch scales the parameters before it adds the update: one rounding a step apart.
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-12, atol=1e-14)


def test_under_meta_optimizer_and_chain():
    found = []
    for module in (torchopt, fused):
        torch.manual_seed(5)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        scale = torch.tensor(1.0, requires_grad=True)
        clip = torchopt.clip.clip_grad_norm(0.1)
        inner = torchopt.MetaOptimizer(net, torchopt.chain(clip, module.adamw(0.1, eps_root=1e-6)))
        x, y = torch.randn(16, 4), torch.randn(16, 1)
        for _ in range(4):
            inner.step(F.mse_loss(net(x * scale), y))
        found.append(torch.autograd.grad(F.mse_loss(net(x), y), scale, retain_graph=True)[0])
        snapshot = torchopt.extract_state_dict(inner, by="copy")
        inner.load_state_dict(snapshot)  # copies do not lie in one buffer any more
        inner.step(F.mse_loss(net(x * scale), y))
        found[-1] = torch.stack([found[-1], torch.autograd.grad(F.mse_loss(net(x), y), scale)[0]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "mask", [{"w": True, "b": False}, lambda tree: {name: leaf.ndim > 1 for name, leaf in tree.items()}]
)
def test_a_mask_chooses_who_decays(mask):
    """TorchOpt 0.7 decays every leaf under the first mask and raises AttributeError under the second."""
    params = {"w": torch.ones(2, 2, requires_grad=True), "b": torch.ones(3, requires_grad=True)}
    transformation = fused.adamw(0.5, weight_decay=0.2, mask=mask)
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    updates, _ = transformation.update(zero, transformation.init(params), params=params, inplace=False)
    assert torch.equal(updates["w"], torch.full((2, 2), -0.1)) and torch.equal(updates["b"], torch.zeros(3))
    grads = torch.autograd.grad(updates["w"].sum() + 0 * updates["b"].sum(), list(params.values()), allow_unused=True)
    assert torch.equal(grads[0], torch.full((2, 2), -0.1)) and grads[1] is None


# --- Where TorchOpt's own fused operator is wrong -----------------------------------------------------------------


def adam_vjp(module, m, v, g, eps_root, **settings):
    """The update of step 3 and its VJP with respect to the moments and the gradient."""
    m, v, g = (t.clone().requires_grad_() for t in (m, v, g))
    transformation = module.adam(1.0, eps_root=eps_root, **settings)
    head, *rest = transformation.init([m])
    count = [torch.tensor(2)] if module is torchopt else torch.tensor([2])
    state = (head._replace(mu=[m], nu=[v], count=count), *rest)
    (update,), _ = transformation.update([g], state, params=[m], inplace=False)
    cotangent = torch.linspace(-1, 1, m.numel())
    return update, *torch.autograd.grad(update, [m, v, g], cotangent)


def test_second_moment_with_eps_root():
    torch.manual_seed(6)
    m, v, g = torch.randn(64), 1e-2 * torch.rand(64), 0.1 * torch.randn(64)
    expected, found = adam_vjp(torchopt, m, v, g, 1e-2), adam_vjp(fused, m, v, g, 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    accelerated = adam_vjp(torchopt, m, v, g, 1e-2, use_accelerated_op=True)
    assert (accelerated[2] / expected[2]).max() < 0.5  # TorchOpt's fault: less than half of the derivative


def test_first_moment_where_it_vanishes():
    torch.manual_seed(7)
    zero, v = torch.zeros(64), 1e-2 * torch.rand(64)
    expected, found = adam_vjp(torchopt, zero, v, zero, 1e-2), adam_vjp(fused, zero, v, zero, 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    accelerated = adam_vjp(torchopt, zero, v, zero, 1e-2, use_accelerated_op=True)
    assert expected[1].abs().max() > 1 and accelerated[1].abs().max() == 0  # TorchOpt's fault: dropped


@pytest.mark.parametrize("n", [1023, 1024, 1025, 1026, 1027, 4099])
def test_lengths_around_a_block(n):
    torch.manual_seed(n)
    m, v, g = torch.randn(n), torch.rand(n), torch.randn(n)
    torch.testing.assert_close(adam_vjp(fused, m, v, g, 0.0), adam_vjp(torchopt, m, v, g, 0.0), rtol=1e-11, atol=1e-13)


# --- Memory and precision -----------------------------------------------------------------------------------------


def saved_tensors(transformation, numel, steps, lr=None):
    """How many tensors of the parameters' size the graph saves a step, each as often as it is saved."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    params = [torch.randn(numel, requires_grad=True)]
    state = transformation.init(params)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(steps):
            grads = [0.5 * p + 1 for p in params]  # saves nothing
            updates, state = transformation.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
    return round(total / numel / steps, 2)


def test_the_graph_holds_what_the_vjp_reads_and_no_more():
    n = 20_000
    assert saved_tensors(fused.adamw(1e-3), n, 3) == 3  # gradient and two moments
    assert saved_tensors(torchopt.adamw(1e-3), n, 3) == 5
    assert saved_tensors(torchopt.adamw(1e-3, use_accelerated_op=True), n, 3) == 7
    assert saved_tensors(fused.sgd(1e-3, momentum=0.9), n, 3) == 0  # a linear rule
    lr = torch.tensor(1e-3, requires_grad=True)
    assert saved_tensors(fused.adamw(lr), n, 3) == 4  # the decayed parameters too
    assert saved_tensors(torchopt.adamw(lambda count: lr), n, 3) == 6


def test_the_update_is_as_precise_as_it_can_be():
    """Small updates of large parameters: `new - old` would keep three digits of them."""
    torch.manual_seed(8)
    n, settings = 4096, {"lr": 1e-6, "eps_root": 1e-8, "weight_decay": 0.01}
    params, m, v, g = 10 * torch.randn(n), torch.randn(n), torch.rand(n), torch.randn(n)

    def update(dtype):
        p = [params.float().to(dtype)]
        state = (fused.AdamState([m.float().to(dtype)], [v.float().to(dtype)], torch.tensor([4])),)
        return fused.adamw(**settings).update([g.float().to(dtype)], state, params=p, inplace=False)[0][0]

    exact, found = update(torch.float64), update(torch.float32).double()
    # A handful of float32 roundings (2^-24 = 6e-8 each) of terms no larger than the update's own.
    scale = exact.abs() + 1e-6 * 0.01 * params.abs()
    assert ((found - exact).abs() / scale).max() < 8 * 2**-24
    p = params.float()
    subtracted = ((p + found.float()) - p).double()
    assert ((subtracted - exact).abs() / scale).median() > 1e-3


def test_moments_of_16_bit_parameters_are_float32():
    torch.manual_seed(9)
    params = [torch.randn(300, dtype=torch.bfloat16, requires_grad=True)]
    grads = [torch.randn(300, dtype=torch.bfloat16, requires_grad=True)]
    transformation = fused.adamw(1e-2, eps_root=1e-6)
    updates, (state,) = transformation.update(grads, transformation.init(params), params=params, inplace=False)
    assert updates[0].dtype == torch.bfloat16 and state.mu[0].dtype == torch.float32
    torch.testing.assert_close(state.mu[0].double(), 0.1 * grads[0].double(), rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(updates[0].double().sum() + state.mu[0].sum(), grads)
    g = grads[0].detach().double()
    wide = g.clone().requires_grad_()
    expected = -1e-2 * wide / ((wide**2 + 1e-6).sqrt() + 1e-8) + 0.1 * wide
    (expected,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)  # half a unit of bfloat16


def test_buffers_come_back_when_the_last_tensor_is_gone():
    buffers.release()
    size = buffers.SMALLEST // 8 + 5
    first = buffers.empty(size, torch.float64, torch.device("cpu"))
    address, view = first.data_ptr(), first[3:].view(-1)
    other = buffers.empty(size, torch.float64, torch.device("cpu"))
    assert other.data_ptr() != address and buffers.free_bytes() == 0
    del first
    assert buffers.free_bytes() == 0  # the view still lives
    del view
    assert buffers.free_bytes() == 8 * size
    assert buffers.empty(size, torch.float64, torch.device("cpu")).data_ptr() == address
    buffers.release()
    assert buffers.free_bytes() == 0


def test_an_unrolled_loop_in_recycled_memory_repeats_itself_bit_for_bit():
    buffers.release()
    lengths = [300_000, 150_001]

    def run():
        torch.manual_seed(10)
        params = start = [torch.randn(n, requires_grad=True) for n in lengths]
        transformation = fused.adamw(1e-2, eps_root=1e-6)
        state = transformation.init(params)
        for _ in range(3):
            grads = [p.sin() for p in params]
            updates, state = transformation.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return torch.autograd.grad(sum((p**2).sum() for p in params), start)

    first = [g.clone() for g in run()]
    assert buffers.free_bytes() > 0
    for _ in range(2):
        torch.testing.assert_close(list(run()), first, rtol=0, atol=0)
    buffers.release()


# --- Errors -------------------------------------------------------------------------------------------------------


def test_errors_say_what_was_expected():
    with pytest.raises(BadArgument, match="beta2 in"):
        fused.adam(betas=(0.9, 1.0))
    with pytest.raises(BadArgument, match="lr >= 0"):
        fused.sgd(-1.0)
    with pytest.raises(BadArgument, match="Nesterov"):
        fused.sgd(1.0, nesterov=True)
    with pytest.raises(BadArgument, match="0-d tensor"):
        fused.adamw(torch.ones(2))
    transformation = fused.adamw(1.0, mask=[True])
    params = [torch.ones(2), torch.ones(3)]
    state = transformation.init(params)
    with pytest.raises(BadArgument, match="params=params"):
        transformation.update(params, state)
    with pytest.raises(BadArgument, match="2 leaves of the state; got 1"):
        transformation.update(params[:1], state, params=params[:1])
    with pytest.raises(BadArgument, match=r"leaf 1 .* \[3\]; got \[4\]"):
        transformation.update([torch.ones(2), torch.ones(4)], state, params=params)

    class Wrapped(torch.Tensor):
        pass

    with pytest.raises(BadArgument, match="plain tensors; leaf 0 is a Wrapped"):
        transformation.update([torch.ones(2).as_subclass(Wrapped), None], state, params=params)
    with pytest.raises(BadArgument, match="mask"):
        transformation.update(params, state, params=params)


def test_without_torchopt_and_without_optree():
    code = """
import sys, torch
sys.modules["torchopt"] = None
from mgd_kernels.integrations import torchopt as fused
opt = fused.adamw(0.5, weight_decay=0.0)
(update,), _ = opt.update([torch.ones(3)], opt.init([torch.ones(3)]), inplace=False)
assert torch.allclose(update, torch.full((3,), -0.5)), update
del sys.modules["mgd_kernels.integrations.torchopt"]
sys.modules["optree"] = None
try:
    import mgd_kernels.integrations.torchopt
except ImportError as error:
    assert "pip install optree" in str(error), error
else:
    raise AssertionError("expected an ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
