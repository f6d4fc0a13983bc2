"""Stage `model`, and loading of models: from scratch (mini scale), a folder, the Hub or a GGUF file."""

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memdec.artefacts import artefact, devices, sources
from memdec.errors import ConfigError, ModelError, outside
from memdec.maths import losses
from memdec.models import checkpoints
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
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a causal LM from an artefact folder, a model folder or a Hub id.

    Args:
        name: Folder or Hub id.
        dtype: Type of the weights.
        revision: Commit of a Hub id.
        subfolder: Subfolder of the folder or repository.
        dropout: Replaces every dropout rate of the configuration.
        trust_remote_code: Whether code of the repository may run.
        kwargs: Passed on to `from_pretrained`.

    Raises:
        ModelError: There is no usable model, or its files do not have exactly the model's weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(name, subfolder, whole=True)
    given: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "trust_remote_code": trust_remote_code}
    with sources.reading(name, "a causal LM with safetensors weights"):
        config = AutoConfig.from_pretrained(name, **given)
    if dropout is not None:
        set_dropout(config, dropout)
    model = from_pretrained(
        AutoModelForCausalLM, name, config=config, dtype=dtype, use_safetensors=True, **given, **kwargs
    )
    model.subfolder = subfolder or ""  # transformers writes down only `name_or_path`
    return model


class _Head(nn.Linear):
    """An output head of which the logits are float32 on a GPU, whatever the type of the weights (`losses.wide_logits`)."""

    def forward(self, input: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)  # no such gradient
        is_low = self.weight.dtype in (torch.float16, torch.bfloat16) and input.dtype == self.weight.dtype
        if learns or not is_low or not input.is_cuda:
            return super().forward(input)
        logits = losses.wide_logits(input.flatten(0, -2), self.weight)
        if self.bias is not None:
            logits += self.bias
        return logits.reshape(*input.shape[:-1], -1)


def _widen(head: Any) -> None:
    """Let an output head give float32 logits."""
    if type(head) is not nn.Linear:
        return
    head.__class__ = _Head
    if "_old_forward" in vars(head):  # a model over several GPUs calls what accelerate kept
        vars(head)["_old_forward"] = MethodType(_Head.forward, head)


def from_pretrained(
    kind: Any,
    name: str | Path,
    *,
    shown: str | None = None,
    expected: str = "a causal LM with weights that can be read",
    **kwargs: Any,
) -> Any:
    """Call `kind.from_pretrained`, and check that the files have the model's weights and no others.

    transformers fills a weight that no file has with random numbers and only logs it. All models are loaded here, so
    that none is used like that, and all give float32 logits on a GPU.

    Args:
        kind: Class with `from_pretrained`, such as `AutoModelForCausalLM`.
        name: Folder or Hub id.
        shown: What messages call it; default the name.
        expected: What it should be, for messages.
        kwargs: Passed on.

    Raises:
        ModelError: Weights are missing, left over or of another shape, or nothing can be read.
    """
    kwargs["ignore_mismatched_sizes"] = True  # they are in the report then, with the others
    shown = shown or str(name)
    with sources.reading(shown, expected):
        if kwargs.get("generation_config") is None and kwargs.get("gguf_file") is None:
            kwargs["generation_config"] = checkpoints.repaired_file(name, kwargs)
        model, report = kind.from_pretrained(name, output_loading_info=True, **kwargs)
    checkpoints.check_report(report, shown, type(model).__name__)
    if kwargs.get("gguf_file") is None:
        checkpoints.check_types(Path(name, kwargs.get("subfolder") or ""), model)
    checkpoints.repair_generation(model, shown)
    _widen(model.get_output_embeddings())
    return model


