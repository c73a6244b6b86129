"""Fine-tune a BERT on sentences with labels, as SST-2 in GLUE.

    python examples/bert_text_classification.py --data SST-2/train.tsv --weights bert-base-uncased/
    python examples/bert_text_classification.py --policy gact-l1 --amp bf16

`--data` is a TSV file with a header, a sentence and a whole number on each line; without it,
sentences are made up. `--weights` is a folder of transformers' with model and tokenizer; else
random weights, and words as tokens.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path
from typing import Any

import torch
import training
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]
PAD, UNKNOWN, START = 0, 1, 2
SUBJECTS = ("the film", "this story", "a plot", "her acting", "the ending", "his music")
WORDS = (("dull", "a mess", "awful", "too long"), ("a joy", "moving", "clever", "superb"))


def read(path: Path | None) -> tuple[list[str], list[int]]:
    """(sentences, labels)."""
    if path is None:
        draw = random.Random(0)
        labels = [draw.randrange(2) for _ in range(2000)]
        return [f"{draw.choice(SUBJECTS)} is {draw.choice(WORDS[y])}" for y in labels], labels
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [row[0] for row in rows], [int(row[1]) for row in rows]


def words_as_tokens(sentences: list[str], length: int) -> tuple[Batch, int]:
    """(token ids and attention mask of all sentences, size of the vocabulary)."""
    known: dict[str, int] = {}
    rows = torch.full((len(sentences), length), PAD)
    for row, sentence in zip(rows, sentences, strict=True):
        ids = [known.setdefault(w, START + 1 + len(known)) for w in sentence.lower().split()]
        ids = [START, *ids][:length]
        row[: len(ids)] = torch.tensor(ids)
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}, START + 1 + len(known)


def main(argv: list[str] | None = None) -> int:
    parser = training.parser(__doc__, lr=3e-5)
    parser.add_argument("--weights", type=Path, help="a folder of transformers' with a tokenizer")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sentence")
    parser.add_argument("--layers", type=int, default=4, help="of random weights")
    parser.add_argument("--width", type=int, default=256, help="of random weights")
    args = parser.parse_args(argv)

    sentences, labels = read(args.data)
    classes = max(labels) + 1
    torch.manual_seed(args.seed)
    if args.weights is None:
        tokens, size = words_as_tokens(sentences, args.length)
        config = transformers.BertConfig(
            vocab_size=size, hidden_size=args.width, num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.width // 64), intermediate_size=4 * args.width,
            num_labels=classes,
        )  # fmt: skip
        model: Any = transformers.BertForSequenceClassification(config)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.weights)
        tokens = dict(
            tokenizer(
                sentences, padding="max_length", truncation=True, max_length=args.length,
                return_tensors="pt",
            )
        )  # fmt: skip
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            args.weights, num_labels=classes
        )
    targets = torch.tensor(labels)

    def sample(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(targets), (args.batch,), generator=generator)
        return {**{k: v[chosen] for k, v in tokens.items()}, "labels": targets[chosen]}

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    training.train(model, training.seeded(args.seed, sample), loss_of, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
