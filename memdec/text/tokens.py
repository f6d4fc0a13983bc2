"""Stages `tokenizer` and `tokens`: tokenizers, and the token streams of corpora.

Stage `tokenizer` trains a byte-level BPE on corpora or copies the tokenizer of a model folder or Hub id. Its output is
a folder that `AutoTokenizer` loads. Stage `tokens` writes one token stream per split of a corpus as `<split>.npy`, in
the smallest unsigned integer type that holds the vocabulary. The token stream is what the tokenizer makes of the joined
text of the split (`corpora.joined`), which is also the text that lm-eval gets.
"""

import json
import os
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from memdec.artefacts import arrays, artefact, sources
from memdec.errors import ArtifactError, ConfigError, CorpusError, ModelError
from memdec.settings import SPLITS, Split, TokenizerSpec
from memdec.text import corpora

EOS = "<|endoftext|>"
# Characters of the joined text in one piece, and of the overlap in which two pieces must give the same tokens.
_PIECE = 2**17
_OVERLAP = 2**12
_AT_ONCE = 16  # pieces per call of the tokenizer, which has threads
_SHARED = 16  # least number of equal tokens in an overlap
_MOST = 16  # pieces that are encoded as one before the whole text is


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
        ends = tokenizer.eos_token if corpus.facts["separator"] == "eos" else ""
        width = np.min_scalar_type(n_ids(tokenizer) - 1)
        counts, hashes = {}, {}
        for split in SPLITS:
            texts = corpora.load(corpus_folder, split)
            parts = encoded(tokenizer, [text + ends for text in texts], split)
            if (largest := max((int(part.max()) for part in parts if len(part)), default=0)) > np.iinfo(width).max:
                raise ModelError(
                    f"{tokenizer_folder}: expected ids below {n_ids(tokenizer)}, the largest of the vocabulary, found {largest} in "
                    f"the {split} split of {corpus_folder}; use another tokenizer"
                )
            stream = np.concatenate([np.empty(0, width), *parts], dtype=width, casting="unsafe")
            if len(stream) < 2:
                raise CorpusError(
                    f"{corpus_folder}: expected at least 2 tokens in the {split} split, found {len(stream)}; use another "
                    "tokenizer or more text"
                )
            np.save(out / f"{split}.npy", stream, allow_pickle=False)
            counts[split] = len(stream)
            hashes[split] = artefact.file_digest(out / f"{split}.npy")
        build.facts.update(
            end=tokenizer.eos_token_id if ends else None,
            tokens=counts,
            sha256=hashes,
            corpus=os.path.relpath(corpus_folder.resolve(), out.resolve()),
            corpus_sha256=corpus.facts["sha256"],
            tokenizer_sha256=fingerprint(tokenizer),
            dtype=str(width),
        )