def adapted(base: Any, name: str | Path, *, revision: str | None = None) -> Any:
    """The base with a trained peft adapter, not merged.

    The vocabulary of the base is only resized for an adapter with embeddings of its own. lm-eval's `hf` cuts or fills
    every head to the size of the tokenizer, so that a softmax over other entries would be compared with the base's.

    Raises:
        ArtifactError: The folder is an artefact that is not complete.
        ModelError: The adapter cannot be read, was made for another model, or lacks weights.
    """
    from peft import PeftModel

    given: dict[str, Any] = {"revision": revision, "torch_device": str(base.device)}
    given["key_mapping"] = getattr(base, "_checkpoint_conversion_mapping", None) or {}
    if is_artefact(Path(name)):
        artefact.read(Path(name), "lora", whole=True)
    with sources.reading(name, f"a peft adapter of {base.name_or_path}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        _take_rows(base, name, given)
        model = PeftModel.from_pretrained(base, str(name), **given)
        report = model.load_adapter(str(name), "default", **given)  # loads it once more, for the report
    found = {"missing_keys": report.missing_keys, "unexpected_keys": report.unexpected_keys}
    checkpoints.check_report(found, name, f"an adapter of {type(base).__name__}")
    return model


def _take_rows(base: Any, name: str | Path, given: Mapping[str, Any]) -> None:
    """Resize the vocabulary of the base to that of embeddings which the adapter brings itself, if it does.

    Raises:
        ModelError: The adapter brings one of two tables, so that the other would have random rows.
    """
    from peft.utils.save_and_load import load_peft_weights

    tables = {id(part.weight): part for part in (base.get_input_embeddings(), base.get_output_embeddings())}
    paths = [path for path, module in base.named_modules() if any(module is part for part in tables.values())]
    weights = load_peft_weights(str(name), device="cpu", revision=given["revision"])
    rows = [len(value) for key, value in weights.items() if key.removeprefix("base_model.model.")[:-7] in paths]
    if not rows or set(rows) == {len(base.get_output_embeddings().weight)}:
        return
    if len(rows) < len(tables):
        raise ModelError(
            f"{name}: expected embedding and head of {rows[0]} tokens, found one of them in the adapter; save both"
        )
    base.resize_token_embeddings(rows[0], mean_resizing=False)


def check_delta(base: str | Path, delta: str | Path, revision: str | None = None, **where: Any) -> None:
    """Check that a delta has the weights of its base; no weights are read.

    Args:
        base: Folder or Hub id.
        delta: Folder or Hub id of the weights that are added.
        revision: Commit of both, for Hub ids, as in lm-eval.
        where: Further arguments for `config` of the base.

    Raises:
        ModelError: A weight of one of them is not in the other, or has another shape.
    """
    ours, theirs = (
        {weight: tuple(value.shape) for weight, value in on_meta(name, revision, **more).state_dict().items()}
        for name, more in ((base, where), (delta, {k: v for k, v in where.items() if k == "trust_remote_code"}))
    )
    both = ours.keys() & theirs.keys()
    found = {"missing_keys": ours.keys() - theirs.keys(), "unexpected_keys": theirs.keys() - ours.keys()}
    shapes = {(weight, theirs[weight], ours[weight]) for weight in both if ours[weight] != theirs[weight]}
    checkpoints.check_report(found | {"mismatched_keys": shapes}, delta, f"the base {base}")


def config(
    name: str | Path, revision: str | None = None, *, subfolder: str = "", trust_remote_code: bool = False
) -> Any:
    """The configuration of a model folder or Hub id."""
    from transformers import AutoConfig

    check_folder(name, subfolder, any_weights=True)
    with sources.reading(name, "a model with a configuration that can be read"):
        return AutoConfig.from_pretrained(
            name, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code
        )


def on_meta(name: str | Path, revision: str | None = None, **where: Any) -> Any:
    """The model of a folder or Hub id on the meta device, so without weights; `where` as for `config`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config(name, revision, **where), trust_remote_code=where.get("trust_remote_code", False)
        )


def n_rows(name: str | Path) -> int:
    """Rows of a model's output head; loads no weights."""
    return int(on_meta(name).get_output_embeddings().weight.shape[0])


def n_bytes(name: str | Path, dtype: str, revision: str | None = None, **where: Any) -> int:
    """Size in bytes of a model's weights in the type `dtype` (`auto`: that of its configuration); loads no weights.

    `where` is as for `config`.

    The result is 0 for quantised weights, because the configuration does not state their size.
    """
    model = on_meta(name, revision, **where)
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


def check_folder(name: str | Path, subfolder: str = "", *, any_weights: bool = False, whole: bool = False) -> None:
    """Check that a name that looks like a local path is a complete model folder.

    Without this check the Hub client would report an invalid repository name.

    Args:
        name: Folder or Hub id.
        subfolder: Subfolder of the folder.
        any_weights: Whether weights in another format than safetensors will do, or none (a saved mixture).
        whole: Whether the content of large files of an artefact is checked too; for those who load it.

    Raises:
        ArtifactError: The folder is an artefact that is not complete.
        ModelError: There is no such folder, configuration or weights.
    """
    path = Path(name)
    if is_artefact(path):
        artefact.read(path, artefact.kind_of(path) or "model", whole)
    looks_local = path.is_absolute() or len(path.parts) > 2 or str(name).startswith(".") or path.exists()
    if not looks_local:
        return
    path = path / subfolder
    if not (path / "config.json").is_file():
        found = "no such file in it" if path.is_dir() else "no such folder"
        raise ModelError(f"{path}: expected a model folder with config.json, found {found}; check the path")
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path}: expected a model, found a peft adapter beside its config.json, which transformers would add to the "
            "adapter's own base; move the adapter, and give it as peft= (lm_eval) or --lora"
        )
    if not any_weights:
        checkpoints.weight_files(path)


def is_artefact(folder: Path) -> bool:
    """Whether a folder was made by a stage of ours; others are plain folders, of which no origin is known."""
    return (folder / artefact.MARK).exists() or artefact.kind_of(folder) is not None


class Known(NamedTuple):
    """What a stage notes about a model folder that it reads.

    Attributes:
        recipe: The recipe of an artefact; of a plain folder the hash of its content.
        facts: The facts of an artefact; of a plain folder its tokenizer's fingerprint, as `tokenizer_sha256`.
    """

    recipe: str
    facts: Mapping[str, Any]


