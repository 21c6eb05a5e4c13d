"""Does a model know that it guesses? Whether its confidence is right, and its entropy larger where it is wrong."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from tokenformer.inspection import Scored

BINS = 15  # of a calibration curve, as in Guo et al. (2017)
THRESHOLDS = 1000  # of the ROC curve


class Calibration:
    """Predictions whose target is known, in bins of equal width.

    Attributes:
        bins: by the probability of the likeliest, and by the entropy over that of a guess among all `choices`; of each
            bin how many predictions, the sum of that number, how many were right: (BINS, 3).
        auroc: the probability that a wrong prediction has more entropy than a right one.
    """

    def __init__(self, choices: int) -> None:
        self.most = math.log(max(2, choices))
        self.bins = {by: torch.zeros(BINS, 3, dtype=torch.float64) for by in ("confidence", "entropy")}
        self.auroc = BinaryAUROC(thresholds=THRESHOLDS)

    def add(self, targets: Tensor, scored: Scored) -> None:
        """Take predictions (T) into account."""
        known = targets >= 0
        right = (scored.likeliest == targets)[known].double().cpu()
        numbers = {"confidence": scored.confidence, "entropy": scored.entropy / self.most}
        shares = {by: column[known].double().cpu().clamp(0, 1) for by, column in numbers.items()}
        for by, share in shares.items():
            columns = torch.stack((torch.ones_like(share), share, right), 1)
            self.bins[by].index_add_(0, (share * BINS).long().clamp(max=BINS - 1), columns)
        if len(right):
            self.auroc.update(shares["entropy"], 1 - right.long())

    def rows(self) -> list[dict[str, Any]]:
        """The rows of calibration.csv: bins that are not empty."""
        return [
            {"by": by, "predictions": int(count), "mean": share / count, "accuracy": right / count}
            for by, bins in self.bins.items()
            for count, share, right in bins.tolist()
            if count
        ]

    def error(self) -> float:
        """The expected calibration error: |accuracy - mean confidence| of the bins, by their sizes."""
        count, confidence, right = self.bins["confidence"].T
        return float((confidence - right).abs().sum() / count.sum())
