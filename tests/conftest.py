"""One thread: the models are small, and threads that wait for each other cost more than they compute."""

import torch

torch.set_num_threads(1)