def known(folder: str | Path, *kinds: str) -> Known:
    """Describe a model folder, which is an artefact of one of the kinds or any folder that transformers can load.

    The content of all files of an artefact is checked, because a folder of links has no other way to notice that the
    linked model was replaced.

    Raises:
        ArtifactError: The artefact is of another kind, not complete or changed.
        ModelError: The folder is no model folder.
    """
    path = Path(folder)
    if is_artefact(path):
        kind = artefact.kind_of(path)
        manifest = artefact.read(path, kind if kind in kinds else kinds[0], whole=True)
        return Known(manifest.recipe, manifest.facts)
    check_folder(folder)
    return Known(sources.identity(folder), {"tokenizer_sha256": tokens.fingerprint(load_tokenizer(str(folder)))})


def tokenizer_sha256(folder: str | Path, words: Any) -> str:
    """Fingerprint of the tokenizer whose token streams a model reads; `words` is the one in its folder.

    An artefact has that of the tokenizer in its config, which gives the same ids as its own.
    """
    kind = artefact.kind_of(Path(folder))
    known = None if kind is None else artefact.read(Path(folder), kind).facts.get("tokenizer_sha256")
    return tokens.fingerprint(words) if known is None else str(known)


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate that a model configuration has; those of heads that classify are no part of a causal LM."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError
    from transformers import PretrainedConfig

    for field, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            set_dropout(value, rate)
        is_rate = isinstance(value, int | float) and not isinstance(value, bool)
        if is_rate and re.search("dropout|pdrop", field) and not re.match("classifier|summary", field):
            with suppress(StrictDataclassFieldValidationError):  # transformers takes only whole numbers: MPT's is 0
                setattr(config, field, rate)


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
    head = model.get_output_embeddings()
    ours = head(hidden)
    if not bias and getattr(head, "bias", None) is not None:
        ours = ours - head.bias
    theirs = model(input_ids=probe, use_cache=False).logits
    model.train(training)
    # A cap does not show in the small logits of a model that has hardly been trained.
    caps = [name for name in _CAPS if getattr(model.config.get_text_config(decoder=True), name, None)]
    if caps or not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
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
    the first `layers` are kept, is written as float32 safetensors. The recipe has the content of the source, or its
    commit on the Hub, and not its path.
    """
    assert spec.pretrained is not None
    inputs, plain = {"tokenizer": artefact.read(tokenizer_folder, "tokenizer").recipe}, spec.model_dump(mode="json")
    folder, there = None, Path(str(spec.pretrained))
    if isinstance(spec.pretrained, str):
        plain["pretrained"] = None
        if not sources.is_gguf(spec.pretrained):
            folder = snapshot(spec.pretrained, spec.revision)
            checkpoints.weight_files(folder)
            # The Hub client keeps a commit in a folder of its name.
            at = f"{spec.pretrained}@{folder.name}"
            inputs["pretrained"] = sources.identity(there) if there.is_dir() else at
        elif there.is_file():
            inputs["pretrained"] = sources.identity(there)
    with artefact.building(out, "model", plain, inputs) as build:
        if build is None:
            return
        if folder is None:
            with sources.gguf(spec.pretrained) as source:
                build.facts.update(source.facts)
                _write(from_gguf(source), load_tokenizer(str(source.folder), **source.options), spec.layers, out)
        else:
            build.facts.update(source=spec.pretrained, revision=None if there.is_dir() else folder.name)
            if spec.layers is None:
                _link(folder, out)
            else:
                _check_layers(config(folder), spec.layers, str(folder))
                _write(load(folder), load_tokenizer(str(folder)), spec.layers, out)
        wanted = load_tokenizer(str(tokenizer_folder))
        tokens.check_same_ids(wanted, load_tokenizer(str(out)), f"{spec.pretrained} with {tokenizer_folder}")
        # Not that of its own tokenizer, which may have other control tokens: Qwen2's lacks 19 of Qwen2.5's.
        build.facts.update(tokenizer_sha256=tokens.fingerprint(wanted))


def _link(folder: Path, out: Path) -> None:
    others = [file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".model", ".jinja")]
    for file in {*checkpoints.weight_files(folder), *others}:
        if file.name != artefact.MANIFEST:
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
    packed = from_pretrained(
        AutoModelForCausalLM,
        source.folder,
        shown=name,
        expected="a GGUF file of an architecture that transformers reads",
        dtype=torch.float32,
        trust_remote_code=False,
        **source.options,
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

    with outside(ModelError, name, "a model of the Hub", "download it on a machine with network and give the folder"):
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def n_positions(config: Any) -> int | None:
    """The most tokens that a model can take (its positions), or None if its configuration does not say."""
    text = config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):  # the last one is MPT's
        if isinstance(getattr(text, field, None), int):
            return int(getattr(text, field))
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


model_identity = sources.identity
