"""More than the paper shows."""

from __future__ import annotations

from twist_fl.experiments.ablation import ABLATION
from twist_fl.experiments.best import BEST
from twist_fl.experiments.failure import FAILURE
from twist_fl.experiments.finetune import FINETUNE
from twist_fl.experiments.pretrained import PRETRAINED, PRETRAINED_BOTH
from twist_fl.experiments.real_cost import REAL_COST
from twist_fl.experiments.recipe import RECIPE
from twist_fl.experiments.search import SEARCH
from twist_fl.experiments.sweep import SWEEP
from twist_fl.experiments.theorem import THEOREM

EXTRAS = (FAILURE, THEOREM, REAL_COST, SWEEP, ABLATION, RECIPE, FINETUNE, SEARCH, BEST, PRETRAINED, PRETRAINED_BOTH)
