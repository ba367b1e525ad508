"""The recipe that trains the embedded language model.

    python -m lightning_sae.data.embedded.recipe --output DIR

A GPT-NeoX-shaped language model of about 0.9 M parameters, on the Python standard library's
source: tokenizer and model see the training files only; the figures come from the held-out ones.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import lightning
import tokenizers
import torch
import transformers
from jaxtyping import Int
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lightning_sae.data.documents import Document, held_out
from lightning_sae.data.embedded import HELD_OUT_FRACTION, standard_library_documents
from lightning_sae.data.embedded.training import (
    CausalLanguageModel,
    ShuffledWindows,
    next_token_losses,
)

BOS = "<|endoftext|>"
BOS_ID = 0


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe.

    Attributes:
        steps: Optimizer steps.
        batch_size: Windows per step.
        context: Tokens per window, and the longest context of the model.
        vocabulary: Size of the byte-level BPE vocabulary.
        width: Width of the residual stream; the MLP is four times as wide.
        layers: Number of blocks.
        heads: Attention heads per block.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of the matrices.
        precision: Precision of the Lightning trainer; weights are kept in float32.
        seed: Of initialisation and order.
    """

    steps: int = 1500
    batch_size: int = 16
    context: int = 256
    vocabulary: int = 2048
    width: int = 128
    layers: int = 3
    heads: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    seed: int = 0


class HeldOutFigures(NamedTuple):
    """Scores of the model on the held-out files.

    Attributes:
        cross_entropy: Mean over the predicted tokens, in nats per token.
        unigram_entropy: Entropy of the distribution of these same tokens, in nats per token.
        bits_per_byte: The cross-entropy in bits, per byte of text predicted.
        n_tokens: Tokens predicted.
    """

    cross_entropy: float
    unigram_entropy: float
    bits_per_byte: float
    n_tokens: int


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE whose only special token, `<|endoftext|>`, has id 0."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocabulary, min_frequency=2, special_tokens=[BOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Int[Tensor, " n"]:
    """Tokenises texts and joins them into one row, each with the BOS token before it."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts))
    return torch.tensor([token for e in encodings for token in (BOS_ID, *e.ids)])


def entropy(tokens: Int[Tensor, " n"]) -> float:
    """Returns the entropy of the tokens' own distribution, in nats per token."""
    frequency = tokens.bincount().double() / len(tokens)
    return float(torch.special.entr(frequency).sum())


@torch.no_grad()
def evaluate(
    network: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int
) -> HeldOutFigures:
    """Scores a model on whole texts, packed and cut to windows of `context` predictions."""
    windows = pack(tokenizer, texts).unfold(0, context + 1, context)
    network.eval()
    losses = torch.cat([next_token_losses(network, rows).cpu() for rows in windows.split(16)])
    targets = windows[:, 1:].flatten()
    cross_entropy = float(losses.double().mean())
    text = str(tokenizer.decode(targets.tolist(), skip_special_tokens=True))
    bits = cross_entropy * len(targets) / torch.tensor(2.0).log().item()
    bits_per_byte = bits / len(text.encode())
    return HeldOutFigures(cross_entropy, entropy(targets), bits_per_byte, len(targets))


