"""A small schedule-free optimizer (Defazio et al. 2024, arXiv:2405.15682), with the contract of the package."""

import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD. The model has the weights y between `train` and `eval`, and their average x after `eval`.

    z moves by the gradient at y; x is the mean of all z; y = (1 - beta) z + beta x.
    """

    def __init__(self, params, lr=0.1, beta=0.5):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})
        self.stepped_in_eval = 0

    @property
    def is_training(self):
        return self.param_groups[0]["train_mode"]

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - group["beta"])  # from x to y
                group["train_mode"] = True

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])  # from y to x
                group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                self.stepped_in_eval += 1
                raise RuntimeError("call train() before step()")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - group["beta"]))
