"""The statistics of comparisons, on simulated data with a known truth and against SciPy and statsmodels."""

import math

import numpy
import pytest
from scipy import stats

from odeadv.experiments._statistics import Contrast, TwoWay, holm, image_error, t_quantile, word


def simulated(generator, effects, seeds, noise):
    """Return values row + seed + residual as a mapping."""
    blocks = generator.normal(0, 3, seeds)
    return {
        f"row{r}": {s: effect + blocks[s] + noise * generator.standard_normal() for s in range(seeds)}
        for r, effect in enumerate(effects)
    }


@pytest.mark.parametrize(("df", "value"), [(1, 12.706), (15, 2.131), (29, 2.045), (math.inf, 1.960)])
def test_quantiles_of_students_t(df, value):
    assert t_quantile(df) == pytest.approx(value, abs=5e-4)


def test_a_pooled_difference_equals_the_linear_model_of_statsmodels():
    pandas = pytest.importorskip("pandas")
    formula = pytest.importorskip("statsmodels.formula.api")
    values = simulated(numpy.random.default_rng(0), (0.0, 1.0, 2.5), 4, 1.0)
    del values["row2"][1]  # a run that is missing
    frame = pandas.DataFrame(
        [(r, f"s{s}", v) for r, by in values.items() for s, v in by.items()], columns=["r", "s", "y"]
    )
    fitted = formula.ols("y ~ C(r) + C(s)", frame).fit()
    for row in ("row1", "row2"):
        found = TwoWay(values).contrast(row, "row0")
        assert found.mean == pytest.approx(fitted.params[f"C(r)[T.{row}]"])
        assert found.interval == pytest.approx(tuple(fitted.conf_int().loc[f"C(r)[T.{row}]"]))
        assert found.p == pytest.approx(fitted.pvalues[f"C(r)[T.{row}]"])
        assert found.df == fitted.df_resid == 5


def test_two_rows_on_all_seeds_are_the_paired_t_test():
    values = simulated(numpy.random.default_rng(1), (0.0, 1.0), 6, 1.0)
    a, b = (list(values[row].values()) for row in ("row1", "row0"))
    assert TwoWay(values).contrast("row1", "row0").p == pytest.approx(stats.ttest_rel(a, b).pvalue)


@pytest.mark.parametrize("floor", [0.0, 1.5])
def test_the_last_bits_of_a_fit_do_not_show(floor):
    """A fit has other last bits on another processor; difference, interval and p-value must not."""
    generator = numpy.random.default_rng(2)
    for _ in range(20):
        values = simulated(generator, (0.0, 1.0, 2.5), 5, 1.0)
        nearly = {
            row: {n: x * (1 + 1e-15 * generator.standard_normal()) for n, x in by.items()} for row, by in values.items()
        }
        found, again = (TwoWay(given).contrast("row1", "row0", floor) for given in (values, nearly))
        assert found == again


@pytest.mark.parametrize(("rows", "seeds"), [(3, 3), (6, 8)])
def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent(rows, seeds):
    generator = numpy.random.default_rng(rows)
    covered = 0
    for _ in range(2000):
        found = TwoWay(simulated(generator, [0.0, 1.5, *range(rows - 2)], seeds, 1.3)).contrast("row1", "row0")
        low, high = found.interval
        covered += low <= 1.5 <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_intervals_cover_the_truth_if_the_sampling_of_images_is_all_the_noise():
    """Seeds that agree on every image: the residual is 0, and only the error of the images is left."""
    generator = numpy.random.default_rng(5)
    images, covered = 400, 0
    for _ in range(2000):
        right = generator.random(images) < 0.5
        better = right | (generator.random(images) < 0.2)  # the truth: +10 points
        values = {"a": dict.fromkeys(range(3), 100 * right.mean()), "b": dict.fromkeys(range(3), 100 * better.mean())}
        floor = image_error([better * 1.0] * 3, [right * 1.0] * 3)
        low, high = TwoWay(values).contrast("b", "a", floor).interval
        covered += low <= 10.0 <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_after_holm_at_most_5_percent_of_families_have_a_false_positive():
    generator = numpy.random.default_rng(2)
    false = 0
    for _ in range(2000):
        fit = TwoWay(simulated(generator, [0.0] * 5, 4, 1.0))
        false += min(holm([fit.contrast(f"row{n}", "row0").p for n in range(1, 5)])) < 0.05
    assert 0.005 < false / 2000 <= 0.05


def test_holm_adjusts_as_statsmodels_does():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    ps = [0.01, 0.04, 0.03, 0.005, 0.9]
    assert holm(ps) == pytest.approx(multitest.multipletests(ps, method="holm")[1])
    assert holm([]) == []


def test_an_interval_is_never_narrower_than_the_images_allow():
    values = {"a": {0: 50.0, 1: 51.0}, "b": {0: 52.0, 1: 53.001}}  # two seeds that agree by luck
    alone, floored = TwoWay(values).contrast("b", "a"), TwoWay(values).contrast("b", "a", floor=1.0)
    assert alone.half < 0.01
    assert floored.half == pytest.approx(1.96, abs=1e-3)
    assert floored.by_images
    assert not alone.by_images
    assert floored.p == pytest.approx(2 * stats.norm.sf(2.0005), rel=1e-3)


def test_rows_without_common_seeds_are_not_compared():
    fit = TwoWay({"a": {0: 1.0}, "b": {1: 2.0}, "c": {0: 3.0}})
    assert fit.contrast("b", "a") is None
    assert fit.contrast("a", "elsewhere") is None
    assert fit.contrast("c", "a") == Contrast(2.0, None, None, 0)
    with pytest.raises(ValueError, match="values: got none"):
        TwoWay({"a": {}})


def test_the_error_of_the_images_is_that_of_their_paired_difference():
    generator = numpy.random.default_rng(3)
    a, b = ((generator.random((2, 100)) < 0.5) * 1.0 for _ in range(2))
    assert image_error(a, b) == pytest.approx(100 * stats.sem((a - b).mean(0)))


@pytest.mark.parametrize(
    ("mean", "half", "p", "paper", "gain", "expected"),
    [
        (1.0, 0.5, 0.01, 0.9, None, "confirmed"),
        (1.0, 0.5, 0.01, 2.0, None, "sign only"),
        (-1.0, 0.5, 0.01, 0.9, None, "opposite"),
        (0.1, 0.3, 0.6, 1.0, None, "absent"),
        (0.1, 0.5, 0.6, 1.0, None, "undecided"),
        (1.0, 0.5, 0.06, 0.9, None, "undecided"),  # clear of 0 alone, not after Holm
        (1.0, 0.5, 0.01, None, 2.0, "confirmed"),
        (-1.0, 0.5, 0.01, None, 2.0, "opposite"),
        (0.1, 0.3, 0.6, None, 2.0, "absent"),
        (0.1, 0.3, 0.6, None, None, "undecided"),
        (0.1, None, None, 1.0, None, "undecided"),
    ],
)
def test_the_words_of_the_rules(mean, half, p, paper, gain, expected):
    assert word(Contrast(mean, half, p, 4), p, paper, gain=gain) == expected
