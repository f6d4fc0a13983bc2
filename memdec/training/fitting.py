"""The training loop of every model: windows of a token stream, a fused loss inside the model, transformers' Trainer.

The loss is the sum over all scored tokens of an update, divided by their number over all processes. So every token has
the same weight, whatever the gradient accumulation, the size of the last batch and the number of processes. The
released code averages the means of micro-batches instead. The order of the windows depends on seed and epoch only.
"""

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from memdec.artefacts import devices
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.maths import objectives, statistics, weighing
from memdec.maths.losses import IGNORED, fused_loss, token_log_probs
from memdec.models import flops, loading
from memdec.settings import AUTO, Compute, MemorySettings, TrainSettings
from memdec.text import tokens
from memdec.training import checkpoints
from memdec.training.batches import Collate, Order, WindowData

_CHECKPOINTS = 20  # number of checkpoints written during a training run, beside those of its evaluations


class DivergedError(NumericsError):
    """The loss of a training is not finite; with its updates and their FLOPs, where one that failed counts as a whole one."""

    def __init__(self, why: NumericsError, updates: int, flops: float) -> None:
        super().__init__(why)
        self.updates, self.flops = updates, flops


class LossModel(nn.Module):
    """A causal LM whose forward pass returns the training loss.

    The loss is inside the module because DDP and FSDP synchronise gradients in the forward pass that they wrap.
    """

    def __init__(self, lm: Any, objective: objectives.Objective) -> None:
        super().__init__()
        self.lm, self.objective = lm, objective
        self._no_split_modules = getattr(lm, "_no_split_modules", None)  # FSDP wraps these

    def tie_weights(self) -> None:
        """Tie embedding and head again: accelerate calls this when FSDP has moved each weight by itself."""
        _causal(self.lm).tie_weights()

    def hidden(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states (B T, D), and the head's weight (V, D) in the same type."""
        causal = _causal(self.lm)
        hidden: Tensor = loading.decoder(causal)(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1), loading.head_weight(causal).to(hidden.dtype)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        spans: Tensor,
        target_indptr: Tensor | None = None,
        target_tokens: Tensor | None = None,
        target_probs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        score: bool = False,
    ) -> dict[str, Tensor]:
        """Loss of windows (B, T) in nats, divided by `num_items_in_batch`; targets are CSR rows of all B T positions.

        With `score` it returns log p of the scored positions in order instead, float32 (n,). This is also part of
        forward, because FSDP gathers the weights there.
        """
        hidden, head = self.hidden(input_ids)
        if score:
            scored = labels.flatten() != IGNORED
            return {"log_p": token_log_probs(hidden[scored], head, labels.flatten()[scored])}
        rows = (target_indptr, target_tokens, target_probs)
        if any(each is None for each in rows):
            rows = (labels.new_zeros(labels.numel() + 1), labels.new_empty(0), hidden.new_empty(0))
        sums = fused_loss(hidden, head, labels.flatten(), *rows, self.objective)  # type: ignore[arg-type]
        n = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
        return {"loss": sums.loss / n}


@dataclass(frozen=True)
class Task:
    """The data of one training run: tokenizer, token stream, targets, bases and limits."""

    words: Any  # the tokenizer
    stream: Path
    context: int
    seed: int
    targets: TargetReader | None = None
    bases: Mapping[str, Path] = field(default_factory=dict)  # mixed with the model at every evaluation
    ceiling: float | None = None  # FLOP limit
    compute: Compute = AUTO


