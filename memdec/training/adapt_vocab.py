"""Stage `adapt-vocab`: give a trained memory the embeddings of another tokenizer (paper, section 4.3).

The layers do not change. The input embedding and the LM head get one row for each token of the new tokenizer. The
result is then trained with `memdec train` like any other model. `random` initialises all rows at random, which is what
the paper states. `copy` (ours) keeps the rows of tokens that have the same spelling in both tokenizers, compared as
bytes. Each other token gets the mean of the rows of the pieces into which the old tokenizer splits it.

Inputs: a memory (or model) folder and a tokenizer folder. Output: a model folder with the new tokenizer.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memdec.artefacts import artefact
from memdec.errors import ModelError
from memdec.models import loading
from memdec.settings import AdaptSettings
from memdec.text import tokens

Spelling = tuple[bool, bytes]  # whether a token is special, and the text that it represents


def run(memory: Path, tokenizer: Path, out: Path, settings: AdaptSettings, *, seed: int) -> None:
    """Write the memory with the embeddings of another tokenizer.

    Args:
        memory: Folder of kind `memory` or `model`, or a plain model folder.
        tokenizer: Folder of the new tokenizer.
        out: Folder to make, of kind `model`.
        settings: How to initialise the new rows.
        seed: Seed of random rows.

    Raises:
        ModelError: The tokens of a tokenizer cannot be read, the memory has fewer rows than its tokenizer has tokens,
            or transformers would load another tokenizer than the new one from the result.
    """
    old, new = loading.known(memory, "memory", "model"), artefact.read(tokenizer, "tokenizer")
    plain = {**settings.model_dump(mode="json"), "seed": seed}
    inputs = {"memory": old.recipe, "tokenizer": new.recipe}
    with artefact.building(out, "model", plain, inputs, stage="adapt-vocab") as build:
        if build is None:
            return
        words = tokens.load_tokenizer(str(tokenizer))
        model, n_vocab = loading.load(memory), tokens.n_ids(words)
        copied = averaged = 0
        if settings.init == "random":
            rows = random_rows(model, n_vocab, seed)
        else:
            before = tokens.load_tokenizer(str(memory))
            parts, copied = sources(before, words)
            averaged = n_vocab - copied
            rows = mean_rows(model, parts, tokens.n_ids(before))
        replace_rows(model, rows, n_vocab)
        _set_ids(model, words)
        model.save_pretrained(out)
        _save_tokenizer(words, out, new.facts["sha256"])
        build.facts.update(
            {"from": old.recipe},
            copied=copied,
            averaged=averaged,
            vocab_size=n_vocab,
            parameters=loading.n_parameters(model),
            tokenizer_sha256=new.facts["sha256"],
            source_tokenizer_sha256=old.facts["tokenizer_sha256"],
        )


# --- tokens -------------------------------------------------------------------------------------------------------


def spellings(words: Any) -> dict[int, Spelling]:
    """The text that each token represents, as bytes, by id in ascending order.

    Byte-level BPE writes each byte as a character of its own alphabet; SentencePiece writes a space as `▁` and single
    bytes as `<0xNN>`. Added tokens are written as they are.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    alphabet, added = _alphabet(words), words.added_tokens_decoder
    bytes_of = None if alphabet is None else {character: byte for byte, character in alphabet.items()}
    found = {}
    for token, number in sorted(words.get_vocab().items(), key=lambda item: item[1]):
        if number in added:
            found[number] = bool(added[number].special), added[number].content.encode()
        else:
            found[number] = False, _bytes(token, bytes_of)
    return found