def split(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """Returns the texts of the training files and of the held-out files."""
    train = [d.text for d in documents if not held_out(d.name, HELD_OUT_FRACTION)]
    rest = [d.text for d in documents if held_out(d.name, HELD_OUT_FRACTION)]
    return train, rest


def build_network(settings: Settings, vocabulary: int) -> GPTNeoXForCausalLM:
    """Builds an untrained GPT-NeoX with tied embeddings and an exact-GELU MLP of 4 x width."""
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        hidden_act="gelu",
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    return GPTNeoXForCausalLM(config)


def save(network: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the folder that `transformers`, 4 or 5, loads with its Auto classes."""
    network.float().save_pretrained(output)
    tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
    # By hand: transformers 5 would name a class that transformers 4 does not have.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": network.config.max_position_embeddings,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train_embedded_model(
    output: Path, documents: Sequence[Document], settings: Settings
) -> HeldOutFigures:
    """Trains the tokenizer and the language model, scores them, writes the model's folder.

    Args:
        output: Folder to write; must not exist, or be empty.
        documents: The corpus; its files are split by `held_out`.
        settings: Sizes, schedule, seed.

    Returns:
        The figures on the held-out documents.

    Raises:
        ValueError: If `output` is neither new nor an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output: expected a new or an empty folder, got {output}, which holds something; "
            "nothing is overwritten: pass another folder or move this one away"
        )
    seed_everything(settings.seed)
    train, rest = split(documents)
    tokenizer = train_tokenizer(train, settings.vocabulary)
    network = build_network(settings, len(tokenizer))
    tokens = pack(tokenizer, train)
    start = time.monotonic()
    fit(network, tokens, settings)
    seconds = time.monotonic() - start
    figures = evaluate(network, tokenizer, rest, settings.context)
    save(network, tokenizer, output)
    facts = {
        "Held-out cross-entropy": f"{figures.cross_entropy:.3f} nats/token",
        "Unigram entropy of the same tokens": f"{figures.unigram_entropy:.3f} nats/token",
        "Gap": f"{figures.unigram_entropy - figures.cross_entropy:.3f} nats/token",
        "Held-out bits per byte": f"{figures.bits_per_byte:.3f}",
        "Held-out tokens": f"{figures.n_tokens:,} in {len(rest):,} files",
        "Training text": f"{len(tokens):,} tokens in {len(train):,} files",
        "Trained on": f"{settings.steps * settings.batch_size * settings.context:,} tokens",
        "Training time": f"{seconds / 60:.0f} minutes, {torch.get_num_threads()} CPU thread(s)",
        "Parameters": f"{network.num_parameters():,}, float32",
        "Layers; width; MLP width": f"{settings.layers}; {settings.width}; {4 * settings.width}",
        "Heads; context; vocabulary": f"{settings.heads}; {settings.context}; {len(tokenizer)}",
    }
    (output / "README.md").write_text(model_card(settings, facts), encoding="utf-8")
    return figures


def fit(network: GPTNeoXForCausalLM, tokens: Int[Tensor, " n"], settings: Settings) -> None:
    """Trains `network` in place on packed tokens."""
    batches = ShuffledWindows(tokens, settings.context, settings.batch_size, settings.seed)
    trainer = Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        precision=settings.precision,
        callbacks=[TQDMProgressBar(refresh_rate=20)],
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = CausalLanguageModel(
        network, settings.learning_rate, settings.weight_decay, settings.steps
    )
    trainer.fit(model, batches)


def model_card(settings: Settings, facts: dict[str, str]) -> str:
    """Returns the model card's Markdown.

    Args:
        settings: The settings of the run, written out as its command.
        facts: Rows of the table: what, and how much.
    """
    arguments = "".join(f" \\\n    --{name} {value}" for name, value in asdict(settings).items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# Embedded language model

A small GPT-NeoX (rotary positions, parallel residual, tied embeddings, exact-GELU MLP) with a
byte-level BPE of its own. It is made to be studied, not to write code.

| | |
|---|---|
{rows}

Text: the source of Python {platform.python_version()}'s standard library as found on the machine,
one document per file, without tests. A file is held out by the hash of its name
(`held_out(name, {HELD_OUT_FRACTION})`); tokenizer and model saw the other files only. The
cross-entropy is the mean over all tokens of the held-out files, packed to windows of
{settings.context} predictions, where a window's first tokens have little context. The unigram
entropy is that of the held-out tokens themselves.

`{BOS}` (id {BOS_ID}) stands before every document; it is the BOS and the EOS token, and the only
special token.

Trained by this package's recipe, seed {settings.seed}:

```
python -m lightning_sae.data.embedded.recipe --output DIR{arguments}
```

Versions: Python {platform.python_version()}, torch {torch.__version__},
lightning {lightning.__version__}, transformers {transformers.__version__},
tokenizers {tokenizers.__version__}.
Another Python has other files and another machine rounds otherwise: the figures then differ a
little.

Licence: the weights come with the package, under its licence. The text they were trained on is
under the PSF License Agreement, (c) Python Software Foundation; none of it is contained here.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the recipe from the command line.

    Args:
        arguments: Command-line arguments; those of the process if not given.
    """
    parser = ArgumentParser(prog="python -m lightning_sae.data.embedded.recipe")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the model")
    parser.add_class_arguments(Settings)
    options = parser.parse_args(arguments).as_dict()
    output = options.pop("output")
    figures = train_embedded_model(output, standard_library_documents(), Settings(**options))
    print(f"{output}: {figures}")  # noqa: T201


if __name__ == "__main__":
    main()
