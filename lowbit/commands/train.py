"""`lowbit train`: quantization-aware training of a model on a text."""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
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
    load,
    number,
    result,
    with_rules,
)
from lowbit.commands.inspect import kept_dtypes, make_plan, read_abstract
from lowbit.errors import InputError, Stopped
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
    codes fixed; efficientqat: block-ap, then e2e-qp; qlora, loftq, qa-lora: only adapters, with keys for rank, alpha
    and linears (qlora:r16:a32:q+v); llm-qat, lsq, lsq+, paretoq, dorefa, pact, bitnet, bitnet-a4.8, bitnet-v2, parq,
    binary-relax: as published (docs/qat.md)."""
    stages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP:FORMAT")] = ()
    """From update STEP on another format, or STEP:FILE.toml for other rules: gradual bit widths, activations that come
    later. The optimizer's state stays."""
    teacher: Word = None
    """MODEL whose predictions are the target of kl (default: the model itself, as it was)."""
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
        from lowbit.experiment.run import Run, check_new, check_resume
        from lowbit.experiment.tracking import resolve_mode

        recipe = qat.get(self.recipe)
        train = with_recipe(self.train, recipe.defaults, command_line)
        if recipe.before is None and self.blocks != BlockOptions():
            raise InputError(f"--blocks options with recipe {self.recipe} (allowed: with block-ap and efficientqat)")
        if recipe.before is not None and recipe.before.alone:
            for flag in ("teacher", "teacher_cache", "eval_text"):
                if getattr(self, flag) is not None:
                    flag = flag.replace("_", "-")
                    raise InputError(f"--{flag} with recipe {self.recipe}, which trains nothing end to end")
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
        saved |= {"stages": [[step, dataclasses.asdict(p)] for step, p in later]}
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
            blocks = block_memory(params, assignment, config, self.blocks, self.blocks.length or self.seq)
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


