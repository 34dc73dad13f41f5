"""A small training, for the pages of the documentation whose code needs one and is about something else."""

import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd_kernels import AdamW

torch.manual_seed(0)
n, T = 64, 12
teacher = torch.randn(8, 3)
x, x_val, x_test = torch.randn(n, 8), torch.randn(40, 8), torch.randn(40, 8)
y, y_val, y_test = ((inputs @ teacher).argmax(1) for inputs in (x, x_val, x_test))
model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
batches = [(x[i], y[i], i) for _ in range(3) for i in torch.randperm(n).split(16)]


def loss(model, batch, z):
    inputs, labels, _ = batch
    losses = F.cross_entropy(model(inputs), labels, reduction="none")
    return (z["data_weights"] * losses).mean() if "data_weights" in z else losses.mean()


def objective(model):
    return F.cross_entropy(model(x_val), y_val)


optimizer = AdamW(lr=1e-2, eps_root=1e-8)
f = mgd.TrainingFunction(model, loss, batches, optimizer=optimizer, objective=objective)
weighted = f.replaced(per_example={"data_weights": lambda batch: batch[2]})
z = {"lr": torch.full((T,), 1e-2)}