def load_stream(folder: Path, split: Split) -> NDArray[np.integer]:
    """Memory-mapped token stream of one split, shape (N,)."""
    facts = artefact.read(folder, "tokens", whole=True).facts
    return arrays.load(
        folder / f"{split}.npy", facts.get("dtype", arrays.INTEGERS), (facts.get("tokens", {}).get(split),)
    )


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
    # transformers would save whether HF_HUB_OFFLINE was set, and the same training would write other files.
    tokenizer.init_kwargs.pop("local_files_only", None)
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
    state = json.loads(backend.to_str())
    # "" and null mean the same to the library, and a reloaded tokenizer may have either.
    state["model"] = {key: value for key, value in state["model"].items() if value}
    return artefact.digest({key: state.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")})


def n_ids(tokenizer: Any) -> int:
    """The largest id plus one; a vocabulary with gaps has fewer tokens."""
    return int(max(tokenizer.get_vocab().values())) + 1


def n_needed(tokenizer: Any) -> int:
    """Rows that the embedding and the output head of a model need for the texts of a tokenizer.

    Added control tokens may have ids beyond them: no text holds them, and some families have no rows for them (Gemma 3
    1B: 262,145 tokens and 262,144 rows). The ends of texts count, as token streams hold them.
    """
    beyond = _control_tokens(tokenizer) - {tokenizer.eos_token, tokenizer.bos_token}
    return 1 + max((token for word, token in tokenizer.get_vocab().items() if word not in beyond), default=-1)


def whole_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides the ids of a string with the special tokens that are put around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return artefact.digest([fingerprint(tokenizer), str(getattr(tokenizer, "init_kwargs", None))])
    state = json.loads(backend.to_str())
    # Padding and truncation are set anew by each call.
    return artefact.digest({key: value for key, value in state.items() if key not in ("padding", "truncation")})


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


@dataclass(slots=True)
class _Piece:
    """A part of the joined text and its tokens."""

    text: str
    tokens: Any  # the backend's Encoding
    ids: list[int]
    first: int = 0  # number of tokens that the piece before it has already

    def between(self, begin: int, end: int) -> range:
        """Numbers of the tokens that begin in a range of characters."""
        every = range(len(self.ids))
        return range(*(bisect_left(every, at, key=lambda number: self._place(number)[0]) for at in (begin, end)))

    def run(self, numbers: range, shift: int) -> list[tuple[int, int, int]]:
        """Id, first character and end of these tokens; characters are counted from `shift`."""
        placed = ((self.ids[number], self._place(number)) for number in numbers)
        return [(token, first - shift, end - shift) for token, (first, end) in placed]

    def _place(self, number: int) -> tuple[int, int]:
        place: tuple[int, int] | None = self.tokens.token_to_chars(number)
        return place or (0, 0)


def encoded(tokenizer: Any, texts: Sequence[str], name: str = "") -> list[NDArray[np.uint32]]:
    """The ids of `tokenizer.encode("".join(texts), add_special_tokens=False)`, in parts.

    A tokenizer may treat the beginning of a text and what is around a separator in its own way, so documents cannot be
    encoded one by one. One call for all of the text would need 100 bytes per token and use one thread. The joined text
    is therefore cut into pieces that overlap, and two pieces are joined where they have the same tokens at the same
    characters:

        piece   ....a b c|d e f ~
        next             ~ d e f|g h....     ~ tokens that the cut may have changed

    This is exact for words that are split by a pattern, and for BPE on a whole text: its tokens are right if every two
    neighbours are, and all neighbours stand together in one of the pieces. For Unigram on a whole text another result
    would need a better path of tokens that shares no boundary with these in the whole overlap. Pieces without such a
    place are encoded again as one. A tokenizer for which that does not help, or without a Rust backend, gets the whole
    text in one call.
    """
    if getattr(tokenizer, "is_fast", False):
        parts = _joined(tokenizer, tqdm(texts, f"tokenize {name}".strip(), unit="doc", mininterval=2))
        if parts is not None:
            return parts
    if sum(map(len, texts)) > _PIECE:
        warnings.warn(
            f"{tokenizer.name_or_path}: this tokenizer gets the whole text in one call, which takes memory and time",
            stacklevel=2,
        )
    return [np.asarray(tokenizer.encode("".join(texts), add_special_tokens=False, verbose=False), dtype=np.uint32)]


def _joined(tokenizer: Any, texts: Iterable[str]) -> list[NDArray[np.uint32]] | None:
    """The ids of the joined text from overlapping pieces, or None if some of them cannot be joined."""
    parts: list[NDArray[np.uint32]] = []
    before: _Piece | None = None
    for piece in _encoded_pieces(tokenizer, _pieces(texts)):
        if before is None:
            before = piece
        elif (seam := _seam(before, piece)) is not None:
            parts.append(np.asarray(before.ids[before.first : seam[0]], dtype=np.uint32))
            before, piece.first = piece, seam[1]
        elif (longer := _longer(tokenizer, before, piece)) is not None:
            before = longer
        else:
            return None
    return parts if before is None else [*parts, np.asarray(before.ids[before.first :], dtype=np.uint32)]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The joined text in pieces of `_PIECE` characters after the first `_OVERLAP`, which are those of the one before."""
    held: list[str] = []
    n_held = n_first = 0
    for text in texts:
        held.append(text)
        n_held += len(text)
        if n_held - n_first < _PIECE:
            continue
        joined, begin = "".join(held), 0
        while len(joined) - begin - n_first >= _PIECE:
            yield joined[begin : begin + n_first + _PIECE]
            begin += n_first + _PIECE - _OVERLAP
            n_first = _OVERLAP
        held, n_held = [joined[begin:]], len(joined) - begin
    if n_held > n_first:
        yield "".join(held)


def _encoded_pieces(tokenizer: Any, pieces: Iterator[str]) -> Iterator[_Piece]:
    while given := list(islice(pieces, _AT_ONCE)):
        for text, found in zip(given, _encodings(tokenizer, given), strict=True):
            yield _Piece(text, found, found.ids)


def _encodings(tokenizer: Any, texts: list[str]) -> list[Any]:
    return list(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings)


def _seam(before: _Piece, piece: _Piece) -> tuple[int, int] | None:
    """Numbers of a token of `before` and of the same token of `piece`; None if their overlap has other tokens in them.

    A quarter of the overlap is left out at both ends, where tokens may be others because the text is cut there.
    """
    shift, quarter = len(before.text) - _OVERLAP, _OVERLAP // 4
    ours = before.between(shift + quarter, shift + _OVERLAP - quarter)
    theirs = piece.between(quarter, _OVERLAP - quarter)
    if len(ours) < _SHARED or ours.start < before.first or before.run(ours, shift) != piece.run(theirs, 0):
        return None
    return ours.start, theirs.start


def _longer(tokenizer: Any, before: _Piece, piece: _Piece) -> _Piece | None:
    """Two pieces as one; None if it is long already, or its first tokens are not those where `before` was joined."""
    text = before.text + piece.text[_OVERLAP:]
    if len(text) > _MOST * _PIECE:
        return None
    (found,) = _encodings(tokenizer, [text])
    kept = before.first and before.first + _SHARED
    same = found.ids[:kept] == before.ids[:kept]
    return _Piece(text, found, found.ids, before.first) if same else None


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
    id in both. A token string in only one of them is an added control token (Qwen2.5 has 19 that Qwen2 lacks; Llama 3 and
    3.1 name some differently). Both tokenizers give the same ids for a sample text and for strings of the vocabulary.

    Raises:
        ModelError: The ids differ; the message names a string.
    """
    if fingerprint(one) == fingerprint(other):
        return
    ours, theirs = one.get_vocab(), other.get_vocab()
    control = _control_tokens(one) | _control_tokens(other)
    differ = (w for w in sorted(ours.keys() | theirs.keys()) if ours.get(w) != theirs.get(w))
    wrong = next((w for w in differ if (w in ours and w in theirs) or w not in control), None)
    found: list[Any] = [ours.get(wrong, "none"), theirs.get(wrong, "none")]
    if wrong is None:
        named = {ids[word] for ids in (ours, theirs) for word in control if word in ids}
        some = sorted(set(ours.values()) & set(theirs.values()) - named)[:: max(1, len(ours) // 4096)]
        for text in (SAMPLE, one.decode(some), *one.batch_decode([[token] for token in some])):
            ids = [words(text, add_special_tokens=False, verbose=False)["input_ids"] for words in (one, other)]
            if ids[0] != ids[1]:
                wrong, found = text, [each[:8] for each in ids]
                break
    if wrong is not None:
        raise ModelError(
            f"{where}: expected one tokenizer, found two: {wrong[:40]!r} has the ids {found[0]} and {found[1]}; use models "
            "of one family, or adapt the memory to the other vocabulary with `memdec adapt-vocab`"
        )


def _control_tokens(tokenizer: Any) -> set[str]:
    """Added tokens that do not occur in ordinary text: special tokens, and tokens written as `<...>`."""
    added = tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special or (str(token).startswith("<") and str(token).endswith(">"))}
