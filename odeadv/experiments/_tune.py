"""The choice of eta by cross-validation on the training set (Appendix B.1)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from odeadv.data import ImageDataset
from odeadv.evaluation.protocols import resolve_protocol
from odeadv.experiments._config import RunConfig
from odeadv.experiments._run import run
from odeadv.training import Layerwise

SCHEMA = "odeadv.tune/1"


def tune(
    config: RunConfig,
    data: ImageDataset,
    etas: Sequence[float],
    *,
    runs: Path,
    folds: int = 5,
    only: int | None = None,
    protocol: str = "table2",
    log: TextIO | None = None,
) -> dict[str, Any]:
    """Train ``config`` with each of ``etas`` on all folds but one, evaluate on that one, and choose the best eta.

    The test images of ``data`` are not used. The score is the mean robust accuracy of the protocol (last iterates,
    last weights); of equal means the smallest eta is chosen. Runs go on where they were stopped.

    Args:
        config: the run whose eta is to be chosen; it must have a layer-wise defence.
        data: the data set named in it, whole.
        etas: values to try.
        runs: the folder of all runs.
        folds: parts of the training set.
        only: use only this number of them as held-out parts, to save time.
        protocol: of `odeadv.evaluate`.
        log: where progress goes; standard error if not given.

    Returns:
        Plain data: ``"candidates"``, each with ``"eta"``, ``"scores"`` (one per fold, in [0, 1]), ``"mean"`` and
        ``"keys"`` of the runs; ``"chosen"``; and what was asked.

    Raises:
        ValueError: without a layer-wise defence, without values, or with fewer than two folds.
    """
    defence = config.training.defence
    if not isinstance(defence, Layerwise):
        raise ValueError(f"method: {config.method} lacks an eta to choose; give one with +lad or +lad-sm")
    if not etas:
        raise ValueError("etas: got none, expected at least one value")
    if folds < 2 or (only is not None and not 1 <= only <= folds):
        raise ValueError(f"folds, only: got {folds} and {only}, expected at least 2, and only between 1 and folds")
    resolve_protocol(protocol)
    candidates = []
    for eta in etas:
        training = replace(config.training, defence=replace(defence, eta=eta))
        scores, keys = [], []
        for fold in range(folds if only is None else only):
            one = replace(config, data=replace(config.data, folds=folds, fold=fold), training=training)
            label = f"[eta {eta:g}, fold {fold + 1}/{folds if only is None else only}]"
            record = run(one, data, runs, protocols=(protocol,), label=label, log=log)
            attacks = record["evaluations"]["last"][protocol]["attacks"]
            scores.append(statistics.fmean(attack["robust_accuracy"] for attack in attacks))
            keys.append(one.key)
        candidates.append({"eta": eta, "scores": scores, "mean": statistics.fmean(scores), "keys": keys})
    return {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "folds": folds,
        "held_out": folds if only is None else only,
        "protocol": protocol,
        "score": "mean robust accuracy of the protocol on the held-out fold: last iterates, last weights",
        "candidates": candidates,
        "chosen": choose(candidates),
    }


def choose(candidates: Sequence[dict[str, Any]]) -> float:
    """Return the eta with the highest mean score; the smallest one if several are equal."""
    return float(min(candidates, key=lambda candidate: (-candidate["mean"], candidate["eta"]))["eta"])
