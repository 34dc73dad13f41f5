"""What a call must leave as it was."""

import torch
from torch.utils._pytree import tree_leaves, tree_map


class Watched:
    """The model, z and global state at construction; `check` compares with them."""

    def __init__(self, case):
        self.case = case
        self.registered = {
            name: (dict(module._parameters), dict(module._buffers), module.training)
            for name, module in case.model.named_modules()
        }
        tensors = [*case.model.parameters(), *case.model.buffers()]
        self.tensors = [(t, t.detach().clone(), t.requires_grad, t.grad, t._version) for t in tensors]
        self.z, self.z_values = dict(case.z), tree_map(torch.clone, case.z)
        torch.manual_seed(77)
        self.random, self.threads = torch.get_rng_state(), torch.get_num_threads()

    def check(self):
        model = self.case.model
        assert [name for name, _ in model.named_modules()] == list(self.registered)
        for name, module in model.named_modules():
            parameters, buffers, training = self.registered[name]
            for before, now in ((parameters, module._parameters), (buffers, module._buffers)):
                assert list(before) == list(now)
                assert all(now[key] is before[key] for key in before), name
            assert module.training is training, name
        for tensor, value, requires_grad, grad, version in self.tensors:
            assert torch.equal(tensor, value) and tensor._version == version
            assert tensor.requires_grad is requires_grad and tensor.grad is grad
        assert all(self.case.z[key] is value for key, value in self.z.items()) and len(self.case.z) == len(self.z)
        for now, before in zip(tree_leaves(self.case.z), tree_leaves(self.z_values), strict=True):
            assert torch.equal(now, before) and not now.requires_grad and now.grad is None
        assert torch.equal(torch.get_rng_state(), self.random)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == self.threads
        assert not torch.is_autocast_enabled("cpu")
