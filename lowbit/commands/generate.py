"""`lowbit generate`."""

import dataclasses
import time

from lowbit.commands.common import Flag, Model, Result, Word, load, result, with_runtime
from lowbit.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt. Temperature 0, the default, always takes the most probable token."""

    model: Model
    """Folder, file, run directory or hub id."""
    prompt: str = ""
    """Text to continue; empty starts a new text."""
    tokens: int = 64
    """New tokens, at most (fewer where the text ends)."""
    temperature: float = 0.0
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    seed: int = 0
    kv: Word = None
    """Format of the key-value cache (see lowbit formats); the model's own by default."""
    k_cache: Word = None
    """Format of the keys alone."""
    v_cache: Word = None
    """Format of the values alone."""
    kv_rotate: Flag = False
    """Hadamard transform of keys, queries and values over the head dimension before they are quantized."""
    act: Word = None
    """Activation format of every linear inside blocks."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.models.cache import cache_bytes, without
        from lowbit.models.generate import generate, padded

        if self.tokens < 1:
            raise InputError(f"--tokens is {self.tokens} (allowed: at least 1)")
        if self.top_k < 0:
            raise InputError(f"--top-k is {self.top_k} (allowed: 0 or more)")
        model = with_runtime(load(self.model), self)
        if model.tokenizer is None:
            raise InputError(f"model {self.model} has no tokenizer (allowed: a model with one)")
        ids = model.tokenizer.encode(self.prompt)
        if not ids:
            if model.tokenizer.bos_id is None:
                raise InputError(
                    f"--prompt {self.prompt!r} has no tokens, and {self.model} no BOS (allowed: some text)"
                )
            ids = [model.tokenizer.bos_id]
        start = time.monotonic()
        options = {"temperature": self.temperature, "top_k": self.top_k or None, "top_p": self.top_p, "seed": self.seed}
        new = generate(model, [ids], self.tokens, **options)[0]
        seconds = time.monotonic() - start
        text = model.tokenizer.decode([*ids, *new])
        size = padded([ids], self.tokens)[1]
        data = {
            "model": self.model,
            "prompt": self.prompt,
            "text": text,
            "completion": model.tokenizer.decode(new),
            "prompt_tokens": len(ids),
            "token_ids": new,
            "seconds": round(seconds, 3),
            "cache_positions": size,
            "cache_bytes": cache_bytes(model.params, model.config, 1, size),
            "cache_bytes_fp": cache_bytes(without(model.params), model.config, 1, size, "bfloat16"),
        }
        return result(data, text)
