"""Base models: made from scratch (mini scale) or taken from a folder, the Hub or a GGUF file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memdec.artefacts import artefact, devices, sources
from memdec.errors import ConfigError, ModelError, outside
from memdec.settings import ModelSpec
from memdec.text import tokens
from memdec.text.tokens import load_tokenizer


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    subfolder: str = "",
    dropout: float | None = None,
    **kwargs: Any,
) -> Any:
    """A causal LM from an artefact folder, a model folder or a Hub id.

    Args:
        name: Where it is.
        dtype: Weights' type.
        revision: Commit, for Hub ids.
        subfolder: Where in the folder or repository.
        dropout: Overrides every dropout rate of the configuration.
        kwargs: Passed on to `from_pretrained`.

    Raises:
        ModelError: Nothing usable there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(Path(name, subfolder) if Path(name).is_dir() else name)
    with outside(ModelError, name, "a causal LM with safetensors weights", "check the path or the network"):
        config = AutoConfig.from_pretrained(name, revision=revision, subfolder=subfolder)
        if dropout is not None:
            set_dropout(config, dropout)
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=revision,
            subfolder=subfolder,
            dtype=dtype,
            use_safetensors=True,
            **kwargs,
        )


def config(name: str | Path, revision: str | None = None) -> Any:
    """Configuration of a model folder or Hub id."""
    from transformers import AutoConfig

    check_folder(name)
    return AutoConfig.from_pretrained(name, revision=revision)


