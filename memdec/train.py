"""Training: base models from scratch, domain fine-tuning, LoRA, and the memory decoder, all through one Trainer.

Every model is trained by the fused hybrid loss (`memdec.losses`): cross-entropy is the case kl_weight = 0. The loss is
a sum over scored tokens divided by their number in the whole update, so neither gradient accumulation nor a ragged
last batch weighs tokens differently (the released code averages means).

Inputs: a token stream, a starting model, and for the memory the target shards. Output: a model folder that
`from_pretrained` and lm-eval load, with its tokenizer; or a peft adapter folder.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from memdec import artifacts, keypoints, models, tokens
from memdec.config import LoraSettings, MemorySettings, ModelSpec, TrainSettings
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.losses import hybrid_loss
from memdec.targets import TargetReader
from memdec.windows import Window, windows

IGNORED = -100


# --- stages -------------------------------------------------------------------------------------------------------


def run_pretrain(spec: ModelSpec, tokenizer: Path, stream: Path, out: Path, *, context: int) -> None:
    """Stage `pretrain`: a base model from scratch (mini scale), next-token loss on a general corpus."""
    if spec.train is None:
        raise ConfigError(
            f"{out}: expected a model with 'architecture' and 'train', found a pretrained one; use `memdec model`"
        )
    manifest = artifacts.read(stream, "tokens")
    settings = {**spec.model_dump(mode="json"), "context": context}
    inputs = {"tokenizer": artifacts.read(tokenizer, "tokenizer").recipe, "tokens": manifest.recipe}
    with artifacts.building(out, "model", settings, inputs) as build:
        if build is None:
            return
        words = tokens.load_tokenizer(str(tokenizer))
        model = models.from_scratch(spec, len(words), context, words.eos_token_id)
        facts = _fit(model, words, spec.train, stream, build.work, context=context, seed=spec.seed)
        _save(model, words, out, build, facts, stream, manifest)


def run_finetune(
    model_folder: Path, stream: Path, out: Path, settings: TrainSettings, *, context: int, seed: int
) -> None:
    """Stage `finetune`: all weights on the domain (the paper's DAPT; also the model that gives the keys)."""
    manifest, words = _checked(model_folder, stream)
    with artifacts.building(out, "model", _plain(settings, context, seed), _inputs(model_folder, stream)) as build:
        if build is None:
            return
        model = models.load(model_folder, dropout=settings.dropout)
        facts = _fit(model, words, settings, stream, build.work, context=context, seed=seed)
        _save(model, words, out, build, facts, stream, manifest)


def run_lora(model_folder: Path, stream: Path, out: Path, settings: LoraSettings, *, context: int, seed: int) -> None:
    """Stage `lora`: a peft adapter on the query, key, value and MLP projections."""
    from peft import LoraConfig, get_peft_model

    manifest, words = _checked(model_folder, stream)
    with artifacts.building(out, "lora", _plain(settings, context, seed), _inputs(model_folder, stream)) as build:
        if build is None:
            return
        torch.manual_seed(seed)
        base = models.load(model_folder, dropout=settings.dropout)
        adapter = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.scale * settings.rank,
            lora_dropout=settings.adapter_dropout,
            target_modules=_projections(base),
            fan_in_fan_out=base.config.model_type == "gpt2",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, adapter)
        facts = _fit(model, words, settings, stream, build.work, context=context, seed=seed)
        model.save_pretrained(out)
        facts["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        build.facts.update(facts, **_lineage(out, stream, manifest))


def run_train(
    model_folder: Path,
    stream: Path,
    targets: Sequence[Path],
    out: Path,
    settings: MemorySettings,
    *,
    context: int,
    seed: int,
) -> None:
    """Stage `train`: the memory decoder, on beta * KL(p_kNN || p_mem) + (1 - beta) * CE.

    Raises:
        ArtifactError: The targets were made for other tokens, or do not cover the stream; seen before the model loads.
    """
    manifest, words = _checked(model_folder, stream)
    reader = TargetReader(targets, expected_tokens=manifest.facts["sha256"]["train"])
    inputs = _inputs(model_folder, stream) | {f"targets {i}": recipe for i, recipe in enumerate(reader.recipes)}
    with artifacts.building(out, "memory", _plain(settings, context, seed), inputs) as build:
        if build is None:
            return
        model = models.load(model_folder, dropout=settings.dropout)
        facts = _fit(model, words, settings, stream, build.work, context=context, seed=seed, targets=reader)
        _save(model, words, out, build, facts, stream, manifest)


# --- shared by the stages -----------------------------------------------------------------------------------------


def _plain(settings: TrainSettings, context: int, seed: int) -> dict[str, Any]:
    return {**settings.model_dump(mode="json"), "context": context, "seed": seed}


def _inputs(model_folder: Path, stream: Path) -> dict[str, str]:
    return {"model": artifacts.read(model_folder, "model").recipe, "tokens": artifacts.read(stream, "tokens").recipe}


def _checked(model_folder: Path, stream: Path) -> tuple[artifacts.Manifest, Any]:
    """Manifest of the stream and the model's tokenizer, which must be the one that made the stream."""
    manifest = artifacts.read(stream, "tokens")
    artifacts.read(model_folder, "model")
    words = tokens.load_tokenizer(str(model_folder))
    tokens.check_same(manifest.facts["tokenizer_sha256"], tokens.fingerprint(words), f"{model_folder} with {stream}")
    return manifest, words


def _lineage(out: Path, stream: Path, manifest: artifacts.Manifest) -> dict[str, Any]:
    """Which text and tokenizer this was trained on; the corpus as a path relative to the artefact."""
    corpus = (stream / manifest.facts["corpus"]).resolve()
    return {
        "corpus": os.path.relpath(corpus, out.resolve()),
        "corpus_sha256": manifest.facts["corpus_sha256"],
        "tokenizer_sha256": manifest.facts["tokenizer_sha256"],
    }


def _save(
    model: Any,
    words: Any,
    out: Path,
    build: artifacts.Build,
    facts: dict[str, Any],
    stream: Path,
    manifest: artifacts.Manifest,
) -> None:
    model.save_pretrained(out)
    words.save_pretrained(out)
    build.facts.update(facts, parameters=models.n_parameters(model), **_lineage(out, stream, manifest))


def _projections(model: Any) -> list[str]:
    """Names of the query, key, value and MLP projections present in a model (paper, section 4.1)."""
    known = {"c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
    part = keypoints.last_mlp(model)
    mlp = {name for name, _ in part.named_children()} or {"fc1", "fc2"}  # a bare matrix: no module of its own
    found = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    mlp &= {
        "c_fc",
        "c_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "fc1",
        "fc2",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    return sorted(
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in (known & found)
        or (
            name.rsplit(".", 1)[-1] in mlp
            and ".attn." not in name
            and ".self_attn." not in name
            and hasattr(module, "weight")
        )
    )


class WindowData(Dataset[dict[str, Any]]):
    """Windows of a token stream as (first position, input ids, labels); unscored positions are labelled -100."""

    def __init__(self, stream: NDArray[np.integer], parts: list[Window], prefix: int) -> None:
        self.stream, self.parts, self.prefix = stream, parts, prefix

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = self.parts[index]
        labels = np.asarray(self.stream[part.begin : part.end], dtype=np.int64)
        labels[: part.first - part.begin] = IGNORED
        return {"first": part.first, "end": part.end, "inputs": part.inputs(self.stream, self.prefix), "labels": labels}


class Collate:
    """Right-pads windows and, when there are targets, joins the CSR rows of their scored positions."""

    def __init__(self, targets: TargetReader | None) -> None:
        self.targets = targets

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(item["inputs"]) for item in items)
        ids = np.zeros((len(items), width), dtype=np.int64)
        labels = np.full((len(items), width), IGNORED, dtype=np.int64)
        for row, item in enumerate(items):
            ids[row, : len(item["inputs"])] = item["inputs"]
            labels[row, : len(item["labels"])] = item["labels"]
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        batch["spans"] = torch.tensor([[item["first"], item["end"]] for item in items])
        if self.targets is not None:
            rows = self.targets.rows([(item["first"], item["end"]) for item in items])
            batch["target_indptr"] = torch.from_numpy(rows.indptr)
            batch["target_tokens"] = torch.from_numpy(rows.tokens.astype(np.int64))
            batch["target_probs"] = torch.from_numpy(np.asarray(rows.probs, dtype=np.float32))
        return batch


class LossModel(nn.Module):
    """A causal LM whose forward pass is the training loss; the head touches scored positions only."""

    def __init__(self, lm: Any, kl_weight: float) -> None:
        super().__init__()
        self.lm = lm
        self.kl_weight = kl_weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        spans: Tensor,
        target_indptr: Tensor | None = None,
        target_tokens: Tensor | None = None,
        target_probs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss per scored token (nats) of windows (B, T); the targets are CSR rows of the scored positions in order."""
        causal = self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm
        hidden = models.decoder(causal)(input_ids=input_ids, use_cache=False).last_hidden_state
        scored = labels != IGNORED
        hidden, y = hidden[scored], labels[scored]
        head = models.head_weight(causal).to(hidden.dtype)
        if target_indptr is None or target_tokens is None or target_probs is None:
            none = torch.empty(0, device=hidden.device)
            loss, _, _ = hybrid_loss(hidden, head, y, none, none, none, 0.0)
        else:
            loss, _, _ = hybrid_loss(hidden, head, y, target_indptr, target_tokens, target_probs, self.kl_weight)
        if not torch.isfinite(loss):
            places = ", ".join(f"{a}-{b}" for a, b in spans.tolist())
            raise NumericsError(
                f"the loss is {loss.item()} on token positions {places}; lower learning_rate, or use float32"
            )
        return {"loss": loss / (num_items_in_batch if num_items_in_batch is not None else len(y))}


class LossTrainer(Trainer):
    """Trainer for `LossModel`: token-exact evaluation, checkpoints with trainable weights only."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # forward() divides by num_items_in_batch itself

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross-entropy per token of the valid split: a sum over all tokens, not a mean of batch means."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.get_eval_dataloader(eval_dataset):
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                loss = model(**batch, num_items_in_batch=1)["loss"]
            total += torch.tensor([float(loss), float((batch["labels"] != IGNORED).sum())], dtype=torch.float64)
        total = self.accelerator.reduce(total.to(self.args.device), "sum")
        value = float(total[0] / total[1])
        metrics = {f"{metric_key_prefix}_loss": value, f"{metric_key_prefix}_perplexity": math.exp(min(value, 80))}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.unexpected_keys:
            raise ArtifactError(
                f"checkpoint: unexpected weights {load_result.unexpected_keys[:3]}; delete the work folder"
            )


def _fit(
    model: Any,
    words: Any,
    settings: TrainSettings,
    stream: Path,
    work: Path,
    *,
    context: int,
    seed: int,
    targets: TargetReader | None = None,
) -> dict[str, Any]:
    """Train in place, resuming from the last checkpoint in `work`; returns what happened."""
    prefix = tokens.prefix_id(words)
    train = tokens.load_stream(stream, "train")
    valid = tokens.load_stream(stream, "valid")
    data = WindowData(train, windows(len(train), context, context), prefix)
    valid_data = WindowData(valid, windows(len(valid), context, context), prefix)
    steps = settings.epochs * math.ceil(len(data) / (settings.batch_size * settings.accumulation))
    every = (
        {"save_strategy": "epoch"}
        if settings.keep_best
        else {"save_strategy": "steps", "save_steps": max(1, int(steps / 5))}
    )
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size * 2,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        eval_strategy="epoch" if settings.keep_best else "no",
        load_best_model_at_end=settings.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=1,
        logging_steps=max(1, int(steps / 20)),
        logging_nan_inf_filter=False,
        seed=seed,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        **every,
    )
    kl_weight = settings.kl_weight if isinstance(settings, MemorySettings) else 0.0
    trainer = LossTrainer(
        model=LossModel(model, kl_weight),
        args=arguments,
        train_dataset=data,
        eval_dataset=valid_data,
        data_collator=Collate(targets if kl_weight else None),
    )
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    # The final score is plain cross-entropy on valid, whatever was trained.
    trainer.data_collator = Collate(None)
    final = trainer.evaluate()
    return {
        "train_loss": result.training_loss,
        "valid_perplexity": final["eval_perplexity"],
        "epochs": settings.epochs,
        "updates": trainer.state.global_step,
        "trained_tokens": len(train) * settings.epochs,
    }
