"""Continue a text. Tokens are the checkpoint's own where it brings a tokenizer, else bytes.

example:
  kizzasi generate runs/first/best --prompt "def " --tokens 200 --temperature 0.8
  kizzasi generate SmolLM2.gguf --quantized --prompt "The capital of France is" --temperature 0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import check_device
from kizzasi.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint folder, or a .gguf file")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest p of probability")
    parser.add_argument("--min-p", type=float, help="sample among those with p of the likeliest's")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: fewer repeats (default 1)"
    )
    parser.add_argument("--beams", type=int, default=1, help="look for the likeliest text (try 4)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated"
    )
    parser.add_argument(
        "--quantized", action="store_true", help="keep a .gguf file's small weights: faster on CPU"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    from kizzasi.models import Tokens, load
    from kizzasi.models.checkpoints.tokenizer import load_tokenizer

    check_device(args.device)
    model = load(args.model, device=args.device, quantized=args.quantized)
    stem = model.spec.stem
    if not isinstance(stem, Tokens):
        raise DataError(f"{args.model}: a model of signals; text needs a model of tokens")
    tokenizer = load_tokenizer(Path(args.model), stem.vocab_size)
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise DataError("--prompt: empty; give at least one character")
    text = Text(tokenizer.decode, prompt, args.stop)
    streamed = args.beams == 1 and not args.json
    if streamed:
        print(args.prompt, end="", flush=True)

    def show(ids: Tensor) -> None:
        print(text.add(int(ids[0])), end="", flush=True)

    start = time.perf_counter()
    out = model.generate(
        torch.tensor(prompt, device=args.device),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        n_beams=args.beams,
        eos=tokenizer.eos,
        stop=args.stop,
        decode=tokenizer.decode,
        on_token=show if streamed else None,
        seed=args.seed,
    )
    seconds = time.perf_counter() - start
    new = out.tolist()[len(prompt) :]
    whole = args.prompt + Text(tokenizer.decode, prompt, args.stop).finish(new)
    result = {"text": whole, "tokens_per_second": len(new) / seconds}
    return result, text.finish() if streamed else whole


class Text:
    """A text that grows token by token, up to the first stop string.

    Args:
        decode: ids to text; incomplete UTF-8 ends in U+FFFD.
        prompt: what the text continues.
        stops: strings that end it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self.decode, self.stops = decode, stops
        self.ids, self.done = list(prompt), len(decode(prompt))

    def add(self, *ids: int) -> str:
        """The new characters that no later token can change."""
        text = self._cut([*ids])
        held = len(text) - len(text.rstrip("\ufffd"))
        for stop in self.stops:
            held = max([held, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
        return self._advance(text[: len(text) - held])

    def finish(self, ids: Sequence[int] = ()) -> str:
        """All that is left."""
        return self._advance(self._cut(ids))

    def _cut(self, ids: Sequence[int]) -> str:
        self.ids += ids
        text = self.decode(self.ids)[self.done :]
        return text[: min([len(text), *(i for s in self.stops if (i := text.find(s)) >= 0)])]

    def _advance(self, text: str) -> str:
        self.done += len(text)
        return text
