"""`lowbit train`: quantization-aware training of a model on a text."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lowbit.commands.common import (
    Flag,
    Model,
    Result,
    Word,
    WordPath,
    check_writable,
    command_line,
    lines,
    result,
    with_rules,
)
from lowbit.commands.inspect import kept_dtypes, make_plan, read_abstract
from lowbit.commands.training import prepare
from lowbit.errors import InputError
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import OPERATIONAL, TrainConfig

DEFAULTS = TrainConfig(loss="kl", lr=3e-4, warmup=0)


@dataclasses.dataclass(frozen=True)
class Train:
    """Quantization-aware training. The result, packed, lies in OUT/model and is a MODEL for every other command.

    OUT/model has the weights of the last step; OUT/checkpoints has the latest ones and, with --eval-text, the best.

    SIGTERM or Ctrl-C saves a checkpoint and stops; the same command with --resume goes on, to the same bits.
    """

    model: Model
    """Folder, file, run directory or hub id."""
    text: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """UTF-8 text, .jsonl, or a folder of them; of what lowbit synthesize wrote, the very tokens."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Run directory."""
    format: Word = None
    """Format of the linears inside blocks (see lowbit formats); bf16 trains without quantization."""
    rules: WordPath = None
    """TOML file of [[rule]] match, format; the first match wins."""
    act: Word = None
    """Activation format of every linear inside blocks: short for a rule."""
    kv: Word = None
    """Format of the key-value cache, in training too: short for a rule."""
    k_cache: Word = None
    """Format of the keys alone."""
    v_cache: Word = None
    """Format of the values alone."""
    recipe: str = "ste"
    """ste: scales follow the weights; ste-learned: scales are trained; block-ap: block by block; e2e-qp: scales alone,
    codes fixed; efficientqat: block-ap, then e2e-qp; block-ft, e2e-ft, ft: everything but codes; e2e-pv: codes too,
    a few at a time, pv: after block-ft; qlora, loftq, qa-lora: only adapters, with keys for rank, alpha
    and linears (qlora:r16:a32:q+v); llm-qat, lsq, lsq+, paretoq, dorefa, pact, bitnet, bitnet-a4.8, bitnet-v2, parq,
    binary-relax: as published (docs/qat.md)."""
    stages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP:FORMAT")] = ()
    """From update STEP on another format, or STEP:FILE.toml for other rules: gradual bit widths, activations that come
    later. The optimizer's state stays."""
    teacher: Word = None
    """MODEL whose predictions are the target of kl, and whose blocks that of recipes that work block by block (default:
    the model itself, as it was)."""
    teacher_cache: WordPath = None
    """Folder of what the teacher says about the rows, written by the first run that names it and read by later ones,
    whatever their recipe: the teacher then takes no part in the steps."""
    teacher_top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint="")] = None
    """Tokens of each position in --teacher-cache; the others count together (default: 64)."""
    teacher_dtype: Literal["float16", "float32"] = "float16"
    """Of the log-probabilities in --teacher-cache."""
    seq: int = 256
    """Tokens of one training row."""
    field: str = "text"
    """Field of a .jsonl line that holds the text."""
    eval_text: WordPath = None
    """Held-out text: its loss is reported at each save, and the best checkpoint is kept besides the latest."""
    blocks: BlockOptions = BlockOptions()
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = DEFAULTS
    resume: Flag = False
    """Continue the run in --out."""
    dry_run: Flag = False
    """Print the layer table and the bytes of each device; write nothing."""
    tracking: Word = None
    """wandb: online, offline or disabled (default: WANDB_MODE, else disabled)."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit import qat
        from lowbit.commands.evaluate import read_text
        from lowbit.experiment.config import to_json
        from lowbit.experiment.run import Run, check_new, check_resume
        from lowbit.experiment.tracking import resolve_mode

        recipe = qat.get(self.recipe)
        train = with_recipe(self.train, recipe.defaults, command_line)
        if recipe.before is None and self.blocks != BlockOptions():
            raise InputError(
                f"--blocks options with recipe {self.recipe} (allowed: with recipes that work block by block)"
            )
        if recipe.before is not None and recipe.before.alone:
            for flag in ("teacher_cache", "eval_text"):
                if getattr(self, flag) is not None:
                    flag = flag.replace("_", "-")
                    raise InputError(f"--{flag} with recipe {self.recipe}, which trains nothing end to end")
        flags = ("revise_every", "revise_fraction", "revise_rows")
        revising = [f for f in flags if getattr(train, f) != getattr(DEFAULTS, f)]
        if recipe.revise is None and revising:
            flag = revising[0].replace("_", "-")
            raise InputError(f"--{flag} with recipe {self.recipe} (allowed: with pv, whose codes change)")
        if recipe.revise is not None:
            train.check_revisions()
        if self.stages and not recipe.restarts:
            raise InputError(f"--stages with recipe {self.recipe} (allowed: recipes that train latent weights)")
        plan = with_rules(make_plan(self.format, self.rules), self)
        later = [(step, with_rules(p, self)) for step, p in stage_plans(self.stages, train.steps)]
        resolve_mode(self.tracking)
        if self.seq < 2:
            raise InputError(f"--seq is {self.seq} (allowed: at least 2)")
        if self.teacher is not None and not train.taught:
            raise InputError("--teacher with --loss ce, which has none (allowed: kl, mixed, or a --hidden-weight)")
        if self.teacher_cache is None and (self.teacher_top_k is not None or self.teacher_dtype != "float16"):
            raise InputError("--teacher-top-k or --teacher-dtype without --teacher-cache (allowed: together with it)")
        if self.teacher_cache is not None and not train.taught:
            raise InputError("--teacher-cache with --loss ce, which has no teacher (allowed: kl, mixed)")
        if self.dry_run:
            return self.plan(plan, recipe, train, later)
        text = read_text(self.text, self.field)
        documents = [text] if isinstance(text, str) else text
        held_out = None if self.eval_text is None else read_text(self.eval_text, self.field)
        saved = self.saved(plan, train, recipe.before is not None)
        saved |= {"stages": [[step, to_json(p)] for step, p in later]}
        may_differ = tuple(f"train.{k}" for k in OPERATIONAL) + (
            ("train.steps",) if train.schedule == "constant" else ()
        )
        if self.resume:
            check_resume(self.out, saved, may_differ)
        else:
            check_new(self.out)
            check_writable(self.out)
        job = prepare(self, plan, recipe, train, documents, held_out, later)
        with Run.open(
            self.out,
            saved,
            resume=self.resume,
            experiment="lowbit train",
            argv=command_line,
            tracking=self.tracking,
            may_differ=may_differ,
        ) as run:
            return job.run(run)

    def saved(self, plan: Any, train: TrainConfig, blocks: bool) -> dict[str, Any]:
        """What config.json holds: everything that the result depends on."""
        from lowbit.experiment.config import to_json

        skip = ("out", "resume", "dry_run", "json", "tracking", "rules", "train", "teacher_cache")
        skip += () if blocks else ("blocks",)
        mine = {k: v for k, v in to_json(self).items() if k not in skip} | {"teacher_top_k": self.top_k()}
        return mine | {"rules": [dataclasses.asdict(r) for r in plan.rules], "train": to_json(train)}

    def top_k(self) -> int | None:
        """Tokens of each position that are known of the teacher; None: all, from the teacher itself."""
        return None if self.teacher_cache is None else 64 if self.teacher_top_k is None else self.teacher_top_k

    def plan(self, plan: Any, recipe: Any, train: TrainConfig, later: Sequence[tuple[int, Any]] = ()) -> Result:
        """The dry run."""
        import jax
        import jax.numpy as jnp

        from lowbit import plan as plans
        from lowbit.models import cache as caches
        from lowbit.plan import INPUT
        from lowbit.qat import adapters
        from lowbit.train import memory
        from lowbit.train.objective import language
        from lowbit.train.teacher_cache import Layout, check_k

        def zeros(like: Any) -> Any:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

        config, params = read_abstract(self.model)
        shapes = config.shapes()
        table, assignment = plan.table(shapes, kept_dtypes(params)), plan.resolve(shapes)
        for formats in (assignment, *(p.resolve(shapes) for _, p in later)):
            caches.check(formats, config)
        stored = {
            site.removesuffix(INPUT): {k: jnp.ones(s) for k, s in fmt.array_shapes(1).items()}
            for site, fmt in assignment.items()
            if getattr(fmt, "static", False)
        }
        teacher, target = None, None
        if train.taught:
            teacher, target = (config, params) if self.teacher is None else read_abstract(self.teacher)
        cached = teacher is not None and self.teacher_cache is not None
        objective = language(config, train, teacher, cached)

        def student() -> Any:
            return recipe.prepare(zeros(params), assignment, stored=stored)

        def frozen() -> Any:
            return zeros(target)

        batch: dict[str, Any] = {k: ((train.batch_size, self.seq + 1), jnp.int32) for k in ("tokens", "segments")}
        known: dict[str, Any] = {}
        if cached:
            check_k(self.top_k(), teacher.vocab_size)
            layout = Layout(teacher.vocab_size, self.top_k(), self.teacher_dtype)
            batch |= {k: ((train.batch_size, self.seq, n), d) for k, (n, d) in layout.arrays().items()}
            known = {"teacher_bytes_per_token": layout.bytes_per_token}
        live = None if teacher is None or cached else frozen
        blocks, bytes_ = None, None
        if recipe.before is not None:
            length = self.blocks.length or self.seq
            blocks = block_memory(params, assignment, config, self.blocks, length, recipe.before.start)
        if recipe.before is None or not recipe.before.alone:
            bytes_ = memory.estimate(student, batch, objective, train, live, recipe.wrap)
        nbytes, bits, quantized = plans.total(table)
        factors = adapters.parameters(jax.eval_shape(student))
        if recipe.convert is adapters.convert:  # they stay beside the weights, in float32
            nbytes, bits = nbytes + 4 * factors, bits + 32 * factors / config.num_params
            quantized += 32 * factors / sum(math.prod(r.shape) for r in table if r.site in assignment)
        data = {
            "dry_run": True,
            "model": self.model,
            "devices": jax.device_count(),
            "params": config.num_params,
            "adapter_params": factors,
            "tokens_per_step": train.batch_size * self.seq,
            "tokens": train.batch_size * self.seq * train.steps,
            "per_device": bytes_ and dataclasses.asdict(bytes_),
            **known,
            "block": blocks,
            "bytes": nbytes,
            "bits_per_weight": bits,
            "bits_per_weight_quantized": quantized or None,
            "tensors": table,
        }
        shown = {k: v for k, v in data.items() if k not in ("tensors", "per_device", "block", "dry_run")}
        shown |= {f"one block: {k}": v for k, v in (blocks or {}).items()}
        shown |= {f"per device: {k}": v for k, v in (data["per_device"] or {}).items() if k != "whole"}
        if bytes_ is not None and bytes_.whole:
            shown["not split by the mesh"] = ", ".join(bytes_.whole)
        return result(data, f"{plans.render(table)}\n\n{lines(shown)}")


def stage_plans(stages: Sequence[str], steps: int) -> list[tuple[int, Any]]:
    """`(step, plan)` of every STEP:FORMAT. Raises `InputError`."""
    out = []
    for text in stages:
        step, _, what = text.partition(":")
        if not step.isdigit() or not what:
            raise InputError(f"--stages {text!r} (allowed: STEP:FORMAT or STEP:FILE.toml, such as 600:int2:g64)")
        if not 0 < int(step) < steps or (out and int(step) <= out[-1][0]):
            raise InputError(f"--stages {text!r} (allowed: rising steps, from 1 to {steps - 1})")
        rules = Path(what) if what.endswith(".toml") else None
        out.append((int(step), make_plan(None if rules else what, rules)))
    return out


def with_recipe(train: TrainConfig, defaults: dict[str, Any], words: Sequence[str] = ()) -> TrainConfig:
    """The recipe's recommended settings, where the user has not chosen others; `words` are those of the command."""
    given = {w.split("=")[0].removeprefix("--").replace("-", "_") for w in words if w.startswith("--")}
    own = {k: v for k, v in defaults.items() if k not in given and getattr(train, k) == getattr(DEFAULTS, k)}
    return dataclasses.replace(train, **own)


def block_memory(
    params: Any, assignment: Any, config: Any, options: BlockOptions, length: int, start: Any
) -> dict[str, int]:
    """`step_memory` of the first layer of abstract parameters."""
    from lowbit import tree as trees
    from lowbit.qat.block_ap import step_memory

    first = "model.layers.0."
    layer = trees.build({p: a for p, a in trees.items(params) if p.startswith(first)})
    own = {s: f for s, f in assignment.items() if s.startswith(first)}
    return step_memory(config, layer, own, options, length, start)
