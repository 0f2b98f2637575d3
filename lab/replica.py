"""SoftCoT's training over several processes of a `torchrun`, each with a whole model.

    torchrun --nproc-per-node 4 softcot.py train --accumulate 4 --task gsm8k-train --folder out

A step is the same as in one process: of the passes that --accumulate asks for each process does
some, and gradients are summed before the update. Rank 0 alone validates and writes the folder.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab.ranks import Place
from lab.training import Trainer
from model import UserError


class Replica(Trainer):
    """A Trainer that shares its steps with the others."""

    def __init__(self, place: Place, *arguments: Any):
        """UserError for what the processes cannot share."""
        self.place = place
        super().__init__(*arguments)
        place.together()  # nobody writes to the folder before all have read it
        s = self.s
        if s.accumulate % place.size:
            passes = f"the {s.accumulate} passes of a step (--accumulate)"
            raise UserError(f"{place.size} processes cannot share {passes}: make it a multiple")
        if s.method == "lora" and s.dropout:
            raise UserError(
                "lora's dropout is drawn by one process: pass --dropout 0, or start one"
            )
        # To the method a step is one pass: `loss` does what it consists of.
        self.given = replace(s, batch_size=s.batch_size * s.accumulate, accumulate=1)

    def loss(self, indices: list[int]) -> Tensor:
        """Of a whole step, with the gradient of all processes' passes."""
        if not torch.is_grad_enabled():  # held-out problems
            return super().loss(indices)
        trained, size = list(self.trained.values()), self.s.batch_size
        sums = [torch.zeros_like(x) for x in trained]
        value = trained[0].new_zeros(1)
        for i in range(self.place.rank * size, len(indices), self.place.size * size):
            part = super().loss(indices[i : i + size])
            for total, gradient in zip(sums, torch.autograd.grad(part, trained)):
                total += gradient
            value += part.detach()
        flat = torch.cat([value, *(total.flatten() for total in sums)])
        dist.all_reduce(flat)
        value, *sums = flat.split([1, *map(torch.numel, sums)])
        # A function of this value, whose gradient is the sum.
        line = sum((x.flatten() * total).sum() for x, total in zip(trained, sums))
        return value[0] + line - line.detach()

    def validate(self) -> None:
        if self.place.rank == 0:
            super().validate()
        self.saved = self.step

    def save(self) -> None:
        if self.place.rank == 0:
            super().save()
        self.saved = self.step

    def log(self, step: int, **what: Any) -> None:
        if self.place.rank == 0:
            super().log(step, **what)
