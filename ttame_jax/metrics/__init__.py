"""Metrics of explanation maps behind one interface.

The order of the imports is the order of `list_metrics`, and so of summaries and tables.
"""

# isort: off
from ttame_jax.metrics.base import (
    Metric,
    Sample,
    TableRow,
    list_metrics,
    load_metric,
    load_metrics,
)
from ttame_jax.metrics.ad_ic import AverageDrop, IncreaseInConfidence
from ttame_jax.metrics.road import Road, RoadReference
from ttame_jax.metrics.auc import Deletion, Insertion
from ttame_jax.metrics.pointing import PointingGame
from ttame_jax.metrics.energy import Energy
from ttame_jax.metrics.maxboxacc import MaxBoxAcc
from ttame_jax.metrics.evaluation import (
    Evaluator,
    bootstrap,
    interval,
    intervals,
    replicates,
    summarise,
)
# isort: on

__all__ = [
    "AverageDrop",
    "Deletion",
    "Energy",
    "Evaluator",
    "IncreaseInConfidence",
    "Insertion",
    "MaxBoxAcc",
    "Metric",
    "PointingGame",
    "Road",
    "RoadReference",
    "Sample",
    "TableRow",
    "bootstrap",
    "interval",
    "intervals",
    "list_metrics",
    "load_metric",
    "load_metrics",
    "replicates",
    "summarise",
]
