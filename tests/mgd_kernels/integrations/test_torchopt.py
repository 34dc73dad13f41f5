"""The drop-in for TorchOpt: the numbers and derivatives of TorchOpt's own transformations, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forked import run_python
from torchopt_cases import LINEAR, SETTINGS, float64_default, grads_of, problem, torchopt, unroll  # noqa: F401

from mgd_kernels import dispatch
from mgd_kernels.errors import BadArgument
from mgd_kernels.integrations import torchopt as fused


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
    done = run_python(code)
    assert done.returncode == 0, done.stderr