def _alphabet(words: Any) -> dict[int, str] | None:
    """Byte -> character of a byte-level tokenizer; None for SentencePiece.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(words, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{words.name_or_path}: expected a fast tokenizer (tokenizer.json), found {type(words).__name__}; convert it"
        )
    byte_level = "ByteLevel" in f"{backend.pre_tokenizer!r} {backend.decoder!r}"
    return dict(bytes_to_unicode()) if byte_level else None


def _bytes(token: str, bytes_of: dict[str, int] | None) -> bytes:
    if bytes_of is not None:
        known = all(character in bytes_of for character in token)
        return bytes(bytes_of[character] for character in token) if known else token.encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def sources(old: Any, new: Any) -> tuple[list[list[int]], int]:
    """The old ids whose rows make the row of each new id, and the number of new rows that are copies of one old row.

    EOS, BOS and PAD are matched by their role. Other special tokens only match special tokens.
    """
    ours, theirs = spellings(old), spellings(new)
    by_spelling = {spelling: number for number, spelling in ours.items()}  # `A` has a larger id than `<0x41>` and wins
    roles = {
        getattr(new, role): getattr(old, role)
        for role in ("pad_token_id", "bos_token_id", "eos_token_id")  # if a token has several roles, the last one wins
        if getattr(old, role) is not None
    }
    alphabet = _alphabet(old)
    found: list[list[int]] = [[] for _ in range(tokens.n_ids(new))]
    copied = 0
    for number, spelling in theirs.items():
        match = roles.get(number, by_spelling.get(spelling))
        found[number] = _pieces(old, spelling[1], alphabet, by_spelling) if match is None else [match]
        copied += match is not None
    return found, copied


def _pieces(old: Any, text: bytes, alphabet: dict[int, str] | None, by_spelling: dict[Spelling, int]) -> list[int]:
    """The old tokens that spell a new token; an empty list if the old tokenizer cannot spell it.

    The old merges are applied without the old pre-tokenizer, because that works on whole characters and may add a
    space, while a token can be a part of a character. On GPT-2, Qwen2.5 and Llama 3 this gives the same pieces as the
    whole tokenizer for all but 0 to 3 % of the tokens.
    """
    if alphabet is not None:
        written = "".join(alphabet[byte] for byte in text)
    else:
        try:
            written = text.decode().replace(" ", "▁")
        except UnicodeDecodeError:
            singles = [by_spelling.get((False, bytes([byte]))) for byte in text]
            return [each for each in singles if each is not None]
    pieces = old.backend_tokenizer.model.tokenize(written) if written else []
    return [piece.id for piece in pieces if piece.id != old.unk_token_id]


# --- rows ---------------------------------------------------------------------------------------------------------


def tables(model: Any) -> list[nn.Parameter]:
    """The parameters with one row for each token: the embedding, a head that is not tied to it, and the head's bias."""
    head = model.get_output_embeddings()
    found = (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None))
    return list({id(each): each for each in found if each is not None}.values())


@torch.no_grad()
def mean_rows(model: Any, parts: list[list[int]], n_old: int) -> list[Tensor]:
    """New tables in which row i is the mean of the old rows `parts[i]`, or of all `n_old` rows if `parts[i]` is empty.

    Raises:
        ModelError: The model has fewer rows than its tokenizer has tokens.
    """
    flat = torch.tensor([number for part in parts for number in part], dtype=torch.long)
    lengths = torch.tensor([len(part) for part in parts])
    found = []
    for table in tables(model):
        if len(table) < n_old:
            raise ModelError(
                f"{model.name_or_path}: expected a row for each of the {n_old} tokens of its tokenizer, found {len(table)}; "
                "check the folder"
            )
        old: Float[Tensor, "V D"] = table.reshape(len(table), -1)
        rows = F.embedding_bag(flat, old, lengths.cumsum(0) - lengths, mode="mean")
        rows[lengths == 0] = old[:n_old].mean(0)  # without the padding rows at the end of the table
        found.append(rows.reshape(len(parts), *table.shape[1:]))
    return found


def random_rows(model: Any, n_vocab: int, seed: int) -> list[Tensor]:
    """New tables of normally distributed numbers with the model's initial standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    return [torch.empty(n_vocab, *table.shape[1:]).normal_(0, std, generator=generator) for table in tables(model)]


@torch.no_grad()
def replace_rows(model: Any, rows: list[Tensor], n_vocab: int) -> None:
    """Resize the model's vocabulary and copy the new tables into it; tied tables stay tied."""
    model.resize_token_embeddings(n_vocab, mean_resizing=False)
    for table, new in zip(tables(model), rows, strict=True):
        table.copy_(new)


def _set_ids(model: Any, words: Any) -> None:
    """Set the ids of the new tokenizer's special tokens in the model's configuration.

    PAD is set there only if it is a token of its own, because the embedding of `pad_token_id` gets no gradient.
    """
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    apart = words.pad_token_id not in (words.bos_token_id, words.eos_token_id)
    model.config.pad_token_id = words.pad_token_id if apart else None


# --- the tokenizer beside the model -------------------------------------------------------------------------------


def _save_tokenizer(words: Any, out: Path, sha256: str) -> None:
    """Save the tokenizer into the model's folder such that `AutoTokenizer` loads this tokenizer.

    For some families, such as qwen2, transformers 5 takes the tokenizer's class from the model and ignores the folder's
    `tokenizer_class`. The text is then split in another way. An `auto_map` entry prevents this; transformers ignores
    the entry itself unless remote code is trusted.

    Raises:
        ModelError: transformers loads another tokenizer nevertheless.
    """
    words.save_pretrained(out)
    if _loads_as(out, sha256):
        return
    file = out / "tokenizer_config.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    artefact.write_json(file, {**plain, "auto_map": {"AutoTokenizer": [None, "tokenizer.json"]}})
    if not _loads_as(out, sha256):
        raise ModelError(
            f"{out}: expected transformers to load tokenizer {sha256[:8]} from this folder, found that it loads another "
            "one; use a tokenizer of the model's own class"
        )


def _loads_as(folder: Path, sha256: str) -> bool:
    return tokens.fingerprint(tokens.load_tokenizer(str(folder))) == sha256
