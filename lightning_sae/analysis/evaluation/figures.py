"""All metrics of SAEs at one hook: those of `test`, probing, absorption, compute, redundancy."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_sae.analysis.compare import compare_weights
from lightning_sae.analysis.evaluation import absorption, probing, properties
from lightning_sae.analysis.evaluation.compute import Curve, compute_hit, curve_of
from lightning_sae.analysis.evaluation.held_out import held_out_figures
from lightning_sae.analysis.evaluation.passages import Blocks, Passage, blocks_of, halves
from lightning_sae.analysis.evaluation.progress import Progress, say_nothing
from lightning_sae.analysis.evaluation.redundancy import duplicate_share, together_share
from lightning_sae.analysis.evaluation.sample import (
    Sample,
    latents_of,
    means_of_blocks,
    read_sample,
)
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import expect
from lightning_sae.data import ActivationDataModule

Figures = dict[str, Any]
FIRST_LETTER = "first_letter="
NONE = ": none has enough examples in this text, see `left_out` in evaluation.json"
NO_QUESTIONS: Mapping[str, properties.Question] = {}


class Questions(NamedTuple):
    """The properties to probe, determined before any model runs.

    Attributes:
        blocks: The text in blocks.
        of_tokens: Labels of all tokens, by property.
        of_blocks: Labels of all blocks, by property.
        tested_tokens: Mask of the tokens in the test half.
        tested_blocks: Mask of the blocks in the test half.
        left_out: Number of examples of each property that is left out.
    """

    blocks: Blocks
    of_tokens: dict[str, Int[Tensor, " tokens"]]
    of_blocks: dict[str, Int[Tensor, " blocks"]]
    tested_tokens: Bool[Tensor, " tokens"]
    tested_blocks: Bool[Tensor, " blocks"]
    left_out: dict[str, dict[str, int]]


def questions_of(
    passages: list[Passage],
    context_length: int,
    own: Mapping[str, properties.Question] = NO_QUESTIONS,
    needed: tuple[str, ...] = (),
) -> Questions:
    """Labels of a text for the properties that have examples of both classes in both halves.

    Args:
        passages: The text.
        context_length: Tokens in a block.
        own: User-defined properties, by name.
        needed: Prefixes of property names of which at least one property must remain.

    Raises:
        ValueError: If a user-defined property lacks examples of a class.
    """
    tested = halves(passages)
    blocks = blocks_of(passages, context_length)
    labels = properties.labels_of(passages, own)
    lengths = torch.tensor([len(passage.tokens) for passage in passages])
    tested_tokens, tested_blocks = tested.repeat_interleave(lengths), tested[blocks.passage]
    of_blocks = {name: of[blocks.passage] for name, of in labels.of_passages.items()}
    left_out: dict[str, dict[str, int]] = {}

    def asked(found: dict[str, Tensor], tested: Tensor, fewest: int) -> dict[str, Tensor]:
        kept = {}
        for name, values in found.items():
            fits, counts = properties.usable(values, tested, fewest)
            if fits:
                kept[name] = values
                continue
            expect(
                name not in own,
                "properties",
                f"properties with at least {fewest} examples of each class in each half",
                f"`{name}` with {counts}: give more `probe_tokens` or text, or leave it out",
            )
            left_out[name] = counts
        return kept

    of_tokens = asked(labels.of_tokens, tested_tokens, properties.FEWEST)
    of_blocks = asked(of_blocks, tested_blocks, properties.FEWEST // 2)
    for beginning in needed:
        some = any(name.startswith(beginning) for name in of_blocks)
        missing = {n: c for n, c in left_out.items() if n.startswith(beginning)}
        expect(
            some,
            "label_column",
            "a column with a value that many, but not all, held-out documents have",
            f"{missing or 'no value that occurs four times'}: give more `probe_tokens` or text",
        )
    return Questions(blocks, of_tokens, of_blocks, tested_tokens, tested_blocks, left_out)


def evaluate_saes(
    saes: Mapping[str, SparseAutoencoder],
    data: ActivationDataModule,
    questions: Questions,
    *,
    n_tokens: int = 131072,
    curve: Curve | None = None,
    seed: int = 0,
    say: Callable[[str], None] = say_nothing,
) -> tuple[dict[str, Figures], Figures]:
    """Evaluate SAEs of one model and hook on the same text.

    Args:
        saes: SAEs by name, on the device of the activations.
        data: Provides the language model and its held-out text.
        questions: The properties to probe.
        n_tokens: Held-out tokens for the figures of `test`.
        curve: Compute and loss of similar models; by default the package's, for the embedded model.
        seed: Seed of the draw of tokens for probes and of random baseline rows.
        say: Called with progress messages.

    Returns:
        The figures of each SAE by name, and those of the activation and of neurons as baselines.
    """
    say(f"reading {n_tokens:,} held-out tokens for the figures of `test`")
    curve = curve or curve_of(data.source.get("model"))
    held_out = held_out_figures(saes, data, n_tokens, say)
    figures: dict[str, Figures] = {name: {"held_out": found} for name, found in held_out.items()}
    say(f"reading {int((questions.blocks.number >= 0).sum()):,} tokens for probes")
    sample = read_sample(data, questions.blocks, say)
    tasks = _tasks(sample, questions, seed)
    say(f"probing activations and neurons, properties: {len(tasks)}{'' if tasks else NONE}")
    reference = _reference(sample, tasks, say)
    probes = _probes(sample, questions, seed)
    for name, sae in saes.items():
        say(f"probing the latents of {name}")
        own, cpu = figures[name], sae.W_dec.detach().float().cpu()
        latents = latents_of(sae, sample.x)
        _require_finite(name, latents)
        own["compute"] = _compute(curve, own["held_out"])
        progress = Progress(say, f"probing the latents of {name}", len(tasks) + len(probes))
        own["probing"] = _probed(latents, sample, tasks, progress)
        own["absorption"] = _absorption(sae, latents, sample, probes, progress)
        alive = torch.from_numpy(np.asarray((latents > 0).sum(0)).ravel() > 0)
        own["duplicates"] = duplicate_share(cpu, alive)
        own["together"] = together_share(latents)
    for name, found in _stability(saes, seed).items():
        figures[name]["stability"] = found
    return figures, reference


class _Task(NamedTuple):
    """A task and its rows: tokens, or means over blocks."""

    of: str
    task: probing.Task


def _tasks(sample: Sample, questions: Questions, seed: int) -> dict[str, _Task]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, labels in questions.of_tokens.items():
        tested = questions.tested_tokens[sample.token]
        task = probing.balanced_task(labels[sample.token], tested, generator)
        found[name] = _Task("token", task)
    blocks = sample.block.unique()
    for name, labels in questions.of_blocks.items():
        tested = questions.tested_blocks[blocks]
        found[name] = _Task("context", probing.balanced_task(labels[blocks], tested, generator))
    return {name: task for name, task in found.items() if len(task.task.test_labels)}


def _rows(matrix: Any, sample: Sample) -> dict[str, Any]:
    """A matrix over tokens, and its means over blocks."""
    return {
        "token": matrix,
        "context": means_of_blocks(matrix, sample.block, sample.block.unique()),
    }


def _require_finite(name: str, latents: Any) -> None:
    if not np.isfinite(latents.data).all():
        raise ValueError(
            f"Expected argument `saes` to have finite latents but those of {name} are not on this "
            "text: leave it out, or look at its weights."
        )


def _reference(
    sample: Sample, tasks: Mapping[str, _Task], say: Callable[[str], None] = say_nothing
) -> Figures:
    """Accuracy of probes on the whole activation, and on a few neurons."""
    progress = Progress(say, "probing activations and neurons", len(tasks))
    x, neurons = _rows(sample.x.numpy(), sample), _rows(sample.neurons.numpy(), sample)
    found = {}
    for name, (of, task) in tasks.items():
        few = probing.sparse_probes(neurons[of], task)
        found[name] = {
            "of": of,
            "activation": probing.full_probe(x[of], task),
            **{f"neurons_{k}": accuracy for k, accuracy in few.items()},
            "rows": len(task.train_labels),
        }
        progress.add()
    return {"neurons_at": sample.neurons_at, "probing": found}


def _probed(
    latents: Any, sample: Sample, tasks: Mapping[str, _Task], progress: Progress
) -> Figures:
    """What probes reach on few latents."""
    rows, found = _rows(latents, sample), {}
    for name, (of, task) in tasks.items():
        few = probing.sparse_probes(rows[of], task)
        found[name] = {"of": of, **{f"latents_{k}": accuracy for k, accuracy in few.items()}}
        progress.add()
    return found


def _compute(curve: Curve | None, held_out: Mapping[str, float]) -> Figures | None:
    if curve is None:
        return None
    hit = compute_hit(curve, held_out["ce_spliced"] - held_out["ce_clean"])
    return None if hit is None else hit._asdict()


class _Probed(NamedTuple):
    rows: absorption.Rows
    probe: absorption.Probe


def _probes(sample: Sample, questions: Questions, seed: int) -> dict[str, _Probed]:
    """Probes on the activation for token properties; only those with a sufficient F1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, labels in questions.of_tokens.items():
        per_type = properties.PER_TYPE if name.startswith(FIRST_LETTER) else None
        rows = absorption.natural_rows(
            labels[sample.token],
            questions.tested_tokens[sample.token],
            sample.ids,
            per_type,
            generator,
        )
        if any(len(rows.labels[half].unique()) < 2 for half in (rows.train, rows.test)):
            continue
        probe = absorption.train_probe(sample.x, rows)
        if probe.f1 >= absorption.LEAST_F1 and len(probe.found) >= absorption.FEWEST:
            found[name] = _Probed(rows, probe)
    return found


