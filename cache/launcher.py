"""Which part of the work is this process's: set by torchrun, Slurm's srun, or any launcher that sets RANK and
WORLD_SIZE."""

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsae.cache.errors import UserError

LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Share:
    """One of `world` workers on one store or one training."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number among the workers of this machine."""

    def own(self, count: int) -> NDArray[np.int64]:
        """The chunks of `count` that are this worker's, in the order in which it does them."""
        return np.arange(self.rank, count, self.world)

    def others(self, count: int) -> NDArray[np.int64]:
        """All other chunks, in the order in which this worker looks whether they were left.

        Owners go up and helpers come down, each beginning in another part of a share, so that the chunks of a slow or
        dead worker are divided among the rest; a few may be computed twice, to the same bytes.
        """
        index = np.arange(count)
        index = index[index % self.world != self.rank]
        turn = index // self.world
        order = np.lexsort(((index - self.rank) % self.world, -turn, (turn - self.rank) % self.world))
        return np.take(index, order)


ALONE = Share()


def share() -> Share:
    """This process's share, from the launcher's environment. Raises UserError for impossible numbers."""
    for names in LAUNCHERS:
        if os.environ.get(names[0]) and os.environ.get(names[1]):
            settings = {name: os.environ.get(name, "0") for name in names}
            try:
                result = Share(*(int(text) for text in settings.values()))
            except ValueError:
                result = Share(-1)
            if not 0 <= result.rank < result.world or result.local_rank < 0:
                values = ", ".join(f"{name}={text}" for name, text in settings.items())
                raise UserError(
                    f"{values}: {names[0]} must be a number from 0 to {names[1]} - 1; unset them to work alone"
                )
            return result
    return ALONE
