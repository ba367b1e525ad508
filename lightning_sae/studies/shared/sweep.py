"""Families of SAEs, trained at all weights of their penalties on one pass for each seed."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from matplotlib.axes import Axes

from lightning_sae.data.datamodule import HeldOutBatches
from lightning_sae.studies.shared.evaluation import evaluate, scalars
from lightning_sae.studies.shared.families import Family, choose
from lightning_sae.studies.shared.frontier import Curve
from lightning_sae.studies.shared.page import Page, Section, Table, caution, publish
from lightning_sae.studies.shared.plots import Point, curves, name_point, panels, save
from lightning_sae.studies.shared.rows import Row, known, select, spread, with_spread
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together
from lightning_sae.studies.shared.tuning import Tuned, require_rates, tune

Answers = dict[str, list[float | None]]
"""Comparisons of a family with the baseline, by seed; None where they have no common range."""

Answer = TypeVar("Answer")

BIAS = "relative_reconstruction_bias"

METHOD = (
    "Each family is swept over the weight of its penalty. All SAEs of a seed see the same batches, "
    "from one pass of the language model; all figures are of held-out text. Learning rates are "
    "each family's own, chosen on a separate seed by the family's objective on held-out text."
)


@dataclass(frozen=True)
class Swept:
    """All SAEs of a study.

    Attributes:
        families: What was trained; the first is the baseline.
        seeds: Number of repetitions.
        tuned: Results of the choice of learning rates.
        rows: Figures of each SAE that did not diverge, with its `family`, `coefficient`, `lr` and
            `seed`.
        folder: The study's.
        settings: The study's, as plain values.
        setting: Model, text and length.
    """

    families: Sequence[Family]
    seeds: int
    tuned: Tuned
    rows: Sequence[Row]
    folder: Path = Path()
    settings: Mapping[str, Any] = field(default_factory=dict)
    setting: Setting | None = None

    def held_out(self) -> HeldOutBatches:
        """Raw activations on which all SAEs are evaluated."""
        assert self.setting is not None
        return HeldOutBatches(self.setting.held_out(), self.setting.held_out_tokens)

    @staticmethod
    def name(row: Row) -> str:
        """The name of a row's SAE, which is that of its folder."""
        return f"{row['family']}-{row['coefficient']}"

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the families by name."""
        return {family.name: family.label for family in self.families}

    @property
    def diverged(self) -> list[str]:
        """SAEs that are missing."""
        return [
            f"{family.label} at {coefficient:g} with seed {seed}"
            for seed in range(self.seeds)
            for family in self.families
            for coefficient in family.coefficients
            if not select(self.at(family, coefficient), seed=seed)
        ]

    def at(self, family: Family, coefficient: float) -> list[Row]:
        """The rows of one family and coefficient."""
        return select(self.rows, family=family.name, coefficient=coefficient)

    def curve(self, family: Family, seed: int, figure: str) -> Curve | None:
        """A family's figure against L0 in one repetition."""
        own = select(self.rows, family=family.name, seed=seed)
        return Curve.of([(row["l0"], row[figure]) for row in own])

    def compare(
        self, family: Family, figure: str, question: Callable[[Curve, Curve], Answer | None]
    ) -> list[Answer | None]:
        """The result of `question` for the curves of a family and the baseline, by seed."""
        answers = []
        for seed in range(self.seeds):
            own, baseline = (self.curve(each, seed, figure) for each in (family, self.families[0]))
            answers.append(None if own is None or baseline is None else question(own, baseline))
        return answers

    def draw(self, path: Path, figures: Mapping[str, str], dotted: Mapping[str, float]) -> Path:
        """Draw figures against L0, means over seeds with their spread.

        Args:
            path: The image file.
            figures: Figures with the labels of their axes, three per row.
            dotted: Value at which a figure has a dotted line.
        """
        picture, axes = panels(3, len(figures) // 3)
        for panel, (name, label) in zip(axes, figures.items(), strict=True):
            means, spreads = self.points(name)
            curves(panel, means, x="L0 (active latents)", y=label, spread=spreads, logarithmic=True)
            if panel is axes[0]:
                self._name_points(panel, means)
            if name in dotted:
                panel.axhline(dotted[name], color="#5b6673", linewidth=0.8, linestyle=":")
        return save(picture, path)

    def _name_points(self, axes: Axes, means: Mapping[str, list[Point]]) -> None:
        """Write the coefficient beside each SAE."""
        for family in self.families:
            living = [
                c for c in family.coefficients if any(r["l0"] > 0 for r in self.at(family, c))
            ]
            for coefficient, point in zip(living, means[family.label], strict=True):
                name_point(axes, point, f"{coefficient:g}")

    def points(self, figure: str) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
        """Means over seeds of L0 and a figure by label and coefficient, and their spreads."""
        means: dict[str, list[Point]] = {}
        spreads: dict[str, list[Point]] = {}
        for family in self.families:
            both = [
                (known(rows, "l0"), known(rows, figure))
                for rows in (self.at(family, coefficient) for coefficient in family.coefficients)
                if any(row["l0"] > 0 for row in rows)
            ]
            means[family.label] = [(mean(l0), mean(values)) for l0, values in both]
            spreads[family.label] = [(spread(l0), spread(values)) for l0, values in both]
        return means, spreads

    def clean(self) -> str:
        """The unchanged model's cross-entropy, as a reference."""
        found = known(self.rows, "ce_clean")
        return f"Without an SAE the model's CE is {mean(found):.3f} nats." if found else ""

    def caution(self) -> str:
        """Names the SAEs that are poor."""
        return caution(
            {
                f"{family.label}, {coefficient:g}": self.at(family, coefficient)
                for family in self.families
                for coefficient in family.coefficients
            }
        )

    def section(self, figures: Mapping[str, tuple[str, str]]) -> Section:
        """The table of all families and coefficients.

        Args:
            figures: Heading and format of each figure.
        """
        rows = [
            [
                family.label,
                f"{coefficient:g}",
                *(
                    with_spread(known(self.at(family, coefficient), figure), form, "diverged")
                    for figure, (_, form) in figures.items()
                ),
            ]
            for family in self.families
            for coefficient in family.coefficients
        ]
        headings = ["", "coefficient", *(heading for heading, _ in figures.values())]
        note = f"Mean ± standard deviation over {self.seeds} seeds."
        text = [f"Training diverged: {'; '.join(self.diverged)}."] if self.diverged else []
        return Section("All SAEs", text, [Table(headings, rows, note)])

    def publish(self, answers: Mapping[str, Answers], page: Page) -> None:
        """Write results and page, and print what was found."""
        results = {
            "settings": self.settings,
            "tuning": self.tuned.plain(),
            "answers": answers,
            "diverged": self.diverged,
            "saes": self.rows,
        }
        page = replace(page, results=results, csv={"results": self.rows})
        publish(page, self.folder, f"from {len(self.rows)} SAEs")


def train_families(
    families: Sequence[Family],
    names: str,
    argument: str,
    output: str,
    coefficients: dict[str, list[float]] | None = None,
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2),
    tuning_steps: int = 300,
    d_sae: int = 512,
    steps: int = 800,
    batch_size: int = 1024,
    held_out_tokens: int = 32768,
    hook_name: str = "blocks.1.hook_resid_post",
    settings: Mapping[str, Any] | None = None,
    **common: Any,
) -> Swept:
    """Choose learning rates, then train and evaluate families with all seeds.

    All results are kept in the study's folder; existing ones are read instead of recomputed.

    Args:
        families: All families of the study; the first is the baseline.
        names: Comma-separated names of the families to train.
        argument: Name of the argument `names` for the user, for errors.
        output: The study's folder.
        coefficients: Weights of the penalty by family.
        learning_rates: Candidates, from which one is chosen for each family.
        tuning_steps: Optimizer steps of the runs for that choice.
        d_sae: Latents of each SAE.
        steps: Optimizer steps of each SAE.
        batch_size: Activations in a step.
        held_out_tokens: Held-out tokens that every SAE is evaluated on.
        hook_name: TransformerLens name of the hook.
        settings: Those of the study itself, as plain values.
        common: Arguments common to all studies of a language model; see `Setting`.

    Raises:
        ValueError: If an argument is out of range or `output` has something else in it.
    """
    chosen = choose(families, names, coefficients, argument)
    require_rates(learning_rates, tuning_steps)
    setting = Setting(
        output,
        hook_name,
        d_sae=d_sae,
        steps=steps,
        batch_size=batch_size,
        held_out_tokens=held_out_tokens,
        lr=min(learning_rates),
        **common,
    )
    settings = {
        **(settings or {}),
        "coefficients": {family.name: list(family.coefficients) for family in chosen},
        "lr": [*learning_rates],  # overrides that of `Setting`
        "tuning_steps": tuning_steps,
    }
    folder = setting.open(**settings)
    tuned = tune(setting, chosen, learning_rates, tuning_steps)
    rows = [row for s in range(setting.seeds) for row in sweep(setting, chosen, tuned.chosen, s)]
    shown = {**setting.plain(), **settings, "seeds": setting.seeds}
    return Swept(chosen, setting.seeds, tuned, rows, folder, shown, setting)


