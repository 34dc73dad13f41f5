"""Distil a data set: ten learned images, one per class, on which a network trains (arXiv 1811.10959).

The metaparameters are the pixels, a soft label for each image, and one learning rate. The descent lowers the loss on
the digits of the data set; other digits judge, with the initial weights of the descent and with others, which it has
not seen.

Run: python examples/dataset_distillation.py (a few seconds)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mgd
from mgd_kernels import SGD


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def main(steps: int = 20, rounds: int = 30) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    images, labels = images[order].float() / 16, labels[order]
    x, y, x_test, y_test = images[:1200], labels[:1200], images[1200:], labels[1200:]
    classes = torch.arange(10)

    f = mgd.TrainingFunction(
        network(0),
        lambda model, batch, z: F.cross_entropy(model(z["pixels"]), z["labels"]),
        [classes] * steps,
        optimizer=SGD(lr=0.3),
        objective=lambda model: F.cross_entropy(model(x), y),
    )

    def accuracy(z, seed):
        model = network(seed)
        trained = f.replaced(model=model).train(z).model_state
        return (torch.func.functional_call(model, trained, (x_test,)).argmax(1) == y_test).float().mean().item()

    def problem(variables, meta_step):
        return f.replaced(model=network(meta_step % 4)), decoded(variables)

    def decoded(variables):
        labels = variables["logits"].softmax(1)
        return {"pixels": variables["pixels"], "labels": labels, "lr": variables["log_lr"].exp()}

    first = torch.stack([x[y == c][0] for c in classes])  # a real image of each class
    start = {"pixels": first, "logits": 5 * torch.eye(10), "log_lr": torch.tensor(-1.0)}
    stable = {"log_lr": mgd.Box(high=-1.0)}  # with a higher rate mgd warns: the training is too rough to follow
    descent = mgd.MetaDescent(problem, lambda variables: torch.optim.Adam(variables, lr=0.05), constraints=stable)
    found = descent.run(start, rounds)
    before, after = accuracy(decoded(start), 0), accuracy(decoded(found.variables), 0)
    others = [accuracy(decoded(found.variables), seed) for seed in (100, 101, 102)]
    unseen = sum(others) / len(others)
    print(f"test accuracy {before:.3f} after training on ten real images, {after:.3f} on ten learned ones")
    print(f"from initial weights that the descent has not seen: {unseen:.3f}")
    return {"before": before, "after": after, "unseen": unseen}


if __name__ == "__main__":
    main()