class LossTrainer(Trainer):
    """Trainer for `LossModel`: windows in a fixed order, token-exact evaluation, checkpoints of trained weights only.

    Args:
        where: File to which the positions in error messages refer.
        base_scores: log p of every valid position under each base model, for the sweep over alphas.
        alphas: Weights of the trained model in that sweep.
        kwargs: Passed on to `Trainer`.
    """

    data_collator: Any

    def __init__(
        self,
        *,
        where: str = "",
        base_scores: Mapping[str, NDArray[np.float64]] | None = None,
        alphas: Sequence[float] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # forward() divides by num_items_in_batch itself
        self.where, self.base_scores, self.alphas = where, base_scores or {}, alphas
        _keep_float32(self.accelerator)

    def _order(self, data: Any, batch_size: int, seed: int | None) -> Order:
        return Order(len(data), batch_size * self.args.world_size, seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        order = self._order(train_dataset or self.train_dataset, self.args.per_device_train_batch_size, self.args.seed)
        # After resuming, accelerate wraps the sampler to skip batches, and its set_epoch does not reach the sampler.
        self.add_callback(_Epochs(order))
        return order

    def _get_eval_sampler(self, eval_dataset: Any) -> Order:
        return self._order(eval_dataset, self.args.per_device_eval_batch_size, None)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as Trainer does, and check it; all processes raise the same error, so that none waits.

        Raises:
            NumericsError: The loss of a process is not finite; the message names the step and the positions.
        """
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        bad = ~torch.isfinite(loss.detach())
        if not self.accelerator.reduce(bad.float(), "sum"):
            return loss
        places = ", ".join(f"{first}-{end - 1}" for first, end in inputs["spans"].tolist() if end > first)
        found = [f"the loss is {loss.item()} on token positions {places} of {self.where}"] if bad else []
        raise NumericsError(
            f"step {self.state.global_step + 1}: {gather_object(found)[0]}; look at that text, lower learning_rate, or use "
            "precision float32"
        )

    @torch.no_grad()
    def scores(self) -> NDArray[np.float64]:
        """log p of every position of the valid split, shape (n,); all processes return the whole array."""
        model: Any = self.model_wrapped
        model.eval()
        data: Any = self.eval_dataset
        found = torch.zeros(len(data.stream), dtype=torch.float64)
        collate, self.data_collator = self.data_collator, Collate(None)  # the targets belong to the train split
        loader = self.get_eval_dataloader()
        self.data_collator = collate
        for batch in loader:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                log_p = model(**batch, score=True)["log_p"].double().cpu()
            places = [np.arange(first, end) for first, end in batch["spans"].tolist()]
            found[torch.from_numpy(np.concatenate(places))] = log_p
        if self.args.world_size > 1:
            found = self.accelerator.reduce(found.to(self.args.device), "sum").cpu()
        return found.numpy()

    def measure(self) -> dict[str, float]:
        """Perplexity on the valid split, of the model alone and mixed with each base at the best alpha of that base.

        `score` decides which evaluation is best. It is the mean log-perplexity of the mixtures, or without bases that
        of the model alone.
        """
        log_p = self.scores()
        found = {"loss": -float(log_p.mean()), "perplexity": statistics.perplexity(log_p)}
        mixed = []
        for name, base in self.base_scores.items():
            sweep = weighing.perplexities(base, log_p, self.alphas)
            best = weighing.best_weight(sweep)
            found |= {f"alpha_{name}": best, f"mixed_{name}": sweep[best]}
            mixed.append(math.log(sweep[best]))
        return found | {"score": sum(mixed) / len(mixed) if mixed else found["loss"]}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run `measure` and report the result to the Trainer."""
        result = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.log(result)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        from safetensors.torch import save_file

        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        named = dict(self.model.named_parameters())  # tied parameters appear once
        source = named if state_dict is None else {name: state_dict[name] for name in named if name in state_dict}
        weights = {name: p.detach().contiguous() for name, p in source.items() if named[name].requires_grad}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does, then seal the checkpoint and remove old ones."""
        work = Path(str(self.args.output_dir))
        folder = checkpoints.folder(work, self.state.global_step)
        if self.args.should_save:
            checkpoints.unseal(folder)
        super()._save_checkpoint(model, trial)
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()  # also waits for the files of all processes
        if not self.args.should_save:
            return
        facts = {
            "best": self.state.best_global_step,
            "ended": self.control.should_training_stop,
            "losses": losses,
            "total_loss": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
        }
        checkpoints.seal(folder, facts)
        checkpoints.rotate(work, self.args.load_best_model_at_end)

    def resume(self, folder: Path) -> None:
        """Continue the sum of the losses and the best evaluation of a checkpoint; transformers starts them anew.

        Called when transformers has loaded the checkpoint. A training that had ended is not continued.
        """
        facts = checkpoints.facts(folder)
        if facts is None:
            raise ArtifactError(f"{folder}: expected a whole checkpoint, found a damaged one; run the command again")
        self._tr_loss = torch.tensor(facts["losses"][self.args.process_index], device=self.args.device)
        self._total_loss_scalar = facts["total_loss"]
        self._globalstep_last_logged = facts["logged"]
        self._initial_global_step = 0  # the loss is the mean over all steps, not only those after the checkpoint
        if facts["best"] is not None:  # the path in the checkpoint is wrong where the folder was moved
            self.state.best_model_checkpoint = str(checkpoints.folder(folder.parent, facts["best"]))
        self.control.should_training_stop = facts["ended"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # transformers would make one more update
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._tr_loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean()  # of all processes, as in the log
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if checkpoints.facts(folder) is None:
            raise ArtifactError(
                f"{folder}: expected the best weights as they were written, found a damaged checkpoint; run the command "
                "again, which goes on from an earlier one"
            )
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.unexpected_keys:
            raise ArtifactError(
                f"checkpoint: expected weights of this model, found others ({load_result.unexpected_keys[:3]}); delete the work "
                "folder"
            )


def _keep_float32(accelerator: Any) -> None:
    """Let FSDP compute in the low precision, and nothing else.

    accelerate's own policy also rounds targets, counts, losses, log-probabilities and the sums of gradients.

    Raises:
        ConfigError: It is the first version of FSDP.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"launch: expected fsdp_version 2, found {plugin.fsdp_version}; start from config/accelerate/fsdp.yaml"
        )
    if plugin.mixed_precision_policy is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


class _Epochs(TrainerCallback):
    def __init__(self, order: Order) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.epoch = int(state.epoch or 0)


class _Beta(TrainerCallback):
    """Change the weight of the KL linearly from the first update to the last."""

    def __init__(self, model: LossModel, start: float, end: float) -> None:
        self.model, self.start, self.end = model, start, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step / max(1, state.max_steps - 1)
        self.model.objective = objectives.Hybrid(self.start + (self.end - self.start) * min(done, 1.0))


class _SaveEvaluated(TrainerCallback):
    """Save at every evaluation, as the best of them is loaded at the end."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or control.should_evaluate


class _Resume(TrainerCallback):
    def __init__(self, trainer: LossTrainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.resume(self.folder)


class _Patience(TrainerCallback):
    """Stop training after `patience` evaluations without improvement.

    transformers' own callback counts in memory, so its count restarts when a run is resumed. This callback reads the
    log, which every checkpoint contains.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scores = [entry["eval_score"] for entry in state.log_history if "eval_score" in entry]
        if len(scores) - 1 - int(np.argmin(scores)) >= self.patience:
            control.should_training_stop = True


def fit(
    model: Any, settings: TrainSettings, task: Task, work: Path, scored: Path | None = None, share: float = 1.0
) -> tuple[dict[str, Any], LossTrainer]:
    """Train a model in place, resuming from the last checkpoint in `work`.

    `scored` is the folder of the bases' scores, if it is not `work`. `share` is the part of a whole training that this one
    is: it has as large a part of the checkpoints.

    Returns:
        Facts about the run for the manifest, and the trainer, whose weights may be sharded over processes.

    Raises:
        DivergedError: The loss is not finite, in all processes at once.
    """
    if not gc.get_freeze_count():
        gc.freeze()  # the Trainer searches for cycles at every training: not among what imports made, 0.24 s each
    prefix = tokens.prefix_id(task.words)
    train, valid = (WindowData(tokens.load_stream(task.stream, s), task.context, prefix) for s in ("train", "valid"))
    memory = settings if isinstance(settings, MemorySettings) else MemorySettings(objective="ce")
    arguments = _arguments(settings, work, task.seed, task.compute)
    rounds = _rounds(settings, len(train), arguments.world_size)
    cost = flops.flops_per_token(model, task.context) * len(train.stream) / rounds  # mean FLOPs of an update
    steps = math.ceil(settings.epochs * rounds * (1 - 1e-9))  # tolerates rounding: 0.1 * 12 is 1.2000000000000002
    if task.ceiling is not None:
        if task.ceiling < cost * (1 - 1e-9):
            raise ConfigError(
                f"budget: expected at least {cost:.3g} floating point operations, which is one update, found "
                f"{task.ceiling:.3g}; raise budget.epochs"
            )
        steps = min(steps, int(task.ceiling / cost * (1 + 1e-9)))
    _plan(arguments, settings, steps, rounds, share)
    start = _last_checkpoint(work, settings.keep_best, arguments)
    loading.check_head(_causal(model))
    loading.fuse_activations(model)
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    trainer = LossTrainer(
        model=LossModel(model, _objective(memory)),
        args=arguments,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=Collate(task.targets),
        where=str(task.stream / "train.npy"),
        base_scores=_base_scores(task, valid, arguments, scored or work),
        alphas=memory.alphas,
        callbacks=[_SaveEvaluated(), *([_Patience(settings.patience)] if settings.patience is not None else [])],
    )
    if memory.objective == "hybrid" and memory.kl_weight_end is not None:
        trainer.add_callback(_Beta(trainer.model, memory.kl_weight, memory.kl_weight_end))
    for callback in trainer.callback_handler.callbacks:
        # TensorBoard's default is the work folder, which is deleted at the end.
        if getattr(callback, "logging_dir", "") is None:
            callback.logging_dir = str(work.parent.parent / "runs" / work.parent.name)
    if start is not None:
        trainer.add_callback(_Resume(trainer, Path(start)))
    n_parameters = loading.n_parameters(model)
    try:
        result = trainer.train(resume_from_checkpoint=start)
        done = trainer.state.global_step
        evaluations = [
            {key.removeprefix("eval_"): value for key, value in entry.items()}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ]
        final = _final(trainer, evaluations, trainer.state.best_global_step if settings.keep_best else done)
    except NumericsError as error:
        made = min(trainer.state.global_step + 1, steps)
        raise DivergedError(error, made, cost * made) from None
    if (found := loading.n_parameters(model)) != n_parameters:
        raise ConfigError(
            f"{work}: expected {n_parameters} parameters after the training as before it, found {found}; use another 'launch'"
        )
    evaluations.append(final)
    losses = [{"loss": entry["loss"], "step": entry["step"]} for entry in trainer.state.log_history if "loss" in entry]
    facts: dict[str, Any] = {
        "train_loss": result.training_loss,
        "valid_perplexity": final["perplexity"],
        "updates": done,
        "planned_updates": steps,
        "epochs": done / rounds,
        "trained_tokens": round(len(train.stream) * done / rounds),
        "flops": cost * done,
        "flops_ceiling": task.ceiling,
        "losses": losses,  # each is the mean since the one before
        "evaluations": [dict(sorted(entry.items())) for entry in evaluations],  # the log in a checkpoint is sorted
    }
    return facts, trainer


def _final(trainer: LossTrainer, evaluations: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """The evaluation of the weights that a training ends with, those of `step`; measured only if it was not before."""
    known = [entry for entry in evaluations if entry["step"] == step]
    if not known:
        return {**trainer.measure(), "step": step}
    return {name: value for name, value in known[-1].items() if name != "epoch"}


def _checkpoint_activations(model: Any) -> None:
    """Switch on gradient checkpointing, whose method has a new name in recent versions of transformers."""
    causal, plain = _causal(model), {"use_reentrant": False}
    if hasattr(causal, "activation_checkpointing_enable"):
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs=plain)
    else:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=plain)


