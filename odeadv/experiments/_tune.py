"""Choose eta by cross-validation on the training set (Appendix B.1)."""

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
    """Choose the best of ``etas`` by cross-validation: train on all folds except one, evaluate on the held-out fold.

    The test images of ``data`` are not used. The score is the mean robust accuracy of the protocol (last iterates,
    last weights). If several etas have the same mean, the smallest is chosen. If runs are stopped, the same call
    resumes them.

    Args:
        config: configuration of the run. It must have a layer-wise defence.
        data: the whole data set that ``config`` names.
        etas: values to try.
        runs: folder of all runs.
        folds: number of parts of the training set.
        only: number of folds that are held out in turn, to save time; all folds if None.
        protocol: name of a protocol of `odeadv.evaluate`.
        log: stream for the progress; standard error if not given.

    Returns:
        Plain data with ``"candidates"``, ``"chosen"`` and the settings. Each candidate has ``"eta"``, ``"scores"`` (one
        per held-out fold, in [0, 1]), ``"mean"`` and ``"keys"`` (the keys of its runs).

    Raises:
        ValueError: if the defence is not layer-wise, if ``etas`` is empty, or if ``folds`` is below 2. Also if
            ``only`` is not between 1 and ``folds``.
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
    """Return the eta with the highest mean score. If several means are equal, return the smallest eta."""
    return float(min(candidates, key=lambda candidate: (-candidate["mean"], candidate["eta"]))["eta"])
