"""Passages and In-Context RAG, against BM25 in plain Python and loops over positions."""

import json
import math
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import CONTEXT, made_text, spec
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memdec.artefacts import artefact
from memdec.datastore import passages
from memdec.datastore.passages import Passages
from memdec.errors import ArtifactError, ConfigError, ModelError, ResourceError
from memdec.inference.icrag import IcRagForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.models import loading
from memdec.settings import FileCorpus, PassageSettings, RetrievalSettings, TokenizerSpec
from memdec.text import corpora, tokens

SETTINGS, PASSAGE = RetrievalSettings(query=8, every=4), 12
PROMPTS = ["The matrix", "The token 12 returns the", "A", "The vector 7 reads the index of size 4.\nThe"]
NEW = 7


@pytest.fixture(scope="module")
def passages_folder(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("icrag") / "passages"
    passages.run(token_folder, out, PassageSettings(passage=PASSAGE))
    return out


@pytest.fixture(scope="module")
def retriever(passages_folder: Path) -> Passages:
    return Passages(passages_folder)


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")


@pytest.fixture(scope="module")
def base_folder(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every answer hangs on all it has read: large random weights."""
    folder = tmp_path_factory.mktemp("icrag") / "base"
    base = loading.from_scratch(spec(24, seed=3), len(words), CONTEXT, words.eos_token_id)
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    base.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def from_folders(base: Path, passages: Path) -> IcRagForCausalLM:
    parts = Parts(base=base, passages=passages, retrieval=SETTINGS)
    model: IcRagForCausalLM = SYSTEMS["In-Context RAG"].build(parts)
    return model


@pytest.fixture(scope="module")
def model(base_folder: Path, passages_folder: Path) -> IcRagForCausalLM:
    return from_folders(base_folder, passages_folder)


def stream(folder: Path, split: str) -> list[int]:
    return [int(token) for token in np.load(folder / f"{split}.npy")]


# --- plain twins --------------------------------------------------------------------------------------------------


@cache
def plain_passages(folder: Path) -> list[list[int]]:
    """Passages of the train split: documents end with the last token of the stream."""
    ids = stream(folder, "train")
    found: list[list[int]] = []
    document: list[int] = []
    for token in ids:
        if token == ids[-1]:
            found += [document[i : i + PASSAGE] for i in range(0, len(document), PASSAGE)]
            document = []
        else:
            document.append(token)
    return found


def bm25(query: list[int], documents: list[list[int]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25 (Kamphuis et al. 2020) of every document."""
    counts, average = _counted(tuple(map(tuple, documents)))
    n, scores = len(documents), [0.0] * len(documents)
    for token in query:
        holding = [i for i, count in enumerate(counts) if token in count]
        weight = math.log(1 + (n - len(holding) + 0.5) / (len(holding) + 0.5))
        for i in holding:
            length = k1 * (1 - b + b * len(documents[i]) / average)
            scores[i] += weight * counts[i][token] / (counts[i][token] + length)
    return scores


@cache
def _counted(documents: tuple[tuple[int, ...], ...]) -> tuple[list[Counter[int]], float]:
    return [Counter(document) for document in documents], sum(map(len, documents)) / len(documents)


@cache
def plain_best(folder: Path, query: tuple[int, ...]) -> list[int]:
    documents = plain_passages(folder)
    scores = bm25(list(query), documents)
    best = max(scores)
    # Sums in float32 may order two that differ by less than its rounding the other way.
    return documents[next(i for i, score in enumerate(scores) if score >= best * (1 - 1e-7))] if best > 0 else []


@cache
def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain(base: Path, token_folder: Path, text: list[int], context: int = CONTEXT) -> np.ndarray:
    """p of the token after a text: one forward pass, float64."""
    start = len(text) // SETTINGS.every * SETTINGS.every
    passage = plain_best(token_folder, tuple(text[max(0, start - SETTINGS.query) : start])) if start else []
    end_of_stride = start + SETTINGS.every - 1
    kept = text[max(0, end_of_stride - (context - len(passage))) :]
    ids = torch.tensor([passage + kept])
    assert ids.shape[1] <= context
    with torch.no_grad():
        return plain_model(base)(ids).logits[0, -1].double().softmax(-1).numpy()


# --- passages -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5), st.booleans())
def test_passages_are_pieces_of_documents(ids: list[int], passage: int, marked: bool) -> None:
    text, edges = passages.cut(np.array(ids, np.uint16), 0 if marked else None, passage)
    pieces = [text[a:b].tolist() for a, b in pairwise(edges)]
    documents: list[list[int]] = [[]]
    for token in ids:
        if marked and token == 0:
            documents.append([])
        else:
            documents[-1].append(token)
    expected = [d[i : i + passage] for d in documents for i in range(0, len(d), passage)]
    assert pieces == expected


def test_passages_of_a_corpus(token_folder: Path, passages_folder: Path, retriever: Passages) -> None:
    expected = plain_passages(token_folder)
    text, edges = (np.load(passages_folder / f"{name}.npy") for name in ("tokens", "edges"))
    assert [text[a:b].tolist() for a, b in pairwise(edges)] == expected
    assert text.dtype == np.uint16
    assert {len(piece) for piece in expected} == set(range(1, PASSAGE + 1))
    assert len(expected) == retriever.facts["passages"]
    arrays = list(passages_folder.glob("*.npy"))
    assert len(arrays) == 5
    for path in arrays:
        np.load(path, allow_pickle=False)
    json.loads((passages_folder / "params.index.json").read_text())


def test_the_same_passages_again_do_nothing(token_folder: Path, passages_folder: Path, tmp_path: Path) -> None:
    before = (passages_folder / artefact.MANIFEST).stat().st_mtime_ns
    passages.run(token_folder, passages_folder, PassageSettings(passage=PASSAGE))
    assert (passages_folder / artefact.MANIFEST).stat().st_mtime_ns == before
    passages.run(token_folder, tmp_path / "p", PassageSettings(passage=PASSAGE))
    names = sorted(path.name for path in passages_folder.glob("*.*") if path.name != artefact.MANIFEST)
    for name in names:
        assert (tmp_path / "p" / name).read_bytes() == (passages_folder / name).read_bytes()


def test_without_ends_of_documents_passages_run_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(made_text(60, 3))
    plain = {"source": "files", "path": str(tmp_path / "text.txt"), "min_bytes": 100, "separator": "none"}
    corpora.run(FileCorpus.model_validate(plain), tmp_path / "c")
    tokens.run_tokenizer(TokenizerSpec(train_on=["c"], vocab_size=280), tmp_path / "w", [tmp_path / "c"])
    tokens.run_tokens(tmp_path / "w", tmp_path / "c", tmp_path / "t")
    passages.run(tmp_path / "t", tmp_path / "p", PassageSettings(passage=50))
    ids = np.load(tmp_path / "t" / "train.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "p" / "tokens.npy"), ids)
    np.testing.assert_array_equal(np.load(tmp_path / "p" / "edges.npy"), [*range(0, len(ids), 50), len(ids)])


def test_the_best_passage_is_that_of_textbook_bm25(token_folder: Path, retriever: Passages) -> None:
    text = stream(token_folder, "test")
    documents = plain_passages(token_folder)
    different = set()
    for t in range(4, 200, 4):
        query = text[max(0, t - 8) : t]
        found = retriever.best(query)
        scores = bm25(query, documents)
        assert found == plain_best(token_folder, tuple(query))
        assert scores[documents.index(found)] == pytest.approx(max(scores), rel=1e-6)
        different.add(tuple(found))
    assert len(different) > 20


def test_nothing_is_found_where_no_token_is_shared(token_folder: Path, retriever: Passages) -> None:
    known = {token for piece in plain_passages(token_folder) for token in piece}
    strangers = [token for token in range(300) if token not in known]
    assert stream(token_folder, "train")[-1] in strangers  # the end of a document is in no passage
    for query in (strangers[:5], [60_000], []):
        assert retriever.best(query) == []
    assert retriever.best([*strangers[:5], *plain_passages(token_folder)[3]]) != []


# --- the model ----------------------------------------------------------------------------------------------------


def test_every_position_equals_a_plain_loop(base_folder: Path, token_folder: Path, model: IcRagForCausalLM) -> None:
    """Texts longer than the context, too: 32 positions, of which a passage takes up to 12."""
    ids = torch.tensor(stream(token_folder, "test")[: 3 * 45]).reshape(3, 45)
    out = model(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.float32
    expected = np.array([[plain(base_folder, token_folder, row[: t + 1]) for t in range(45)] for row in ids.tolist()])
    np.testing.assert_allclose(out.logits.exp().numpy(), expected, atol=1e-5)
    nll = -np.log(expected[:, :-1][np.arange(3)[:, None], np.arange(44), ids[:, 1:]]).mean()
    assert out.loss.item() == pytest.approx(nll, rel=1e-5)
    without = plain_model(base_folder)(ids[:, :CONTEXT]).logits.softmax(-1).detach().numpy()
    np.testing.assert_allclose(expected[:, :3], without[:, :3], atol=1e-6)  # nothing to query with yet
    assert np.median(np.abs(expected[:, 3:CONTEXT] - without[:, 3:]).sum(-1)) > 0.5  # the passage decides


@pytest.mark.parametrize("keep", [1, 3, 6, torch.tensor([0, 9, 10, 17])], ids=str)
def test_kept_positions_padding_and_neighbours_in_the_batch_change_nothing(
    token_folder: Path, model: IcRagForCausalLM, keep: int | Tensor
) -> None:
    text = stream(token_folder, "test")
    rows = [text[:18], text[30:41], text[50:53]]
    whole = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = torch.full((2, 3, 18), 7)
        mask[:] = 0
        for number, row in enumerate(rows):
            span = slice(18 - len(row), 18) if side == "left" else slice(0, len(row))
            ids[number, span], mask[number, span] = torch.tensor(row), 1
        found = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
        kept = torch.arange(18)[slice(-keep, None) if isinstance(keep, int) else keep]
        for number, row in enumerate(rows):
            for at, column in enumerate(kept.tolist()):
                place = column - (18 - len(row) if side == "left" else 0)
                if 0 <= place < len(row):
                    torch.testing.assert_close(found[number, at], whole[number][place], atol=1e-5, rtol=1e-4)
                else:
                    torch.testing.assert_close(found[number, at].exp(), torch.full((300,), 1 / 300))


def test_with_empty_passages_it_is_the_base(
    base_folder: Path, retriever: Passages, token_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loading.load(base_folder).eval()
    model = IcRagForCausalLM(base, retriever, query=8, every=4)
    monkeypatch.setattr(retriever, "best", lambda *_: [])
    ids = torch.tensor([stream(token_folder, "test")[: CONTEXT - model.every]])  # room for the last stride
    for keep in (0, 3):
        expected = base(ids, logits_to_keep=keep).logits.log_softmax(-1)
        found = model(input_ids=ids, logits_to_keep=keep).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    how = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.5, "eos_token_id": None}
    assert torch.equal(model.generate(ids[:, :9], **how), base.generate(ids[:, :9], **how))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_in_a_left_padded_batch_equals_a_plain_loop(
    base_folder: Path, token_folder: Path, model: IcRagForCausalLM, words: Any, use_cache: bool
) -> None:
    """lm-eval asks for a cache; there is none, and the answer is that of whole texts."""
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    found = model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
    for prompt, row in zip(PROMPTS, found[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        ids = words.encode(prompt)
        for token in row:
            assert token == int(plain(base_folder, token_folder, ids).argmax())
            ids.append(token)
            if token == words.eos_token_id:
                break


def test_generation_goes_on_beyond_the_context(model: IcRagForCausalLM, words: Any) -> None:
    ids = words(PROMPTS[3], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=CONTEXT, do_sample=False, eos_token_id=None)
    assert out.shape[1] == ids["input_ids"].shape[1] + CONTEXT


def test_beams_and_sampling_go_along(
    base_folder: Path, token_folder: Path, model: IcRagForCausalLM, words: Any
) -> None:
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    found = model.generate(
        **batch, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    begin = batch["input_ids"].shape[1]
    for prompt, row, score in zip(PROMPTS, found.sequences[:, begin:].tolist(), found.sequences_scores, strict=True):
        ids, total = words.encode(prompt), 0.0
        for token in row:
            total += math.log(plain(base_folder, token_folder, ids)[token])
            ids.append(token)
        assert score.item() == pytest.approx(total, abs=1e-4)
    torch.manual_seed(0)
    drawn = model.generate(**batch, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
    assert drawn.shape == (2 * len(PROMPTS), begin + NEW)


def test_the_same_query_is_not_searched_again(model: IcRagForCausalLM, token_folder: Path) -> None:
    ids = stream(token_folder, "valid")[:30]
    model.retriever._remembered.cache_clear()
    for end in range(20, 30):  # as generation does
        model(input_ids=torch.tensor([ids[:end]]), logits_to_keep=1)
    assert model.retriever._remembered.cache_info().misses == 3  # strides 20, 24, 28


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": 0}, "expected at least 1 token, found 0 and 4"),
        ({"every": 0}, "expected at least 1 token, found 32 and 0"),
        ({"context": CONTEXT + 1}, rf"expected at most the positions of the base \({CONTEXT}\), found {CONTEXT + 1}"),
        (
            {"context": 15},
            "expected passages of at most 11 tokens for a context of 15, found 12; run `memdec passages`",
        ),
    ],
    ids=str,
)
def test_numbers_out_of_range(base_folder: Path, retriever: Passages, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IcRagForCausalLM(loading.load(base_folder), retriever, **changes)


def test_another_tokenizer_and_vocabulary(
    base_folder: Path, corpus_folder: Path, retriever: Passages, tmp_path: Path
) -> None:
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=320), tmp_path / "w", [corpus_folder])
    tokens.run_tokens(tmp_path / "w", corpus_folder, tmp_path / "t")
    passages.run(tmp_path / "t", tmp_path / "p", PassageSettings(passage=12))
    with pytest.raises(ArtifactError, match="expected one tokenizer, found two"):
        from_folders(base_folder, tmp_path / "p")
    with pytest.raises(ArtifactError, match="expected passages with tokens below the 300 of the base, found 3"):
        IcRagForCausalLM(loading.load(base_folder), Passages(tmp_path / "p"))
    with pytest.raises(ModelError, match="expected output heads of at least 301 tokens, found 300"):
        IcRagForCausalLM(loading.load(base_folder), retriever, n_vocab=301)


def test_a_cache_is_refused(base_folder: Path, model: IcRagForCausalLM) -> None:
    cache = model.base(torch.arange(5)[None], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="expected whole texts, found a cache of 5 tokens"):
        model(input_ids=torch.arange(2)[None], past_key_values=cache)


def test_too_little_memory(token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("memdec.artefacts.resources.free_memory", lambda: 1000)
        with pytest.raises(ResourceError, match=r"the BM25 index: expected .* of free memory, found 1 kB"):
            passages.run(token_folder, tmp_path / "p", PassageSettings(passage=12))
    with pytest.raises(ArtifactError, match="unfinished passages artefact"):
        Passages(tmp_path / "p")
