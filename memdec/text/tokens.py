"""Stages `tokenizer` and `tokens`: tokenizers, and the token streams of corpora.

Stage `tokenizer` trains a byte-level BPE on corpora or copies the tokenizer of a model folder or Hub id. Its output is
a folder that `AutoTokenizer` loads. Stage `tokens` writes one token stream per split of a corpus as `<split>.npy`, in
the smallest unsigned integer type that holds the vocabulary. With separator `eos` every document ends with EOS. So the
token stream equals the tokens of the joined text, which is the text that lm-eval gets.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from memdec.artefacts import artefact, sources
from memdec.errors import ArtifactError, ConfigError, CorpusError, ModelError
from memdec.settings import SPLITS, Split, TokenizerSpec
from memdec.text import corpora

EOS = "<|endoftext|>"
_BATCH = 1000  # documents per call of the tokenizer


def run_tokenizer(spec: TokenizerSpec, out: Path, corpus_folders: Sequence[Path] = ()) -> None:
    """Stage `tokenizer`: make a tokenizer folder.

    Args:
        spec: Whether to train on corpora or to take an existing tokenizer.
        out: Folder to make.
        corpus_folders: One folder per name in `spec.train_on`.
    """
    inputs = {f"corpus {i}": artefact.read(path, "corpus").recipe for i, path in enumerate(corpus_folders)}
    if spec.train_on is not None and len(corpus_folders) != len(spec.train_on):
        raise ConfigError(
            f"{out}: expected {len(spec.train_on)} corpus folders (train_on), found {len(corpus_folders)}"
        )
    plain = spec.model_dump(mode="json")
    if isinstance(spec.pretrained, str):  # known by its content; a wheel has its hash in the settings
        plain["pretrained"] = None
        inputs["pretrained"] = sources.identity(
            spec.pretrained, spec.revision, weights=sources.is_gguf(spec.pretrained)
        )
    with artefact.building(out, "tokenizer", plain, inputs) as build:
        if build is None:
            return
        if spec.pretrained is not None:
            tokenizer = _pretrained(spec, build)
        else:
            texts = (text for path in corpus_folders for text in corpora.load(path, "train"))
            tokenizer = _train(texts, int(spec.vocab_size or 0))
        tokenizer.save_pretrained(out)
        build.facts.update(vocab_size=len(tokenizer), sha256=fingerprint(tokenizer))


def _pretrained(spec: TokenizerSpec, build: artefact.Build) -> Any:
    """Load the existing tokenizer and write its origin into the manifest."""
    assert spec.pretrained is not None
    if not sources.is_gguf(spec.pretrained):
        return load_tokenizer(str(spec.pretrained), spec.revision)
    with sources.gguf(spec.pretrained) as source:
        build.facts.update(source.facts)
        return load_tokenizer(str(source.folder), **source.options)


def run_tokens(tokenizer_folder: Path, corpus_folder: Path, out: Path) -> None:
    """Stage `tokens`: make the token streams of a corpus."""
    corpus = artefact.read(corpus_folder, "corpus")
    inputs = {"corpus": corpus.recipe, "tokenizer": artefact.read(tokenizer_folder, "tokenizer").recipe}
    with artefact.building(out, "tokens", {}, inputs) as build:
        if build is None:
            return
        tokenizer = load_tokenizer(str(tokenizer_folder))
        end = tokenizer.eos_token_id if corpus.facts["separator"] == "eos" else None
        width = np.min_scalar_type(len(tokenizer) - 1)
        counts, hashes = {}, {}
        for split in SPLITS:
            stream = _encode(tokenizer, corpora.load(corpus_folder, split), end, split).astype(width)
            if len(stream) < 2:
                raise CorpusError(f"{corpus_folder}: expected tokens in the {split} split, found {len(stream)}")
            np.save(out / f"{split}.npy", stream, allow_pickle=False)
            counts[split] = len(stream)
            hashes[split] = artefact.file_digest(out / f"{split}.npy")
        build.facts.update(
            tokens=counts,
            sha256=hashes,
            corpus=os.path.relpath(corpus_folder.resolve(), out.resolve()),
            corpus_sha256=corpus.facts["sha256"],
            tokenizer_sha256=fingerprint(tokenizer),
            dtype=str(width),
        )


def load_stream(folder: Path, split: Split) -> NDArray[np.integer]:
    """Memory-mapped token stream of one split, shape (N,)."""
    artefact.read(folder, "tokens")
    stream: NDArray[np.integer] = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    return stream


def load_tokenizer(
    name: str,
    revision: str | None = None,
    *,
    subfolder: str = "",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> Any:
    """Load a fast tokenizer from a folder or Hub id.

    Raises:
        ModelError: There is no tokenizer, it has no EOS token, or it needs code of its repository that is not trusted.
    """
    from transformers import AutoTokenizer

    # No folder of ours holds code; `adapt-vocab` writes an entry that transformers takes for some where it is trusted.
    trust = trust_remote_code and artefact.kind_of(Path(name)) is None
    more = {"gguf_file": gguf_file, "subfolder": subfolder}
    with sources.reading(name, "a tokenizer folder or Hub id"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust, **{k: v for k, v in more.items() if v}
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: expected a tokenizer with an EOS token, found none; set eos_token in tokenizer_config.json"
        )
    return tokenizer


def prefix_id(tokenizer: Any) -> int:
    """The token before position 0: BOS, or EOS if the tokenizer has no BOS (as in lm-eval)."""
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)


def behind(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids that each text (a word with a leading space) adds when it follows another text.

    They may differ from the ids of the text alone, because SentencePiece puts an empty token before a leading space.
    """
    before = ":"
    n_before = len(tokenizer.encode(before, add_special_tokens=False))
    rows: list[list[int]] = tokenizer([before + text for text in texts], add_special_tokens=False)["input_ids"]
    return [ids[n_before:] for ids in rows]