@dataclasses.dataclass
class Job:
    """Everything that training needs, checked: what `run` does can fail only for the machine, or for a teacher cache of
    other rows."""

    options: Train
    model: Any
    teacher: Any
    recipe: Any
    train: TrainConfig
    assignment: Any
    objective: Any
    documents: list[str]
    held_out: Any = None  # `Windows` of --eval-text
    stored: Any = None  # arrays of static activation formats
    later: tuple[tuple[int, Any, Any], ...] = ()  # (step, assignment, stored) of the stages
    block_tokens: Any = None  # rows of tokens of the recipe's work block by block
    known: Any = None  # `Manifest` of --teacher-cache

    def held_out_loss(self, params: Any) -> float:
        """Nats per token of what would be written now, computed in float32 as lowbit eval does."""
        from lowbit.evaluate.perplexity import token_scores

        model = self.model.replace(params=as_it_came(self.recipe.convert(params), self.model.params))
        return float(token_scores(model, self.held_out)["nll"].mean(dtype="float64"))

    def restart(self, assignment: Any, stored: Any, params: Any) -> Any:
        """What is trained, in other formats from here on."""
        from lowbit.qat.latents import kept, masters

        return kept(params, self.recipe.prepare(masters(params), assignment, stored=stored))

    def fill(self, rows: Any) -> Any:
        """The teacher cache, with all that this run needs in it; the teacher itself is then let go."""
        import numpy as np

        from lowbit.experiment.progress import Progress
        from lowbit.train.teacher_cache import TeacherCache

        o, t = self.options, self.train
        cache = TeacherCache(o.teacher_cache, self.known, rows)
        epoch = min(t.steps, -(-len(rows) // t.batch_size))  # after as many steps, every row has been asked for
        needed = np.unique([rows.indices(step, t.batch_size, t.seed) for step in range(epoch)])
        missing, per_token = len(cache.missing(needed)), cache.manifest.layout.bytes_per_token
        size = f"{number(missing * o.seq * per_token)} bytes, {per_token} a token of {cache.manifest.k} known ones"
        print(f"teacher cache {o.teacher_cache}: {missing} of {len(needed)} rows to add, {size}", file=sys.stderr)
        with Progress("teacher", missing, pause=2.0) as progress:
            cache.fill(needed, self.teacher, t.batch_size, lambda done, _: progress.update(done))
        self.teacher = None
        return cache

    def run(self, run: Any) -> Result:
        from lowbit.data import rows as data_rows
        from lowbit.evaluate.size import file_bytes, sizes
        from lowbit.models.hf import save_hf
        from lowbit.train.loop import Result as Done

        o, start = self.options, time.monotonic()
        before, params, blocks = self.recipe.before, self.model.params, []
        data: dict[str, Any] = {"out": str(run.dir), "model": o.model}
        if before is not None:
            try:
                params = self.block_by_block(run, blocks)
            except Stopped as e:
                data |= {"status": "stopped", "step": 0, "blocks": blocks}
                run.summary(**data)
                return result(data, f"{lines(data | {'blocks': len(blocks)})}\n{e}")
        params = self.recipe.prepare(params, self.assignment, stored=self.stored)
        if before is not None and before.alone:
            done = Done(params, 0, "finished", f"finished {len(blocks)} blocks", [])
        else:
            rows = data_rows.prepare(self.documents, self.model.tokenizer, o.seq, run.path("data"))
            data["rows"] = len(rows)
            known = None if o.teacher_cache is None else self.fill(rows)
            done = self.end_to_end(run, rows, params, known)
        data |= {"status": done.status, "step": done.step} | ({} if before is None else {"blocks": blocks})
        if done.whole:
            data["not_split"] = list(done.whole)
        if done.best is not None:
            data |= {"best_step": done.best[0], "best_held_out_loss": done.best[1]}
        if done.status == "finished":
            trained = self.model.replace(params=as_it_came(self.recipe.convert(done.params), self.model.params))
            save_hf(trained, run.path("model"), dtype=None, packed=True)
            data |= {"saved": str(run.path("model")), "file_bytes": file_bytes(run.path("model"))}
            data |= sizes(trained.params)
        losses = [m["loss"] for m in run.metrics() if "loss" in m]
        data |= {"loss": losses[-1] if losses else None, "seconds": round(time.monotonic() - start, 3)}
        run.summary(**data)
        shown = data | ({"not_split": ", ".join(done.whole)} if done.whole else {})
        shown |= {"blocks": len(blocks) or None}
        return result(data, f"{lines(shown)}\n{done.message}")

    def block_by_block(self, run: Any, reports: list[dict[str, Any]]) -> Any:
        """The parameters after the recipe's work before training; `reports` gets one of each block."""
        from lowbit.experiment.progress import Progress

        with Progress("blocks", self.model.config.num_layers, every=1) as progress:

            def on_block(report: dict[str, Any], blocks: int) -> None:
                part = run.sub("blocks")
                if not reports:
                    part.rewind(-1)  # blocks that were done before report again
                reports.append(report)
                part.log(len(reports), **report)
                shown = {"mse": report["valid_mse"], "rounded": report["start_mse"], "s": report["seconds"]}
                progress.update(len(reports), **shown)

            folder = run.path("blocks")
            return self.recipe.before.run(
                self.model, self.assignment, self.block_tokens, self.options.blocks, folder, on_block, self.stored
            )

    def end_to_end(self, run: Any, rows: Any, params: Any, known: Any = None) -> Any:
        """Trains `params` on `rows`, of which a teacher cache may know what the teacher says."""
        from lowbit.experiment.progress import Progress
        from lowbit.train.loop import Stage, train

        def batch(step: int) -> dict[str, Any]:
            indices = rows.indices(step, self.train.batch_size, self.train.seed)
            return rows.take(indices) | ({} if known is None else known.take(indices))

        with Progress("train", self.train.steps, self.train.log_every) as progress:

            def on_metrics(record: dict[str, Any]) -> None:
                run.log(**record)
                shown = {"loss": record["loss"], "lr": record["lr"], "tokens/s": record["tokens_per_second"]}
                progress.update(record["step"], **shown)

            def on_evaluate(step: int, loss: float) -> None:
                run.log(step, held_out_loss=loss)
                print(f"train {step}/{self.train.steps}  held-out loss {loss:.4g}", file=sys.stderr)

            def on_resume(step: int) -> None:
                run.rewind(step)
                progress.resume(step)

            return train(
                params,
                batch,
                self.objective,
                self.train,
                teacher=None if self.teacher is None else self.teacher.params,
                directory=run.path("checkpoints"),
                resume=self.options.resume,
                fingerprint={"rows": dataclasses.asdict(rows.manifest)},
                on_metrics=on_metrics,
                on_resume=on_resume,
                evaluate=None if self.held_out is None else self.held_out_loss,
                on_evaluate=on_evaluate,
                stages=[Stage(step, partial(self.restart, *other)) for step, *other in self.later],
                wrap=self.recipe.wrap,
            )


def block_memory(params: Any, assignment: Any, config: Any, options: BlockOptions, length: int) -> dict[str, int]:
    """`step_memory` of the first layer of abstract parameters."""
    from lowbit import tree as trees
    from lowbit.qat.block_ap import step_memory

    first = "model.layers.0."
    layer = trees.build({p: a for p, a in trees.items(params) if p.startswith(first)})
    return step_memory(config, layer, {s: f for s, f in assignment.items() if s.startswith(first)}, options, length)


def as_it_came(params: Any, source: Any) -> Any:
    """`params` with what is not quantized in the dtype that `source` has it in: masters are float32."""
    import jax

    from lowbit import tree as trees
    from lowbit.formats.adapter import Adapter
    from lowbit.formats.fake_quant import PreparedInput

    dtypes = kept_dtypes(source)

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, PreparedInput | Adapter):
            return dataclasses.replace(leaf, w=one(path, leaf.w))
        return leaf.astype(dtypes[path]) if isinstance(leaf, jax.Array) else leaf

    return trees.map_leaves(one, params)


def prepare(
    options: Train,
    plan: Any,
    recipe: Any,
    train: TrainConfig,
    documents: list[str],
    held_out: str | list[str] | None = None,
    later: Sequence[tuple[int, Any]] = (),
) -> Job:
    """Reads the models and checks everything, before the run directory exists."""
    from lowbit import tree as trees
    from lowbit.data import rows as data_rows
    from lowbit.evaluate.perplexity import windows_of
    from lowbit.formats.base import QTensor
    from lowbit.formats.fake_quant import PreparedInput
    from lowbit.models import cache as caches
    from lowbit.ptq import calibrate, rtn
    from lowbit.ptq.calibrate import tokenize
    from lowbit.train import sharding
    from lowbit.train.objective import language
    from lowbit.train.teacher_cache import check, describe

    model = load(options.model)
    if model.tokenizer is None:
        raise InputError(f"model {options.model} has no tokenizer (allowed: a model with one)")
    if options.seq > model.config.max_position:
        raise InputError(f"--seq is {options.seq} (allowed: at most the model's context, {model.config.max_position})")
    assignment = plan.resolve(model.config.shapes())
    teacher = None
    if train.taught:
        teacher = model if options.teacher is None else load(options.teacher)
    objective = language(
        model.config, train, None if teacher is None else teacher.config, options.teacher_cache is not None
    )
    known = None
    if teacher is not None and options.teacher_cache is not None:
        known = describe(teacher, model.tokenizer.hash, options.top_k(), train, options.teacher_dtype)
        check(options.teacher_cache, known)
    if teacher is not None and teacher is not model and teacher.tokenizer is not None:
        if teacher.tokenizer.hash != model.tokenizer.hash:
            raise InputError(
                f"teacher {options.teacher} has another tokenizer than {options.model} (allowed: the same)"
            )
    # Scales of static and learned activation formats start from what their inputs reach on the training text.
    read, found = calibrate.readers_of(model.params), []
    for step, formats in ((0, assignment), *((step, other.resolve(model.config.shapes())) for step, other in later)):
        caches.check(formats, model.config)
        for site, fmt in formats.items():
            if "_cache" in site and fmt.tokens > 1:
                raise InputError(
                    f"{site}: cache format {fmt.name} in training, whose blocks of {fmt.tokens} tokens would cross "
                    "documents (allowed: token formats)"
                )
        stored = rtn.ranges(model.config, read, model.tokenizer, formats, documents)
        recipe.prepare(model.params, formats, stored=stored)
        found.append((step, formats, stored))
    (_, _, stored), *changes = found
    weights = (
        leaf.w if isinstance(leaf, PreparedInput) else leaf for p, leaf in trees.items(model.params) if p in assignment
    )
    if teacher is model and any(isinstance(w, QTensor) for w in weights):
        raise InputError(
            f"model {options.model} is packed and would be its own teacher (allowed: --teacher MODEL, or --loss ce)"
        )
    sharding.check_batch(train.batch_size, train.microbatches, sharding.make_mesh(train.mesh))
    tokens = 0
    for document in documents:
        tokens += len(data_rows.encoded([document], model.tokenizer)[0])
        if tokens > options.seq:
            break
    else:
        raise InputError(
            f"text {options.text} has {number(tokens)} tokens (needed: at least {options.seq + 1}, one row of --seq)"
        )
    windows = None if held_out is None else windows_of(model, held_out, f"gptq-{options.seq}")
    block_tokens = None
    if recipe.before is not None:
        b, most = options.blocks, model.config.max_position
        if b.length > most:
            raise InputError(f"--blocks.length is {b.length} (allowed: at most the model's context, {most})")
        block_tokens = tokenize(documents, model.tokenizer, b.rows + b.valid_rows, b.length or options.seq, b.seed)
    extra = (windows, stored, tuple(changes), block_tokens, known)
    return Job(options, model, teacher, recipe, train, assignment, objective, documents, *extra)
