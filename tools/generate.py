"""Write on after a prompt: text to stdout as it comes, the speed to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ir.errors import UnsupportedError
from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from backends.base import Runtime
    from backends.generation import Generation


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(prog="nomul generate", description=__doc__)
    p.add_argument("model", metavar="PATH", help="artifact, Hugging Face directory or hub id, .gguf file or zoo name")
    p.add_argument("prompt", help="the text to go on from")
    p.add_argument("-n", "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to write at most (64)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: all)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that add up to P")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draws (default 0)")
    p.add_argument("--mode", metavar="MODE", help="run compressed linears by multiply (default), shift or codes")
    p.add_argument("--target", metavar="NAME", help="run on this backend (default: the one it was compiled for)")
    p.add_argument("--planes", type=int, metavar="N", help="planes that nested linears use (default: as stored)")
    p.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    p.add_argument("--stats", action="store_true", help="say how fast, in what memory and by which kernels it ran")
    p.add_argument("--json", action="store_true", help="print one JSON object when done")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from tools.load import load

    runtime = load(options.model, options.target, options.mode, console.note, options.planes)
    runtime.require_language_model()
    prompt = chat_prompt(runtime, options.prompt) if options.chat else options.prompt
    result = runtime.generate(
        prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        on_text=None if options.json else _stream,
    )
    stats = _stats(runtime, result) if options.stats else None
    if options.json:
        found = {**asdict(result), "tokens_per_second": result.tokens_per_second}
        console.print_json(found if stats is None else {**found, "stats": stats})
    else:
        print()
    console.note(_speed(result))
    if stats is not None:
        console.note(_stats_text(stats))
    return 0


def chat_prompt(runtime: Runtime, message: str) -> list[int]:
    """Return the token ids of a user's message in the chat template; raises UnsupportedError when there is none."""
    tokenizer = runtime.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError(
            "the model has no chat template",
            where=runtime.program.name,
            why="its tokenizer brings none, so it was hardly trained on dialogues",
            fix="leave --chat out",
        )
    turns = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stream(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _speed(result: Generation) -> str:
    prompt, new = len(result.prompt_ids), len(result.ids)
    speed = f"{result.tokens_per_second:.1f} tokens/s" if result.decode_seconds else "-"
    ended = "end of text" if result.stopped == "end" else "length limit"
    return f"{prompt} tokens read in {result.prefill_seconds:.2f} s, {new} written at {speed}, stopped at {ended}"


def _stats(runtime: Runtime, result: Generation) -> dict[str, Any]:
    """Return speeds, peak memory and the kernel of every linear, for the onnxruntime backend as its files tell."""
    from backends.onnxruntime.runtime import OnnxRuntime
    from backends.reference.runtime import ReferenceRuntime
    from tools.peak import peak_bytes
    from tools.site_kernels import kernel_lines, site_kernels

    sites = site_kernels(runtime.folder) if isinstance(runtime, OnnxRuntime) and runtime.folder else []
    reference = f"all by the reference backend, mode {runtime.mode}" if isinstance(runtime, ReferenceRuntime) else ""
    return {
        "prefill_tokens_per_second": len(result.prompt_ids) / result.prefill_seconds,
        "first_token_seconds": result.prefill_seconds,
        "decode_tokens_per_second": result.tokens_per_second,
        "peak_bytes": peak_bytes(),
        "sites": [asdict(site) for site in sites],
        "kernels": kernel_lines(sites) or [reference or "not told by this backend"],
    }


def _stats_text(stats: dict[str, Any]) -> str:
    peak = "not told by this system" if stats["peak_bytes"] is None else console.size_text(stats["peak_bytes"])
    return "\n".join(
        [
            f"prefill   {stats['prefill_tokens_per_second']:.1f} tokens/s, first token after "
            f"{stats['first_token_seconds']:.2f} s",
            f"decode    {stats['decode_tokens_per_second']:.1f} tokens/s",
            f"memory    {peak} at most, Python and its packages included",
            *(f"{'linears' if i == 0 else '':10}{line}" for i, line in enumerate(stats["kernels"])),
        ]
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
