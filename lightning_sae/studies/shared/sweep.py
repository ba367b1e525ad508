"""Families trained at all weights of their penalties, on one pass of the model for each seed."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning_sae.studies.shared.evaluation import evaluate
from lightning_sae.studies.shared.families import Family, require_rates
from lightning_sae.studies.shared.folder import write_csv, write_json
from lightning_sae.studies.shared.frontier import Curve
from lightning_sae.studies.shared.page import Page, Section, Table, with_spread
from lightning_sae.studies.shared.setting import Setting
from lightning_sae.studies.shared.training import train_together
from lightning_sae.studies.shared.tuning import Tuned, tune

Row = dict[str, Any]
"""Figures of one SAE, with its `family`, `coefficient`, `lr` and `seed`."""

Answers = dict[str, list[float | None]]
"""Comparisons of a family with the first one, by seed; None where they have no common range."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Swept:
    """All SAEs of a study.

    Attributes:
        families: What was trained; the first is what others are compared with.
        seeds: Repetitions.
        tuned: How learning rates were chosen.
        rows: Figures of all SAEs that did not diverge.
    """

    families: Sequence[Family]
    seeds: int
    tuned: Tuned
    rows: Sequence[Row]

    @property
    def labels(self) -> dict[str, str]:
        """By name."""
        return {family.name: family.label for family in self.families}

    @property
    def diverged(self) -> list[str]:
        """SAEs that are missing."""
        there = {(row["family"], row["coefficient"], row["seed"]) for row in self.rows}
        return [
            f"{family.label} at {coefficient:g} with seed {seed}"
            for seed in range(self.seeds)
            for family in self.families
            for coefficient in family.coefficients
            if (family.name, coefficient, seed) not in there
        ]

    def curve(self, family: Family, seed: int, figure: str) -> Curve | None:
        """A family's figure against L0 in one repetition."""
        own = [row for row in self.rows if (row["family"], row["seed"]) == (family.name, seed)]
        return Curve.of([(row["l0"], row[figure]) for row in own])

    def values(self, family: Family, coefficient: float, figure: str) -> list[float]:
        """A figure of one family at one coefficient, by seed."""
        key = (family.name, coefficient)
        return [row[figure] for row in self.rows if (row["family"], row["coefficient"]) == key]

    def points(self, figure: str) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
        """Means over seeds of L0 and a figure by label and coefficient, and their spreads."""
        means: dict[str, list[Point]] = {}
        spreads: dict[str, list[Point]] = {}
        for family in self.families:
            both = [
                (self.values(family, coefficient, "l0"), self.values(family, coefficient, figure))
                for coefficient in family.coefficients
            ]
            known = [pair for pair in both if pair[0] and mean(pair[0]) > 0]
            means[family.label] = [(mean(l0), mean(values)) for l0, values in known]
            spreads[family.label] = [(_spread(l0), _spread(values)) for l0, values in known]
        return means, spreads

    def table(self, figures: Mapping[str, tuple[str, str]]) -> Table:
        """All families and coefficients.

        Args:
            figures: Heading and format of each figure.
        """
        rows = [
            [
                family.label,
                f"{coefficient:g}",
                *(
                    with_spread(values, form)
                    if (values := self.values(family, coefficient, figure))
                    else "diverged"
                    for figure, (_, form) in figures.items()
                ),
            ]
            for family in self.families
            for coefficient in family.coefficients
        ]
        headings = ["", "coefficient", *(heading for heading, _ in figures.values())]
        return Table(headings, rows, f"Mean ± standard deviation over {self.seeds} seeds.")

    def section(self, title: str, figures: Mapping[str, tuple[str, str]]) -> Section:
        """A section on all SAEs, with a word on those that are missing."""
        text = [f"Training diverged: {'; '.join(self.diverged)}."] if self.diverged else []
        return Section(title, text, [self.table(figures)])

    def present(
        self,
        setting: Setting,
        settings: dict[str, Any],
        answers: dict[str, Answers],
        draw: Callable[["Swept", Path], Path],
        report: Callable[["Swept", dict[str, Answers], Path, dict[str, Any]], Page],
        name: str,
    ) -> None:
        """Write figures, picture and page, print what was found, and say what was made.

        Args:
            setting: The study's.
            settings: What the study adds to it.
            answers: Comparisons by family.
            draw: Draws the picture into a file.
            report: Makes the page.
            name: Of the picture, less `.png`.
        """
        shown = {**setting.plain(), **settings, "seeds": setting.seeds}
        made = self._write(setting.folder, shown, answers)
        picture = draw(self, setting.folder / f"{name}.png")
        page = report(self, answers, picture, shown)
        made += [picture, page.write(setting.folder / "report.html")]
        last = f"Made: {', '.join(map(str, made))}, from {len(self.rows)} SAEs."
        sys.stdout.write("\n".join([*page.lines(), "", last]) + "\n")

    def _write(
        self, folder: Path, settings: dict[str, Any], answers: dict[str, Answers]
    ) -> list[Path]:
        """Figures of all SAEs as `results.json` and `results.csv`."""
        content = {
            "settings": settings,
            "tuning": self.tuned.plain(),
            "answers": answers,
            "diverged": self.diverged,
            "saes": list(self.rows),
        }
        json = write_json(folder / "results.json", content)
        return [json, write_csv(folder / "results.csv", self.rows)]


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def train_all(
    setting: Setting, families: Sequence[Family], learning_rates: Sequence[float], tuning_steps: int
) -> Swept:
    """Tune, then train and evaluate all families with all seeds; done parts are read.

    Args:
        setting: The study's; its folder keeps what was done.
        families: What is trained.
        learning_rates: To choose from, for each family.
        tuning_steps: Optimiser steps of the runs for that.
    """
    tuned = tune(setting, families, learning_rates, tuning_steps)
    rows = [
        row for seed in range(setting.seeds) for row in sweep(setting, families, tuned.chosen, seed)
    ]
    return Swept(families, setting.seeds, tuned, rows)


def sweep(
    setting: Setting, families: Sequence[Family], learning_rates: Mapping[str, float], seed: int
) -> list[Row]:
    """Train and evaluate all families at all their coefficients; SAEs that diverged are left out.

    Args:
        setting: The study's; its folder keeps what was done.
        families: What is trained.
        learning_rates: By family.
        seed: Of first weights and of the order of the text.
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
            **{key: value for key, value in figures[name].items() if key != "frequency"},
        }
        for name, (family, coefficient) in names.items()
        if name in figures
    ]


def settings_of(
    families: Sequence[Family], learning_rates: Sequence[float], tuning_steps: int
) -> dict[str, Any]:
    """What a sweep adds to the common settings; learning rates in the place of the one."""
    require_rates(learning_rates, tuning_steps)
    coefficients = {family.name: list(family.coefficients) for family in families}
    return {"coefficients": coefficients, "lr": [*learning_rates], "tuning_steps": tuning_steps}


def over_seeds(values: Sequence[float | None], form: str = ".2f") -> str:
    """Mean and spread of a comparison, where it could be made."""
    known = [value for value in values if value is not None]
    if not known:
        return "no common range"
    text = with_spread(known, form)
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} seeds)"
