"""What `lowbit train` does once its options are known: a job that is checked as a whole before it starts."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from lowbit.commands.common import Result, folder_of, lines, load, number, result
from lowbit.commands.inspect import kept_dtypes, read_abstract
from lowbit.errors import InputError, Stopped
from lowbit.train.config import TrainConfig

SAME_IDS = 100  # documents on which two tokenizers must agree


@dataclasses.dataclass
class Job:
    """Everything that training needs, checked: what `run` does can fail only for the machine, or for a teacher cache of
    other rows."""

    options: Any  # `lowbit.commands.train.Train`
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
    read: Any = None  # functions that read the leaves of `model`, where those are abstract

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
            o, stored = self.options.blocks, self.stored
            # A teacher of another shape teaches end to end alone; where there is no such phase it is refused.
            own = self.options.teacher is None
            same = own or self.teacher.config == self.model.config or self.recipe.before.alone
            labels = None if own or not same else self.teacher
            return self.recipe.before.run(
                self.model, self.assignment, self.block_tokens, o, folder, on_block, stored, self.read, labels
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
                revise=None if self.recipe.revise is None else partial(self.recipe.revise, self.model.config),
            )


def headers(source: str) -> tuple[Any, Any]:
    """A model whose arrays are abstract and functions that read them, if it lies in a plain folder; else the model,
    and None."""
    import jax

    from lowbit import tree as trees
    from lowbit.models import hf
    from lowbit.models.model import Model

    folder = folder_of(source)
    config, params = read_abstract(source) if folder is not None else (None, None)
    if params is None or not all(isinstance(a, jax.ShapeDtypeStruct) for _, a in trees.items(params)):
        return load(source), None
    return Model(config, params, hf.load_tokenizer(folder), str(folder), {}), hf.readers(folder)


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
    options: Any,
    plan: Any,
    recipe: Any,
    train: TrainConfig,
    documents: list[str],
    held_out: str | list[str] | None = None,
    later: Sequence[tuple[int, Any]] = (),
) -> Job:
    """Reads the models and checks everything, before the run directory exists."""
    import jax

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

    alone = recipe.before is not None and recipe.before.alone
    model, read = headers(options.model) if alone else (load(options.model), None)
    if model.tokenizer is None:
        raise InputError(f"model {options.model} has no tokenizer (allowed: a model with one)")
    if options.seq > model.config.max_position:
        raise InputError(f"--seq is {options.seq} (allowed: at most the model's context, {model.config.max_position})")
    assignment = plan.resolve(model.config.shapes())
    teacher, objective = None, None
    if options.teacher is not None:
        teacher = load(options.teacher)
    elif train.taught and not alone:
        teacher = model
    if not alone:
        like = None if teacher is None else teacher.config
        objective = language(model.config, train, like, options.teacher_cache is not None)
    known = None
    if teacher is not None and options.teacher_cache is not None:
        known = describe(teacher, model.tokenizer.hash, options.top_k(), train, options.teacher_dtype)
        check(options.teacher_cache, known)
    if teacher is not None and teacher is not model and teacher.tokenizer is not None:
        theirs, text = teacher.tokenizer, documents[:SAME_IDS]
        # Of one vocabulary in two files the hashes differ: what counts is the ids.
        if theirs.hash != model.tokenizer.hash and theirs.encode_many(text) != model.tokenizer.encode_many(text):
            raise InputError(
                f"teacher {options.teacher} has another tokenizer than {options.model} (allowed: the same)"
            )
    # Scales of static and learned activation formats start from what their inputs reach on the training text.
    leaves, found = read or calibrate.readers_of(model.params), []
    for step, formats in ((0, assignment), *((step, other.resolve(model.config.shapes())) for step, other in later)):
        caches.check(formats, model.config)
        for site, fmt in formats.items():
            if "_cache" in site and fmt.tokens > 1:
                raise InputError(
                    f"{site}: cache format {fmt.name} in training, whose blocks of {fmt.tokens} tokens would cross "
                    "documents (allowed: token formats)"
                )
        stored = rtn.ranges(model.config, leaves, model.tokenizer, formats, documents)
        jax.eval_shape(
            partial(recipe.prepare, assignment=formats, stored=stored), model.params
        )  # refuses, computes nothing
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
    extra = (windows, stored, tuple(changes), block_tokens, known, read)
    return Job(options, model, teacher, recipe, train, assignment, objective, documents, *extra)
