"""The document's statements on suppression beside the figures of this study."""

from collections.abc import Sequence
from statistics import mean

from lightning_sae.studies.shared.page import Compared
from lightning_sae.studies.shared.rows import Row, distinct, known, select, with_spread
from lightning_sae.studies.suppression.plots import words
from lightning_sae.studies.suppression.train import BASELINE, ENCODER_IS_FROZEN, ORIGINAL

AVERAGES = {
    BASELINE: (0.002, 0.005),
    "unrotated_decoder": (0.061, 0.162),
    "decoder": (0.088, 0.241),
    "scale": (0.060, 0.156),
}
"""The document's means over layers of MSE removed and of the perplexity gap recovered."""

CORRELATIONS = {
    "scaling,log_strength": -0.710,
    "scaling,log_frequency": 0.786,
    "scaling,log_strength,partial": -0.501,
    "scaling,log_frequency,partial": 0.652,
    "added,log_strength": -0.078,
    "added,log_frequency": 0.569,
    "added,log_strength,partial": 0.378,
    "added,log_frequency,partial": 0.646,
}
"""Those of the document, of its layer 5."""

ALIKE = 0.25
"""Two methods count as equal if they differ by less than this share of the best method's figure."""

KILLED = 0.05
"""Share of a toy feature's strength below which it counts as not learnt."""

SHRINKS = ("scale", "unrotated_decoder", "decoder")


def of_method(methods: Sequence[Row], method: str, name: str) -> list[float]:
    """A figure's mean over hooks, for each seed."""
    own = select(methods, method=method)
    return [mean(known(select(own, seed=seed), name)) for seed in sorted(distinct(own, "seed"))]


def comparison(methods: Sequence[Row], found: Sequence[Row], toy: Sequence[Row]) -> list[Compared]:
    """The document's statements beside this study's figures."""
    rows: list[Compared] = []
    for place, (name, label) in enumerate(
        (("mse_removed", "MSE removed"), ("perplexity_recovered", "perplexity gap recovered"))
    ):
        for method, averages in AVERAGES.items():
            here = with_spread(of_method(methods, method, name))
            rows.append((f"{label}, {words(method)}", f"{averages[place]:.3f}", here))
        order = "decoder > unrotated decoder ≈ scale > baseline"
        rows.append((f"order by {label}", order, order_in_words(methods, name)))
    rows.append(_l2_row(methods))
    rows.append(_l0_row(methods))
    rows.append(_firing_row(methods))
    rows += [
        (_title(name), f"{there:+.3f} (layer 5)", _mean_of_hooks(found, name))
        for name, there in CORRELATIONS.items()
    ]
    rows.append(
        ("cosine of decoder rows before and after", "0.983", _mean_of_hooks(found, "cosine"))
    )
    rows.append(("suppression of a binary feature", "λ/2, at any frequency", theory_text(toy)))
    return rows


def order_in_words(methods: Sequence[Row], name: str) -> str:
    """The document's four methods ordered by a figure, and whether that is the document's order.

    The document has decoder first, baseline last, and two about equal methods between them.
    """
    values = {method: mean(of_method(methods, method, name)) for method in AVERAGES}
    ranked = sorted(values, key=lambda method: -values[method])
    order = " > ".join(f"{words(method)} {values[method]:.3f}" for method in ranked)
    middle = [values["unrotated_decoder"], values["scale"]]
    ordered = values["decoder"] > max(middle) and min(middle) > values[BASELINE]
    alike = abs(middle[0] - middle[1]) < ALIKE * max(values.values())
    if ordered and alike:
        return f"{order}: the document's order"
    return (
        f"{order}: not the document's order" if not ordered else f"{order}: the middle two differ"
    )


def _l2_row(methods: Sequence[Row]) -> Compared:
    before = mean(of_method(methods, ORIGINAL, "l2_ratio"))
    after = {method: mean(of_method(methods, method, "l2_ratio")) for method in SHRINKS}
    closer = all(abs(value - 1) < abs(before - 1) for value in after.values())
    figures = ", ".join(f"{words(method)} {value:.3f}" for method, value in after.items())
    said = "closer with all three" if closer else "not closer with all three"
    here = f"original {before:.3f}, {figures}: {said}"
    return "L2 ratio", "0.845 to 0.995; closer to 1 with scale and both decoder methods", here


def _l0_row(methods: Sequence[Row]) -> Compared:
    before = mean(of_method(methods, ORIGINAL, "l0"))
    untrained = (*ENCODER_IS_FROZEN, ORIGINAL, BASELINE)
    others = [method for method in distinct(methods, "method") if method not in untrained]
    after = {method: mean(of_method(methods, method, "l0")) for method in others}
    figures = ", ".join(
        f"{words(method)} {value:.1f} ({value / before:.2f} times)"
        for method, value in after.items()
    )
    raised = sum(value > before for value in after.values())
    here = f"original {before:.1f}; {figures}: raised by {raised} of {len(after)}"
    return "L0 of methods that train the encoder", "drastically raised", here


def _firing_row(methods: Sequence[Row]) -> Compared:
    own = [row for row in methods if row["method"] in ENCODER_IS_FROZEN]
    n = sum(row["differing"] for row in own)
    here = f"differ on {n:,} held-out tokens, of {len(own)} SAEs"
    return "latents that fire, encoder frozen", "unchanged", here


def _title(name: str) -> str:
    effect, cause, *partial = name.split(",")
    label = {"scaling": "scaling", "added": "added activation"}[effect]
    kind = "partial correlation" if partial else "correlation"
    return f"{kind} of {label} and {cause.replace('_', ' ')}"


def _mean_of_hooks(found: Sequence[Row], name: str) -> str:
    """The mean over hooks of each seed with its spread, and the range over hooks."""
    values = known(found, name)
    if not values:
        return "too few alive latents"
    of_seeds = [known(select(found, seed=seed), name) for seed in sorted(distinct(found, "seed"))]
    text = with_spread([mean(each) for each in of_seeds if each], "+.3f")
    several = len(distinct(found, "hook")) > 1
    return f"{text} ({min(values):+.3f} to {max(values):+.3f} over hooks)" if several else text


def killed(rows: Sequence[Row]) -> tuple[int, int]:
    """How many of the toy features that are dead by theory are not learnt, and of how many."""
    own = select(rows, predicted=0)
    return sum(row["learnt"] < KILLED * row["strength"] for row in own), len(own)


def theory_text(toy: Sequence[Row]) -> str:
    """How theory and measurement agree, in a sentence."""
    alive = [row for row in toy if row["predicted"] > 0]
    errors = [abs(row["learnt"] - row["predicted"]) for row in alive]
    shares = [(row["strength"] - row["learnt"]) / (row["l1_coefficient"] / 2) for row in alive]
    n, of = killed(toy)
    return (
        f"shrinkage is {mean(shares):.3f} times λ/2 on average ({min(shares):.3f} to "
        f"{max(shares):.3f}) over {len(alive)} alive features of all strengths, frequencies and "
        f"coefficients, the largest difference {max(errors):.3f}; of {of} features below λ/2, {n} "
        "are not learnt"
    )
