"""Stage `model`, and loading of models: from scratch (mini scale), a folder, the Hub or a GGUF file."""

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
    """Load a causal LM from an artefact folder, a model folder or a Hub id.

    Args:
        name: Folder or Hub id.
        dtype: Type of the weights.
        revision: Commit of a Hub id.
        subfolder: Subfolder of the folder or repository.
        dropout: Replaces every dropout rate of the configuration.
        kwargs: Passed on to `from_pretrained`.

    Raises:
        ModelError: There is no usable model.
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
    """The configuration of a model folder or Hub id."""
    from transformers import AutoConfig

    check_folder(name)
    return AutoConfig.from_pretrained(name, revision=revision)


def on_meta(name: str | Path, revision: str | None = None) -> Any:
    """The model of a folder or Hub id on the meta device, so without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(name, revision))


def n_bytes(name: str | Path, dtype: str, revision: str | None = None) -> int:
    """Size in bytes of a model's weights in the type `dtype` (`auto`: that of its configuration); loads no weights.

    The result is 0 for quantised weights, because the configuration does not state their size.
    """
    model = on_meta(name, revision)
    if getattr(model.config, "quantization_config", None) is not None:
        return 0
    kind = model.config.dtype if dtype == "auto" else getattr(torch, dtype)
    return n_parameters(model) * (kind or torch.float32).itemsize


def placed(model: Any, device: torch.device, name: str) -> Any:
    """Move a model to a device after checking that the device has room for it.

    Raises:
        ResourceError: The device has too little free memory.
    """
    if devices.is_cuda(device):
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        instead = "use memory_dtype=bfloat16, memory_device=cpu, or device_map=auto for the base"
        devices.check_room(size, device, name, instead)
    return model.to(device)


def check_folder(name: str | Path) -> None:
    """Check that a name that looks like a local path is a complete model folder.

    Without this check the Hub client would report an invalid repository name.
    """
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
    """Check that a model's logits are the output matrix times the final hidden state.

    The losses and scores of this package compute the logits that way.

    Args:
        model: A causal LM.
        bias: Whether the output layer may have a bias.

    Raises:
        ModelError: The model changes its logits (Gemma 2, Granite and Cohere scale or cap them; Phi has a bias).
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
    """Replace GPT-2's GELU by one fused kernel, which computes the same function with 8 fewer passes over its input.

    Results differ by rounding only. The configuration does not change, and so a saved model does not either.
    """
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def from_scratch(spec: ModelSpec, vocab_size: int, context: int, eos: int) -> Any:
    """A randomly initialised decoder with tied embeddings, of the architecture and size in `spec`."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    if spec.width is None or spec.layers is None or spec.heads is None:
        raise ConfigError("model from scratch: expected width, layers and heads, found one missing")
    torch.manual_seed(spec.seed)
    dropout = spec.train.dropout if spec.train is not None else 0.0
    # The usual 0.02 suits widths near 1,000. At width 64 it costs half of the training: after 1 M tokens the valid
    # perplexity is 151 instead of 70.
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
                # The same function as GPT-2's gelu_new, in one fused kernel: steps on CPU are 1.2-1.4 x faster.
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
            * 8,  # SwiGLU has three matrices, so this has as many parameters as 4 x width
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=max(1, spec.heads // 2),
            attention_dropout=dropout,
            tie_word_embeddings=True,
            **common,
        )
    )


def run_pretrained(spec: ModelSpec, tokenizer_folder: Path, out: Path) -> None:
    """Stage `model` for pretrained models: make a model folder.

    An unchanged folder or Hub model becomes a folder of links, without copies. A GGUF file, or a model of which only
    the first `layers` are kept, is written as float32 safetensors.
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
            (out / file.name).unlink(missing_ok=True)  # left by an interrupted build
            (out / file.name).symlink_to(file.resolve())


def _write(model: Any, words: Any, layers: int | None, out: Path) -> None:
    if layers is not None:
        keep_layers(model, layers)
    model.save_pretrained(out)
    words.save_pretrained(out)


def from_gguf(source: sources.Source) -> Any:
    """Load a GGUF file as an ordinary transformers model with float32 weights.

    Raises:
        ModelError: transformers cannot read the architecture or file, or weights are missing or left over.
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
    """Copy the buffers that are not saved in files, such as the frequencies of RoPE."""
    for name, value in packed.named_buffers():
        part, _, last = name.rpartition(".")
        model.get_submodule(part).register_buffer(last, value, persistent=name in packed.state_dict())


def keep_layers(model: Any, n: int) -> None:
    """Keep only the first n decoder layers, in place; embedding, final norm and head stay.

    Raises:
        ConfigError: The model has fewer layers.
        ModelError: The layers are not in one list.
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
            f"{name}: expected at most {config.num_hidden_layers} layers, which the model has, found {n}; lower 'layers'"
        )


def snapshot(name: str, revision: str | None) -> Path:
    """The local folder of a model folder or Hub id; downloads safetensors, tokenizer and configuration only."""
    check_folder(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    instead = "download it on a machine with network and give the folder"
    with outside(ModelError, name, "a model of the Hub", instead):
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def n_positions(config: Any) -> int | None:
    """The most tokens that a model can take (its positions), or None if its configuration does not say."""
    for field in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, field, None), int):
            return int(getattr(config, field))
    return None


def check_positions(limit: int | None, n: int, what: str, instead: str) -> None:
    """Check that n tokens fit into the positions of a model; beyond them a model fails late or gives nonsense.

    Args:
        limit: Number of positions of the model or models; None if it is not known.
        n: Number of tokens needed.
        what: Name of the setting or text with this length, for the message.
        instead: The next step for the user.

    Raises:
        ConfigError: The model has fewer positions.
    """
    if limit is not None and n > limit:
        raise ConfigError(f"{what}: expected at most {limit} tokens (positions of the models), found {n}; {instead}")


def n_parameters(model: nn.Module) -> int:
    """Number of parameters; tied parameters count once."""
    return sum(p.numel() for p in model.parameters())


def decoder(model: Any) -> Any:
    """The model without its output head: ids -> final hidden states."""
    return model.base_model


def head_weight(model: Any) -> Tensor:
    """Output embedding, shape (V, D)."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def model_identity(name: str, revision: str | None = None) -> str:
    """An identifier of a model's outputs: a hash of the folder's weights and configuration, or Hub id and revision.

    It is not the recipe of the artefact, because the same recipe may give other weights after a code change.
    """
    path = Path(name)
    if not path.is_dir():
        return f"{name}@{revision or 'main'}"
    files = sorted(
        file for file in path.iterdir() if file.suffix in (".safetensors", ".json") and file.name != artefact.MANIFEST
    )
    return artefact.digest([(file.name, artefact.file_digest(file)) for file in files])