def text_behind(tokenizer: Any, token: int) -> str:
    """The text that a token adds when it follows another text, with its leading space."""
    before = tokenizer.encode(":", add_special_tokens=False)
    return str(tokenizer.decode([*before, token])).removeprefix(str(tokenizer.decode(before)))


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides the ids of a string: vocabulary, merges, normaliser, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return artefact.digest(sorted(tokenizer.get_vocab().items()))
    import json

    state = json.loads(backend.to_str())
    # "" and null mean the same to the library, and a reloaded tokenizer may have either.
    state["model"] = {key: value for key, value in state["model"].items() if value}
    return artefact.digest({key: state.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")})


def n_needed(tokenizer: Any) -> int:
    """Rows that the embedding and the output head of a model need for the texts of a tokenizer.

    Added control tokens may have ids beyond them: no text holds them, and some families have no rows for them (Gemma 3
    1B: 262,145 tokens and 262,144 rows). The ends of texts count, as token streams hold them.
    """
    beyond = _control_tokens(tokenizer) - {tokenizer.eos_token, tokenizer.bos_token}
    return 1 + max((token for word, token in tokenizer.get_vocab().items() if word not in beyond), default=-1)


def _train(texts: Iterator[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    # transformers 5 rebuilds normaliser and pre-tokenizer from the class of the model in the same folder. So a Qwen2
    # folder splits text as Qwen2 does, whatever tokenizer.json says. With Qwen2's rules here, all families agree.
    template = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = template.normalizer, template.pre_tokenizer, template.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise CorpusError(
            f"tokenizer: expected text for {vocab_size} tokens, found enough for {bpe.get_vocab_size()}; lower vocab_size"
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def _encode(tokenizer: Any, texts: list[str], end: int | None, split: str) -> NDArray[np.int64]:
    tail = [] if end is None else [end]
    parts = []
    for begin in tqdm(range(0, len(texts), _BATCH), desc=f"tokenize {split}", unit="k docs", mininterval=2):
        batch = tokenizer(
            texts[begin : begin + _BATCH], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        parts += [np.asarray(ids + tail, dtype=np.int64) for ids in batch["input_ids"]]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def check_same(ours: str, other: str, where: str) -> None:
    """Check that two tokenizer fingerprints are equal.

    Raises:
        ArtifactError: They differ.
    """
    if ours != other:
        raise ArtifactError(
            f"{where}: expected one tokenizer, found two (fingerprints {ours[:8]} and {other[:8]}); use models of one "
            "family, or adapt the memory to the other vocabulary with `memdec adapt-vocab`"
        )


# Text on which tokenizers often differ: contractions, digits, runs of spaces, code, scripts with and without spaces,
# combining marks.
SAMPLE = (
    "It's 3.14159, isn't it?  They'LL pay $1,234,567.89 (or 10^6 EUR) by 2024-02-29.\r\n\n\n\tdef f(x_1):\n        return x_1**2  # "
    "TODO\n{'a': [1, 2]}; https://example.org/~user?q=%20&z=1 | naïve café, e\u0301, ﬁ, ½, Ⅻ, Straße, ŻÓŁĆ, Ελληνικά, Русский, "
    "עברית, العربية, हिन्दी, ไทย, 中文字符，日本語テキスト、한국어 \U0001f600\U0001f468\u200d\U0001f469 \u00a0\u3000\u200b end   "
)


def check_same_ids(one: Any, other: Any, where: str) -> None:
    """Check that two tokenizers give the same ids for the same strings.

    Equal fingerprints prove it. Otherwise three conditions must hold. A token string in both vocabularies has the same
    id in both. A token string in only one of them is an added control token (Qwen2.5 has 19 that Qwen2 lacks). Both
    tokenizers give the same ids for a sample text and for strings of the vocabulary.

    Raises:
        ModelError: The ids differ; the message names a string.
    """
    if fingerprint(one) == fingerprint(other):
        return
    ours, theirs = one.get_vocab(), other.get_vocab()
    control = _control_tokens(one) | _control_tokens(other)
    differ = (w for w in sorted(ours.keys() | theirs.keys()) if ours.get(w) != theirs.get(w))
    wrong = next((w for w in differ if (w in ours and w in theirs) or w not in control), None)
    if wrong is None:
        some = sorted(set(ours.values()) & set(theirs.values()))[:: max(1, len(ours) // 4096)]
        for text in (SAMPLE, one.decode(some), *one.batch_decode([[token] for token in some])):
            ids = [words(text, add_special_tokens=False, verbose=False)["input_ids"] for words in (one, other)]
            if ids[0] != ids[1]:
                wrong = text
                break
    if wrong is not None:
        found = [words(wrong, add_special_tokens=False, verbose=False)["input_ids"][:8] for words in (one, other)]
        raise ModelError(
            f"{where}: expected one tokenizer, found two: {wrong[:40]!r} has the ids {found[0]} and {found[1]}; use models "
            "of one family, or adapt the memory to the other vocabulary with `memdec adapt-vocab`"
        )


def _control_tokens(tokenizer: Any) -> set[str]:
    """Added tokens that do not occur in ordinary text: special tokens, and tokens written as `<...>`."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special or (str(token).startswith("<") and str(token).endswith(">"))}
