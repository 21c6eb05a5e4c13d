"""A language model in two places: half of each layer's parameter tokens on the device, the others in the cloud.

    torchrun --nproc_per_node 2 examples/device_cloud.py models/small --prompt "Once upon a time"

No token leaves its place. For a layer the two add up the squared norms of their scores, a number for each position and
norm, and their outputs. It is the tensor parallelism of a training (lit_modules/strategies/sharding.py), of more
processes too.
"""

import argparse
from collections import deque
from pathlib import Path

from torch.distributed import destroy_process_group, get_rank, get_world_size, init_process_group
from torch.distributed.device_mesh import init_device_mesh

from lit_modules.commands.generate import show, write
from lit_modules.commands.tokenizers import tokenizer_of
from lit_modules.modules.loading import load_model
from lit_modules.strategies.sharding import divide_tokens


def main() -> None:
    """What each process does; the first one prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported folder, or a checkpoint")
    parser.add_argument("--prompt", default="", metavar="TEXT")
    given = parser.parse_args()
    init_process_group("gloo")
    model = load_model(given.model)
    divide_tokens(model, init_device_mesh("cpu", (get_world_size(),)))
    pieces = write(model, tokenizer_of(given.model), [given.prompt], temperature=0)
    if get_rank() == 0:
        show([given.prompt], pieces)
    else:
        deque(pieces, maxlen=0)
    destroy_process_group()


if __name__ == "__main__":
    main()
