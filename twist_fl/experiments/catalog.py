"""The paper's tables and figures, in its order, and more than it shows."""

from __future__ import annotations

from twist_fl.experiments.experiment import Experiment
from twist_fl.experiments.extras import EXTRAS
from twist_fl.experiments.fig2 import FIG2
from twist_fl.experiments.fig4 import FIG4, FIG7, FIG8
from twist_fl.experiments.fig5 import FIG5, FIG9, FIG10
from twist_fl.experiments.fig6 import FIG6
from twist_fl.experiments.table1 import TABLE1
from twist_fl.experiments.table2 import TABLE2

PAPER = (FIG2, TABLE1, FIG4, FIG5, FIG6, TABLE2, FIG7, FIG8, FIG9, FIG10)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (*PAPER, *EXTRAS)}