def _causal(model: Any) -> Any:
    """The causal LM inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_reporting(names: Sequence[str]) -> None:
    """Check that the trackers in `report_to` are known to transformers and installed.

    Raises:
        ConfigError: A tracker is unknown or not installed.
    """
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    missing = [name for name in names if name not in there]
    if missing:
        raise ConfigError(
            f"report_to: expected installed trackers ({', '.join(there) or 'nothing'}), found {', '.join(missing)}; "
            "install it, e.g. `pip install tensorboard`"
        )


def _last_checkpoint(work: Path, keep_best: bool, arguments: TrainingArguments) -> str | None:
    """The newest whole checkpoint; process 0 looks for it and removes the others."""
    found = checkpoints.newest(work, keep_best) if arguments.process_index == 0 else None
    start: str | None = broadcast_object_list([found and str(found)])[0]
    return start


def _objective(settings: MemorySettings) -> objectives.Objective:
    return objectives.by_name(
        settings.objective,
        kl_weight=settings.kl_weight,
        focal_weight=settings.focal_weight,
        focal_gamma=settings.focal_gamma,
        bild_top=settings.bild_top,
        sparsity_weight=settings.sparsity_weight,
    )


def _rounds(settings: TrainSettings, n_windows: int, n_processes: int) -> int:
    """Number of updates in an epoch."""
    batches = math.ceil(n_windows / (settings.batch_size * n_processes))
    return math.ceil(batches / settings.accumulation)


def _arguments(settings: TrainSettings, work: Path, seed: int, compute: Compute) -> TrainingArguments:
    on_cpu, precision = devices.pick(compute).type == "cpu", devices.precision(compute)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size * 2,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        metric_for_best_model="eval_score",
        greater_is_better=False,
        logging_nan_inf_filter=False,
        seed=seed,
        report_to=settings.report_to or "none",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    _ = arguments.device  # sets the number of GPUs
    arguments._n_gpu = min(arguments._n_gpu, 1)  # several GPUs need a launcher; DataParallel cannot split sparse rows
    return arguments


def _plan(arguments: TrainingArguments, settings: TrainSettings, steps: int, rounds: int, share: float = 1.0) -> None:
    """Set the number of updates, and the intervals of evaluation and saving."""
    arguments.max_steps = steps
    arguments.warmup_steps = int(settings.warmup * steps)
    arguments.logging_steps = max(1, steps // 20)
    arguments.set_save("steps", steps=max(1, int(steps / (share * _CHECKPOINTS))))
    if settings.keep_best or settings.evaluate_every is not None:
        every = max(1, round((settings.evaluate_every or 1) * rounds))
        arguments.set_evaluate("steps", steps=every, delay=0, batch_size=settings.batch_size * 2)
    arguments.load_best_model_at_end = settings.keep_best


def _base_scores(
    task: Task, valid: WindowData, arguments: TrainingArguments, work: Path
) -> dict[str, NDArray[np.float64]]:
    """log p of the valid split under each base; read from `work` if an earlier run saved it there."""
    scores = {}
    for name, folder in task.bases.items():
        path = work / f"base-{name}"
        whole = checkpoints.facts(path) is not None
        there = broadcast_object_list([whole])[0]  # process 0 decides: others may see the files later
        if there:
            scores[name] = np.load(path / "scores.npy", allow_pickle=False)
            continue
        model = loading.load(folder)
        loading.check_head(model)
        base = LossModel(model, objectives.Hybrid(0.0)).to(arguments.device)
        scorer = LossTrainer(
            model=base, args=arguments, eval_dataset=valid, train_dataset=valid, data_collator=Collate(None)
        )
        scores[name] = scorer.scores()
        if arguments.process_index == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            np.save(path / "scores.npy", scores[name])
            checkpoints.seal(path, {})
        del model, base, scorer  # before the next one is loaded
        if arguments.device.type == "cuda":
            torch.cuda.empty_cache()
    return scores
