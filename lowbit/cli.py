"""`lowbit VERB ...`: finds the verb, turns bad input into one line and exit code 2.

Each verb is a module of `lowbit.commands` with a frozen dataclass of options and `main(options) -> Result`. Nothing
here or at the top of those modules imports jax, so that `--help` answers at once.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence

from lowbit import __version__
from lowbit.errors import InputError, Stopped, unknown

VERBS: dict[str, tuple[str, str, str]] = {  # verb: (module, options class, one line)
    "run": ("run", "Run", "run an experiment file"),
    "train": ("train", "Train", "quantization-aware training of a model"),
    "quantize": ("quantize", "Quantize", "quantize a model without training"),
    "merge": ("merge", "Merge", "add the adapters of a model into its weights"),
    "transform": ("transform", "Transform", "rotate or smooth a model: the same function, easier to quantize"),
    "eval": ("evaluate", "Eval", "perplexity, divergence and size of a model"),
    "compare": ("evaluate", "Compare", "evaluate several models on one text, in one table"),
    "export": ("quantize", "Export", "write a model for another runtime (GGUF, Hugging Face, AQLM, EXL3, ...)"),
    "generate": ("generate", "Generate", "continue a prompt"),
    "synthesize": ("synthesize", "Synthesize", "training text that a model writes itself"),
    "inspect": ("inspect", "Inspect", "configuration, tensors and sizes of a model"),
    "plan": ("rates", "PlanRates", "choose a format for each tensor under a budget of bytes"),
    "estimate": ("inspect", "Estimate", "size and memory of a quantization, before doing it"),
    "formats": ("inspect", "Formats", "list the formats"),
    "report": ("run", "Report", "table, plot and page from results"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 2 bad input, 130 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except InputError as e:
        print(f"lowbit: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except Stopped as e:
        print(f"lowbit: {e}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        again = " (the same command with --resume continues)" if argv[:1] in (["train"], ["run"]) else ""
        if argv[:1] in (["quantize"], ["transform"], ["synthesize"]):
            again = " (the same command continues)"
        print(f"lowbit: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lowbit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as e:  # --help
        return int(e.code or 0)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"lowbit {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise unknown("option" if verb.startswith("-") else "command", verb, VERBS)
    from lowbit.commands import common
    from lowbit.experiment.config import parse

    common.command_line[:] = argv
    module_name, cls, _ = VERBS[verb]
    module = importlib.import_module(f"lowbit.commands.{module_name}")
    options_class = getattr(module, cls)
    if verb == "run":  # its own options come first, the experiment's after the file
        return module.main(rest)
    options = parse(options_class, rest, f"lowbit {verb}")
    result = options_class.main(options)
    print(json.dumps(result.data, allow_nan=False) if options.json else result.text, flush=True)
    return 0


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.ljust(width)}  {line}" for verb, (_, _, line) in VERBS.items())
    return (
        f"lowbit {__version__}: quantization-aware training and extreme low-bit language models in JAX\n\n"
        f"usage: lowbit COMMAND ...\n\n{verbs}\n\n"
        "lowbit COMMAND --help lists a command's options; every command takes --json.\n"
        "MODEL is a Hugging Face folder or hub id, a llama2.c file, a run directory, or anything lowbit export writes."
    )


if __name__ == "__main__":
    sys.exit(main())
