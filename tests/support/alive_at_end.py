"""run_glue in processes that check, when their group is taken down, that nothing shares it out."""

from __future__ import annotations

import gc
import sys

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from examples import program, run_glue

take_down = torch.distributed.destroy_process_group


def checked(group: object = None) -> None:
    """Takes the group down where nobody else could be the last to hold it."""
    alive = [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
    print("still there:", len(alive), flush=True)
    take_down(group)


if __name__ == "__main__":
    torch.distributed.destroy_process_group = checked
    sys.exit(program.run_main(run_glue.main))