def on_meta(name: str | Path, revision: str | None = None) -> Any:
    """The modules of a model folder or Hub id without their weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(name, revision))


def n_bytes(name: str | Path, dtype: str, revision: str | None = None) -> int:
    """Bytes of the weights of a model folder or Hub id in a type (`auto`: that of its configuration); loads no weights.

    Quantised weights, whose size no configuration tells, count nothing.
    """
    model = on_meta(name, revision)
    if getattr(model.config, "quantization_config", None) is not None:
        return 0
    kind = model.config.dtype if dtype == "auto" else getattr(torch, dtype)
    return n_parameters(model) * (kind or torch.float32).itemsize


def placed(model: Any, device: torch.device, name: str) -> Any:
    """The model on a device, which must have room for it.

    Raises:
        ResourceError: It has not.
    """
    if devices.is_cuda(device):
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        instead = "use memory_dtype=bfloat16, memory_device=cpu, or device_map=auto for the base"
        devices.check_room(size, device, name, instead)
    return model.to(device)


def check_folder(name: str | Path) -> None:
    """A path that looks local must exist, whole: the Hub client's own message for it speaks of repository names."""
    path = Path(name)
    if path.is_dir() and (path / artefact.MARK).exists():
        artefact.read(path, artefact.kind_of(path) or "model")
    looks_local = path.is_absolute() or len(path.parts) > 2 or str(name).startswith(".") or path.exists()
    if looks_local and not (path / "config.json").is_file():
        raise ModelError(
            f"{name}: expected a model folder with config.json, found {'no such file in it' if path.is_dir() else 'no such folder'}; check the path"
        )


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate that a model configuration has."""
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, field, None), int | float):
            setattr(config, field, rate)


@torch.no_grad()
def check_head(model: Any, *, bias: bool = False) -> None:
    """The logits must be the output matrix times the final hidden state, which is all that is computed of them here.

    Args:
        model: A causal LM.
        bias: Whether a bias of the output layer may be there.

    Raises:
        ModelError: Something else is done to them (Gemma 2, Granite and Cohere scale or cap them; Phi has a bias).
    """
    training = model.training
    model.eval()
    probe = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    hidden = decoder(model)(input_ids=probe, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(hidden) if bias else hidden @ head_weight(model).T
    theirs = model(input_ids=probe, use_cache=False).logits
    model.train(training)
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ModelError(
            f"{model.config._name_or_path}: expected logits that are the output matrix times the last hidden state, found "
            f"others ({type(model).__name__} scales, caps or shifts them); use another model"
        )


def fuse_activations(model: nn.Module) -> None:
    """Compute GPT-2's GELU in one kernel: the same function (to rounding), 8 passes over its input less.

    Changes the modules alone; the configuration, and so what is saved, stays as it is.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def from_scratch(spec: ModelSpec, vocab_size: int, context: int, eos: int) -> Any:
    """A randomly initialised decoder of a mini architecture, with tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    if spec.width is None or spec.layers is None or spec.heads is None:
        raise ConfigError("model from scratch: expected width, layers and heads, found one missing")
    torch.manual_seed(spec.seed)
    dropout = spec.train.dropout if spec.train is not None else 0.0
    # 0.02 suits widths near 1,000; at width 64 it costs half the run: valid perplexity 151 against 70 after 1 M tokens.
    common: dict[str, Any] = {
        "initializer_range": 0.05,
        "vocab_size": vocab_size,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "use_cache": True,
    }
    if spec.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=context,
                n_embd=spec.width,
                n_layer=spec.layers,
                n_head=spec.heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                # The same function as GPT-2's gelu_new in one fused kernel: 1.2-1.4 x faster steps on CPU.
                activation_function="gelu_pytorch_tanh",
                **common,
            )
        )
    return Qwen2ForCausalLM(
        Qwen2Config(
            max_position_embeddings=context,
            hidden_size=spec.width,
            intermediate_size=4
            * spec.width
            * 2
            // 3
            // 8
            * 8,  # SwiGLU has three matrices: the same parameters as 4 x width
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=max(1, spec.heads // 2),
            attention_dropout=dropout,
            tie_word_embeddings=True,
            **common,
        )
    )


def run_pretrained(spec: ModelSpec, tokenizer_folder: Path, out: Path) -> None:
    """Stage `model` for pretrained models.

    A folder or Hub id as it is becomes a folder of links (nothing is copied). A GGUF file, and the first `layers` of
    any model, are written as float32 safetensors.
    """
    assert spec.pretrained is not None
    inputs = {"tokenizer": artefact.read(tokenizer_folder, "tokenizer").recipe}
    if isinstance(spec.pretrained, str) and sources.is_gguf(spec.pretrained) and Path(spec.pretrained).is_file():
        inputs["gguf"] = artefact.file_digest(Path(spec.pretrained))
    with artefact.building(out, "model", spec, inputs) as build:
        if build is None:
            return
        if sources.is_gguf(spec.pretrained):
            with sources.gguf(spec.pretrained) as source:
                build.facts.update(source.facts)
                _write(from_gguf(source), load_tokenizer(str(source.folder), **source.options), spec.layers, out)
        else:
            folder = snapshot(str(spec.pretrained), spec.revision)
            build.facts.update(source=spec.pretrained, revision=spec.revision)
            if spec.layers is None:
                _link(folder, out)
            else:
                _check_layers(config(folder), spec.layers, str(folder))
                _write(load(folder), load_tokenizer(str(folder)), spec.layers, out)
        ours = tokens.fingerprint(load_tokenizer(str(out)))
        tokens.check_same(tokens.fingerprint(load_tokenizer(str(tokenizer_folder))), ours, str(out))
        build.facts.update(tokenizer_sha256=ours)


def _link(folder: Path, out: Path) -> None:
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja") and file.name != artefact.MANIFEST:
            (out / file.name).unlink(missing_ok=True)  # of a build that was killed
            (out / file.name).symlink_to(file.resolve())


def _write(model: Any, words: Any, layers: int | None, out: Path) -> None:
    if layers is not None:
        keep_layers(model, layers)
    model.save_pretrained(out)
    words.save_pretrained(out)


def from_gguf(source: sources.Source) -> Any:
    """The model of a GGUF file with float32 weights, as an ordinary model of its class.

    Raises:
        ModelError: An architecture or file that transformers cannot read, or weights that are not all there.
    """
    from transformers import AutoModelForCausalLM

    name = source.facts["source"]
    what = "a GGUF file of an architecture that transformers reads"
    with outside(ModelError, name, what, "use the model's safetensors folder"):
        packed, report = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=torch.float32, output_loading_info=True, **source.options
        )
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in sorted(report[kind])]
    if wrong:
        raise ModelError(
            f"{name}: expected all weights of {type(packed).__name__} and no others, found {len(wrong)} that do not fit: "
            f"{', '.join(map(str, wrong[:3]))}; use another file"
        )
    plain = packed.config.to_dict()
    plain.pop("quantization_config", None)  # the weights are unpacked now
    plain["_name_or_path"] = name
    with torch.device("meta"):
        model = type(packed)(type(packed.config).from_dict(plain))
    model.load_state_dict(packed.state_dict(), assign=True)
    _take_buffers(model, packed)
    model.tie_weights()
    return model.eval()


def _take_buffers(model: nn.Module, packed: nn.Module) -> None:
    """Buffers that no file holds (the frequencies of RoPE)."""
    for name, value in packed.named_buffers():
        part, _, last = name.rpartition(".")
        model.get_submodule(part).register_buffer(last, value, persistent=name in packed.state_dict())


def keep_layers(model: Any, n: int) -> None:
    """Drop all decoder layers but the first n, in place; embedding, final norm and head stay.

    Raises:
        ConfigError: The model has fewer.
        ModelError: Its layers are not one list.
    """
    config = model.config
    _check_layers(config, n, config._name_or_path)
    total = config.num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(lists) != 1:
        raise ModelError(
            f"{config._name_or_path}: expected one list of {total} decoder layers, found {len(lists)} in "
            f"{type(model).__name__}; leave out 'layers'"
        )
    del lists[0][n:]
    config.num_hidden_layers = n
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:n]


def _check_layers(config: Any, n: int, name: str) -> None:
    if n > config.num_hidden_layers:
        raise ConfigError(
            f"{name}: expected layers of at most {config.num_hidden_layers}, which the model has, found {n}; lower 'layers'"
        )


def snapshot(name: str, revision: str | None) -> Path:
    """Local folder of a model folder or Hub id (safetensors, tokenizer and configuration only)."""
    check_folder(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    instead = "download it on a machine with network and give the folder"
    with outside(ModelError, name, "a model of the Hub", instead):
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def n_positions(config: Any) -> int | None:
    """Tokens that a model can see at most; None where its configuration does not say."""
    for field in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, field, None), int):
            return int(getattr(config, field))
    return None


def check_positions(limit: int | None, n: int, what: str, instead: str) -> None:
    """Models fail late or answer nonsense beyond the positions that they have.

    Args:
        limit: Positions of the model or models; None where it is not known.
        n: Tokens that are wanted.
        what: What is so long, in words.
        instead: The next step for the user.

    Raises:
        ConfigError: There are fewer.
    """
    if limit is not None and n > limit:
        raise ConfigError(f"{what}: expected at most {limit} tokens (positions of the models), found {n}; {instead}")


def n_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def decoder(model: Any) -> Any:
    """The model without its output head: ids -> final hidden states."""
    return model.base_model


def head_weight(model: Any) -> Tensor:
    """Output embedding, shape (V, D)."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def model_identity(name: str, revision: str | None = None) -> str:
    """What decides a model's outputs: a hash of the folder's weights and configuration, or Hub id and revision.

    Not the recipe of an artefact: the same recipe under changed code may give other weights.
    """
    path = Path(name)
    if not path.is_dir():
        return f"{name}@{revision or 'main'}"
    files = sorted(
        file for file in path.iterdir() if file.suffix in (".safetensors", ".json") and file.name != artefact.MANIFEST
    )
    return artefact.digest([(file.name, artefact.file_digest(file)) for file in files])