def sweep(
    setting: Setting, families: Sequence[Family], learning_rates: Mapping[str, float], seed: int
) -> list[Row]:
    """Train and evaluate all families at all their coefficients; SAEs that diverged are left out.

    Args:
        setting: The study's setting; its folder keeps the results.
        families: Families to train.
        learning_rates: Learning rates by family.
        seed: Seed of the initial weights and of the order of the text.
    """
    folder = setting.folder / f"seed-{seed}"
    names = {f"{f.name}-{c}": (f, c) for f in families for c in f.coefficients}
    members = [
        family.member(setting, name, coefficient, learning_rates[family.name])
        for name, (family, coefficient) in names.items()
    ]
    sys.stderr.write(f"seed {seed} of {setting.seeds}: {len(members)} SAEs side by side\n")
    saes = train_together(setting, folder, members, seed=seed)
    data, n = setting.held_out(), setting.held_out_tokens
    figures = evaluate(saes, data, n, folder / "evaluation.json")
    return [
        {
            "family": family.name,
            "coefficient": coefficient,
            "lr": learning_rates[family.name],
            "seed": seed,
            **scalars(figures[name]),
        }
        for name, (family, coefficient) in names.items()
        if name in figures
    ]


def over_seeds(values: Sequence[float | None], form: str = ".2f") -> str:
    """Mean and spread of a comparison over the seeds in which it is available."""
    found = [value for value in values if value is not None]
    text = with_spread(found, form, "no common range")
    partly = 0 < len(found) < len(values)
    return f"{text} ({len(found)} of {len(values)} seeds)" if partly else text


def in_every_repetition(ratios: Sequence[float]) -> str:
    """Words for whether ratios of L0 are below or above 1 in all seeds."""
    if max(ratios) < 1 or min(ratios) > 1:
        return f"{'less' if max(ratios) < 1 else 'more'} in every repetition"
    return "less or more by repetition"
