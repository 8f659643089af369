"""Continue a text. Tokens are the checkpoint's own where it brings a tokenizer, else bytes.

example:
  kizzasi generate runs/first --prompt "def " --tokens 200 --temperature 0.8 --seed 1
  kizzasi generate runs/first --prompt "def " --cache nf4 --cache-window 8192 --cache-first 4
  kizzasi generate SmolLM2.gguf --quantized --prompt "The capital of France is" --temperature 0
  head -c 300 notes.txt | kizzasi generate runs/first --prompt - --stop "." --stop $'\\n\\n'
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kizzasi.cli.common import add_engine, check_device, checkpoint_of
from kizzasi.cli.errors import shown
from kizzasi.errors import DataError, SpecError
from kizzasi.files import read_bytes
from kizzasi.progress import Line

if TYPE_CHECKING:
    from torch import Tensor

    from kizzasi.models import SequenceModel
    from kizzasi.models.checkpoints.tokenizers import Tokenizer

TEMPERATURE, MAX_SEED = 0.8, 2**31
MOST_PROMPT = 2**24  # bytes
MOST_BEAMS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(seed=None)
    parser.add_argument("model", help="a checkpoint folder, a search's folder, or a .gguf file")
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt", default="\n", help="text to continue; - reads it from stdin (default: new line)"
    )
    given.add_argument("--prompt-file", metavar="FILE", help="text to continue, in a file")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add (default 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        help=f"0 is greedy (default {TEMPERATURE}; 0 with --beams)",
    )
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
        "--cache",
        choices=("int8", "fp8", "nf4"),
        help="remember keys and values in 8 or 4 bits (default: as they are)",
    )
    parser.add_argument(
        "--cache-window", type=int, metavar="N", help="remember the last N tokens (default: all)"
    )
    parser.add_argument(
        "--cache-first",
        type=int,
        metavar="N",
        help="beside the window, remember the first N tokens, as they are (try 4)",
    )
    add_engine(parser)
    parser.add_argument(
        "--quantized", action="store_true", help="keep a .gguf file's small weights: faster on CPU"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.beams > MOST_BEAMS or args.tokens > MAX_SEED:
        raise SpecError(f"--beams above {MOST_BEAMS} or --tokens above 2^31: give fewer")
    prompt_text = read_prompt(args)
    with Line("generate") as line:
        line.say("loading the model")
        model, tokenizer = _loaded(args)
    import torch

    prompt = tokenizer.encode(prompt_text)
    if not prompt:
        raise DataError(f"{prompt_text!r:.60}: the tokenizer makes no token of this prompt")
    streamed = args.beams == 1 and not args.json
    seed = secrets.randbelow(MAX_SEED) if args.seed is None else args.seed
    settings = sampling(args, tokenizer)
    drawn = args.seed is None and settings["temperature"] > 0
    note = f"seed {seed} (--seed {seed} gives this text again)" if drawn else ""
    state = None
    if model.spec.encodes:  # another seed, other latent bits
        from kizzasi.models.layers.latent import with_latent_key

        state = with_latent_key(model.init_state(1), seed)
    show = Show(prompt_text, Text(tokenizer.decode, prompt, args.stop), note)
    start = time.perf_counter()
    out = model.generate(
        torch.tensor(prompt, device=args.device),
        args.tokens,
        state=state,
        seed=seed,
        on_token=show if streamed else None,
        **settings,
    )
    seconds = time.perf_counter() - start
    new = out.tolist()[len(prompt) :]
    whole = prompt_text + Text(tokenizer.decode, prompt, args.stop).finish(new)
    result = {"text": whole, "tokens_per_second": len(new) / seconds, "seed": seed}
    return result, show.text.finish() if streamed else whole


def _loaded(args: argparse.Namespace) -> tuple[SequenceModel, Quiet]:
    """The model, with the cache that flags ask for, and its tokenizer."""
    from kizzasi.models import Tokens, load
    from kizzasi.models.checkpoints.tokenizers import load_tokenizer

    check_device(args.device)
    path = checkpoint_of(args.model)
    model = load(path, device=args.device, engine=args.engine, quantized=args.quantized)
    if (args.cache, args.cache_window, args.cache_first) != (None, None, None):
        window, first = args.cache_window, args.cache_first
        model = model.with_cache(args.cache or "none", window=window, n_global=first)
    stem = model.spec.stem
    if not isinstance(stem, Tokens):
        raise DataError(f"{path}: a model of signals; text needs a model of tokens")
    with quiet():
        return model, Quiet(load_tokenizer(Path(path), stem.vocab_size))


def sampling(args: argparse.Namespace, tokenizer: Quiet) -> dict[str, Any]:
    """The arguments of `generate` that flags give."""
    temperature = args.temperature
    if temperature is None:
        temperature = TEMPERATURE if args.beams == 1 else 0.0
    return {
        "temperature": temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "n_beams": args.beams,
        "eos": tokenizer.eos,
        "stop": args.stop if args.beams == 1 else (),  # the likeliest text is cut afterwards
        "decode": tokenizer.decode,
    }


def read_prompt(args: argparse.Namespace) -> str:
    """The text of --prompt, of stdin or of --prompt-file. Raises DataError if it is none."""
    if args.prompt_file is not None:
        name, data = f"--prompt-file {args.prompt_file}", read_bytes(args.prompt_file, MOST_PROMPT)
    elif args.prompt == "-":
        name, data = "--prompt -", sys.stdin.buffer.read(MOST_PROMPT)
    else:
        name, data = "--prompt", args.prompt.encode(errors="surrogateescape")
    try:
        text = data.decode()
        "".join(args.stop).encode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8 from byte {error.start} on; convert it first"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError("--stop: not UTF-8; convert it first") from error
    if not text:
        raise DataError(f"{name}: empty; give at least one character")
    return text


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that a package says past Python reaches the terminal: one in Rust tells of its panics
    in many lines, and what it raises is told in one."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Quiet:
    """A tokenizer that says nothing of its own."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner, self.eos = inner, inner.eos

    def encode(self, text: str) -> list[int]:
        with quiet():
            return self.inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        with quiet():
            return self.inner.decode(ids)


class Show:
    """Prints a text as its tokens come, the prompt before the first, and a note before that."""

    def __init__(self, prompt: str, text: Text, note: str) -> None:
        self.prompt, self.text, self.note = prompt, text, note

    def __call__(self, ids: Tensor) -> None:
        if self.note:
            print(self.note, file=sys.stderr)
            self.note = ""
        new = self.prompt + self.text.add(int(ids[0]))
        print(shown(new, lines=True) if sys.stdout.isatty() else new, end="", flush=True)
        self.prompt = ""


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