@torch.no_grad()
def _absorption(
    sae: SparseAutoencoder,
    latents: Any,
    sample: Sample,
    probes: Mapping[str, _Probed],
    progress: Progress,
) -> Figures:
    """Absorption of each property that has latents of its own."""
    W_dec = sae.W_dec.detach().float().cpu()
    silent = torch.zeros_like(sae.encode(sample.x[:1].to(sae.W_dec.device)))
    origin = sae.decode(silent)[0].float().cpu()
    found = {}
    for name, (rows, probe) in probes.items():
        own, f1 = absorption.own_latents(latents, rows)
        progress.add()
        if not own:  # what none detects, none can be silent on
            continue
        projection = (sample.x[probe.found] - origin) @ probe.direction
        f = torch.from_numpy(probing.dense(latents[probe.found.numpy()]))
        fraction, full = absorption.absorbed(projection, f, W_dec, probe.direction, own)
        found[name] = {
            "fraction": float(fraction.mean()),
            "full": float(full.float().mean()),
            "latents": own,
            "f1": f1,
            "probe_f1": probe.f1,
            "tokens": len(probe.found),
        }
    return found


def _stability(saes: Mapping[str, SparseAutoencoder], seed: int) -> dict[str, Figures]:
    """Matched cosines of SAEs with equal settings, which may differ only in their seeds."""
    pairs: dict[str, list[Figures]] = {name: [] for name in saes}
    for a, b in combinations(saes, 2):
        if _is_of_one_kind(saes[a], saes[b]):
            found = compare_weights(saes[a], saes[b], seed)["figures"]
            for one, other in ((a, b), (b, a)):
                pairs[one].append({"with": other, **found})
    return {name: {"pairs": found} for name, found in pairs.items()}


def _is_of_one_kind(a: SparseAutoencoder, b: SparseAutoencoder) -> bool:
    """Whether two SAEs differ in their seeds only: no copies, as of one that was imported."""
    same = type(a) is type(b) and dict(a.hparams) == dict(b.hparams)
    same = same and a.n_trained == b.n_trained
    return same and not torch.allclose(a.W_dec.cpu(), b.W_dec.cpu(), rtol=1e-4)
