"""Warnings of Lightning that say nothing about a run of this project, each with the reason."""

import logging
import warnings

QUIET = (
    ".*does not have many workers.*",  # batches are read from a memory-mapped file
    ".*WeightAveraging callback with a model that overrides.*",
    ".*exists and is not empty.*",  # a run is resumed in its folder
    ".*dirpath has changed.*",  # validate and predict have run folders of their own
    ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 with torch 2.15
    ".*It is recommended to use `self.log.*sync_dist.*",  # the sums that it logs are over all devices already
    ".*The `srun` command is available.*",  # outside of a job; in one, lit_modules/runs/slurm.py has looked
    ".*`IterableDataset` has `__len__` defined.*",  # ours takes the workers into account
    ".*in eval mode at the start of training.*",  # what `model.train` leaves out
    ".*args parameter is intended to run from within Python.*",  # the command line is parsed in two steps
)


def be_quiet() -> None:
    """Leave them out, and Lightning's tips."""
    for pattern in QUIET:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
