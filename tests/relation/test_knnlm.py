"""The kNN-LM as a model of transformers, against plain loops over the keys and against the stored-target path."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, spec, write_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memdec.artefacts import artefact
from memdec.datastore import index, targets
from memdec.datastore import keys as datastore
from memdec.datastore.keys import Datastore
from memdec.datastore.search import load
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, MemDecError, ModelError, NumericsError
from memdec.harness.scoring import score_labels, score_stream
from memdec.inference.knnlm import KnnLMForCausalLM
from memdec.inference.systems import SYSTEMS, Parts
from memdec.maths import sparse_rows
from memdec.maths.windows import windows
from memdec.models import loading
from memdec.models.keypoints import KeyPoint
from memdec.settings import DatastoreSettings, IndexSettings, KnnLMSettings, TargetSettings
from memdec.text import tokens

WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}
SETTINGS = KnnLMSettings(weight=0.3, temperature=0.5, neighbours=9)
PROMPTS = ["The matrix", "The token 12 returns the", "A", "The vector 7 reads the index of size 4.\nThe"]
NEW = 7


def from_folders(base: Path, store: Path, index_folder: Path, settings: KnnLMSettings) -> KnnLMForCausalLM:
    parts = Parts(base=base, datastore=(store,), index=index_folder, knn_lm=settings)
    model: KnnLMForCausalLM = SYSTEMS["kNN-LM"].build(parts)
    return model


@dataclass(frozen=True)
class Home:
    base: Path
    stream: Path
    store: Path
    index: Path

    def model(self, **changes: Any) -> KnnLMForCausalLM:
        settings = SETTINGS.model_copy(update=changes)
        return from_folders(self.base, self.store, self.index, settings)


def made(folder: Path, base: Path, stream: Path, **settings: Any) -> Home:
    datastore.run(base, stream, folder / "store", DatastoreSettings(**settings), **WINDOW)
    index.run(folder / "store", folder / "index", IndexSettings())
    return Home(base, stream, folder / "store", folder / "index")


@pytest.fixture(scope="module")
def home(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return made(tmp_path_factory.mktemp("knnlm"), base_folder, token_folder)


@pytest.fixture(scope="module")
def model(home: Home) -> KnnLMForCausalLM:
    return home.model()


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")


@cache
def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain_key(home: Home, ids: Tensor, key_point: str) -> Tensor:
    """Vector after the last token of a text, in the type of the keys."""
    lm, seen = plain_model(home.base), []
    handle = lm.transformer.h[-1].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        last = lm.transformer(ids[None]).last_hidden_state
    handle.remove()
    dtype = artefact.read(home.store, "datastore").settings["dtype"]
    return (last if key_point == "final" else seen[0])[0, -1].to(getattr(torch, dtype))


def plain_knn(home: Home, ids: Tensor, key_point: str = "mlp") -> np.ndarray:
    """p_kNN after the last token of a text: one forward pass, distances to all keys, float64."""
    values, query = np.load(home.stream / "train.npy"), plain_key(home, ids, key_point)
    keys = torch.from_numpy(np.load(home.store / "keys.npy")).view(query.dtype)
    sq_dist = ((keys.double() - query.double()) ** 2).sum(1).numpy()
    near = np.argsort(sq_dist, kind="stable")[: SETTINGS.neighbours]
    weight = np.exp(-(sq_dist[near] - sq_dist[near].min()) / SETTINGS.temperature)
    return np.bincount(values[near], weights=weight / weight.sum(), minlength=300)


def plain(home: Home, ids: Tensor, weight: float = SETTINGS.weight, key_point: str = "mlp") -> np.ndarray:
    """p after the last token of a text, float64."""
    with torch.no_grad():
        base = plain_model(home.base)(ids[None]).logits[0, -1].double().softmax(-1).numpy()
    return weight * plain_knn(home, ids, key_point) + (1 - weight) * base


def text(home: Home, n: int, split: str = "test") -> Tensor:
    return torch.from_numpy(np.load(home.stream / f"{split}.npy")[:n].astype(np.int64))


@pytest.mark.parametrize("settings", [{}, {"key_point": "final"}, {"dtype": "bfloat16"}, {"dtype": "float32"}], ids=str)
def test_every_position_equals_a_plain_loop(
    settings: dict[str, Any], home: Home, model: KnnLMForCausalLM, tmp_path: Path
) -> None:
    if settings:
        home = made(tmp_path, home.base, home.stream, **settings)
        model = home.model()
    ids = text(home, 14)
    found = model(input_ids=ids[None]).logits
    assert found.dtype == torch.float32
    assert found.shape == (1, 14, 300)
    expected = np.stack([plain(home, ids[: t + 1], key_point=settings.get("key_point", "mlp")) for t in range(14)])
    np.testing.assert_allclose(found[0].exp().double().numpy(), expected, atol=1e-5)
    assert np.abs(expected - [plain(home, ids[: t + 1], weight=0.0) for t in range(14)]).max() > 0.1


def test_the_same_windows_give_what_stored_targets_give(home: Home, model: KnnLMForCausalLM, tmp_path: Path) -> None:
    """`memdec evaluate` reads p_kNN of the test text from targets; here the same windows go through the model."""
    queries, stream = tmp_path / "queries", tokens.load_stream(home.stream, "test")
    datastore.run(home.base, home.stream, queries, DatastoreSettings(split="test"), **WINDOW)
    settings = TargetSettings(neighbours=SETTINGS.neighbours, temperature=SETTINGS.temperature)
    targets.run(home.store, home.index, home.stream, tmp_path / "t", settings, queries=[queries])
    digest = artefact.read(home.stream, "tokens").facts["sha256"]["test"]
    rows = TargetReader([tmp_path / "t"], digest).rows([(0, len(stream))])
    expected = sparse_rows.probability_of(rows, np.asarray(stream))
    parts, prefix = windows(len(stream), **WINDOW), tokens.prefix_id(tokens.load_tokenizer(str(home.base)))
    scores = score_stream(model, stream, parts, prefix, quiet=True)
    assert scores.memory is not None
    found = np.exp(scores.memory)
    np.testing.assert_allclose(found, expected, atol=2e-4)  # a key may round to the next float16
    assert np.median(np.abs(found - expected)) < 1e-7
    assert 0.05 < expected.mean() < 0.95


def test_scores_of_base_and_neighbours_are_those_of_their_mixture_at_any_weight(home: Home) -> None:
    """What lm-eval's requests are answered from: log-probabilities and greedy choices of a continuation."""
    model, ids = home.model(), text(home, 40).reshape(4, 10)
    base, found = model.log_probs(ids)
    assert base is not None
    assert found is not None
    for weight in (0.0, 0.1, 0.6, 0.95):
        model.set_weight(weight)
        mixed = model(input_ids=ids).logits
        for row in range(4):
            for labels in (ids[row, 1:], mixed[row, :-1].argmax(-1)):
                scores = score_labels(base[row, :-1], found[row, :-1], labels)
                expected = mixed[row, :-1].gather(1, labels[:, None])[:, 0]
                np.testing.assert_allclose(scores.log_p(weight), expected, atol=1e-5)
                assert scores.is_greedy(weight) == bool((mixed[row, :-1].argmax(-1) == labels).all())


def test_fault_23_the_temperature_reaches_scores_and_generation_alike(home: Home) -> None:
    ids = text(home, 12)
    found = []
    for temperature in (0.05, 50.0):
        model = home.model(temperature=temperature, weight=1.0)
        _, scored = model.log_probs(ids[None], which="memory")
        out = model.generate(
            ids[None],
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        assert scored is not None
        torch.testing.assert_close(out.logits[0].log_softmax(-1), scored[:, -1])
        found.append(scored)
    assert not torch.allclose(found[0].exp(), found[1].exp(), atol=1e-2)


def test_weight_0_is_the_base_to_the_bit_and_searches_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    model = home.model(weight=0.0)
    monkeypatch.setattr(model._searcher, "search", lambda *_, **__: pytest.fail("searched"))
    ids = text(home, 20)[None]
    expected = loading.load(home.base).eval()(ids).logits.log_softmax(-1)
    assert torch.equal(model(input_ids=ids).logits, expected)
    base, found = model.log_probs(ids, which="base")
    assert torch.equal(base, expected)
    assert found is None


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_repetition_penalty_acts_on_the_level_of_the_base(home: Home, words: Any, weight: float) -> None:
    lm, model = plain_model(home.base), home.model(weight=weight)
    how = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "repetition_penalty": 1.5,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    for prompt in PROMPTS:
        batch = words(prompt, return_tensors="pt")
        found = model.generate(**batch, **how)[0].tolist()
        if not weight:
            assert found == lm.generate(**batch, **how)[0].tolist()
            continue
        for n in range(batch["input_ids"].shape[1], len(found)):
            ids = torch.tensor(found[:n])
            with torch.no_grad():
                scores = lm(ids[None]).logits[0, -1].double().logsumexp(-1) + torch.tensor(plain(home, ids)).log()
            for token in set(found[:n]):
                scores[token] *= 1.5 if scores[token] < 0 else 1 / 1.5
            assert found[n] == int(scores.argmax())


def test_weight_1_is_the_neighbours_alone(home: Home) -> None:
    ids = text(home, 12)
    found = home.model(weight=1.0)(input_ids=ids[None]).logits[0]
    for t in range(12):
        np.testing.assert_allclose(found[t].exp().numpy(), plain_knn(home, ids[: t + 1]), atol=1e-5)
        assert int(torch.isfinite(found[t]).sum()) <= SETTINGS.neighbours
    assert torch.isneginf(found).any()


def test_only_kept_positions_that_are_no_padding_are_searched(
    home: Home, model: KnnLMForCausalLM, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[int, list[int]]] = []
    search = model._searcher.search
    monkeypatch.setattr(
        model._searcher,
        "search",
        lambda queries, k, *, inputs, released: (
            searched.append((len(queries), inputs.tolist())) or search(queries, k, inputs=inputs)
        ),
    )
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(**batch, position_ids=positions).logits
    assert searched.pop() == (int(mask.sum()), ids[mask.bool()].tolist())
    for keep in (1, 3, torch.tensor([0, ids.shape[1] - 2])):
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        part = model(**batch, position_ids=positions, logits_to_keep=keep).logits
        torch.testing.assert_close(part, whole[:, kept])
        assert searched.pop() == (int(mask[:, kept].sum()), ids[:, kept][mask[:, kept].bool()].tolist())
    assert not searched
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(ids.shape))


def test_blocks_of_the_search_change_nothing(
    home: Home, model: KnnLMForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = text(home, 60).reshape(3, 20)
    whole = model(input_ids=ids).logits
    monkeypatch.setattr("memdec.inference.knnlm._QUERIES", 7)
    assert torch.equal(model(input_ids=ids).logits, whole)


def test_a_text_in_pieces_with_a_cache_is_the_text(home: Home, model: KnnLMForCausalLM) -> None:
    ids = text(home, 24).reshape(2, 12)
    whole = model(input_ids=ids, labels=ids, use_cache=False)
    for how in ({"use_cache": True}, {}):
        cache, found = None, []
        for begin, end in ((0, 5), (5, 6), (6, 12)):
            out = model(input_ids=ids[:, begin:end], past_key_values=cache, **how)
            cache, found = out.past_key_values, [*found, out.logits]
        torch.testing.assert_close(torch.cat(found, 1), whole.logits, atol=1e-4, rtol=1e-4)
    nll = -whole.logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert whole.loss.item() == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize(
    "how", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_greedy_generation_in_a_left_padded_batch_equals_a_plain_loop(
    home: Home, model: KnnLMForCausalLM, words: Any, how: dict[str, Any]
) -> None:
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    found = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **how)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(PROMPTS, found.tolist(), strict=True):
        ids = words.encode(prompt)
        for token in row:
            assert token == int(plain(home, torch.tensor(ids)).argmax())
            ids.append(token)
            if token == words.eos_token_id:
                break


def test_beams_and_sampling_go_along(model: KnnLMForCausalLM, words: Any) -> None:
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    how = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    cached, plainly = (model.generate(**batch, **how, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plainly)
    torch.manual_seed(0)
    drawn = model.generate(**batch, max_new_tokens=NEW, do_sample=True, num_return_sequences=2)
    assert drawn.shape == (2 * len(PROMPTS), batch["input_ids"].shape[1] + NEW)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 10**6}, r"neighbours: expected at most \d+ .*, found 1000000"),
        ({"temperature": math.inf}, "temperature: .*finite number"),
        ({"weight": 1.5}, "expected a number from 0 .* found 1.5"),
    ],
    ids=str,
)
def test_numbers_out_of_range(home: Home, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        home.model(**changes)


def loaded(home: Home, base: Any, **changes: Any) -> KnnLMForCausalLM:
    store = Datastore(home.store)
    numbers = {"temperature": 1.0, "neighbours": 4} | changes
    return KnnLMForCausalLM(base, store, load(store, home.index), **numbers)


def tuned(folder: Path) -> Any:
    """A model that is not far from the one in the folder."""
    model = loading.load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    return model


def test_keys_of_another_model(home: Home, small_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected keys of .*small, found those of another model"):
        from_folders(small_folder, home.store, home.index, SETTINGS)
    with pytest.raises(ArtifactError, match="width 16 and 300 tokens, found keys of width 24 and 300 tokens"):
        loaded(home, loading.load(small_folder))
    torch.manual_seed(0)
    other = loading.from_scratch(spec(24), 300, CONTEXT, 0)
    with pytest.raises(ArtifactError, match=r"expected the keys of this model, found those of another one \(relative"):
        loaded(home, other)
    with pytest.raises(ArtifactError, match="found those of another one"):
        loaded(home, tuned(home.base))


def test_keys_of_one_window_are_compared_too(base_folder: Path, tmp_path: Path) -> None:
    """Its first input is the prefix, which the tokenizer of the store's model knows."""
    name = artefact.read(base_folder, "model").facts["tokenizer_sha256"]
    stream = write_tokens(tmp_path / "t", np.arange(20, dtype=np.uint16), name)
    home = made(tmp_path, base_folder, stream, dtype="float32")
    assert home.model().n_vocab == 300
    store = Datastore(home.store)
    assert len(windows(store.n, **WINDOW)) == 1
    with pytest.raises(ArtifactError, match="found those of another one"):
        store.check_model(KeyPoint(tuned(base_folder)))


def test_the_same_model_in_other_precision_is_the_same(home: Home, model: KnnLMForCausalLM) -> None:
    low = loaded(home, loading.load(home.base, dtype="bfloat16"), temperature=0.5, neighbours=9, weight=0.3)
    ids = text(home, 20)[None]
    found, expected = low(input_ids=ids).logits.exp(), model(input_ids=ids).logits.exp()
    assert 0 < (found - expected).abs().sum(-1).mean() / 2 < 0.1  # total variation


def test_a_vocabulary_that_does_not_fit(home: Home, model: KnnLMForCausalLM) -> None:
    with pytest.raises(ModelError, match="expected output heads of at least 301 tokens, found 300"):
        loaded(home, model.base, n_vocab=301)


def test_streamed_keys_give_the_neighbours_of_the_index(home: Home, model: KnnLMForCausalLM, tmp_path: Path) -> None:
    """An index of whole vectors with all cells searched has the exact distances, up to rounding."""
    datastore.run(home.base, home.stream, tmp_path / "s", DatastoreSettings(stored=False), **WINDOW)
    index.run(tmp_path / "s", tmp_path / "i", IndexSettings(kind="ivfflat", centroids=4, check_nprobe=[4]))
    streamed = from_folders(home.base, tmp_path / "s", tmp_path / "i", SETTINGS.model_copy(update={"nprobe": 4}))
    ids = torch.tensor([[5, 80, 200, 31, 7, 258, 99]])
    for own, expected in zip(streamed.log_probs(ids), model.log_probs(ids), strict=True):
        torch.testing.assert_close(own.exp(), expected.exp(), atol=1e-4, rtol=0)


def test_another_index_is_refused(home: Home, tmp_path: Path) -> None:
    other = made(tmp_path, home.base, home.stream, dtype="float32")
    with pytest.raises(ArtifactError, match=r"expected an index of .*, found one of other keys"):
        from_folders(home.base, home.store, other.index, SETTINGS)


def test_more_cells_than_the_index_has(home: Home, tmp_path: Path) -> None:
    index.run(home.store, tmp_path / "i", IndexSettings(kind="ivfflat", centroids=64, check_nprobe=[8]))
    with pytest.raises(ConfigError, match=r"nprobe: expected at most 64 .*, found 65"):
        from_folders(home.base, home.store, tmp_path / "i", SETTINGS.model_copy(update={"nprobe": 65}))
    some = from_folders(home.base, home.store, tmp_path / "i", SETTINGS)
    ids = text(home, 20)[None]
    torch.testing.assert_close(some(input_ids=ids).logits.exp().sum(-1), torch.ones(1, 20))


def test_a_query_beyond_the_range_of_the_keys_names_its_place(home: Home, model: KnnLMForCausalLM) -> None:
    def spoil(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        broken = args[0].clone()
        broken[1, -2, 0] = 1e6
        return (broken,)

    handle = model._point.module.register_forward_pre_hook(spoil)
    try:
        with pytest.raises(
            NumericsError, match="finite keys within the range of float16, found another one in row 1 at position 3"
        ):
            model._run(True, {"input_ids": text(home, 24).reshape(2, 12)}, None, logits_to_keep=5, use_cache=False)
    finally:
        handle.remove()


def test_a_wrapper_is_not_saved(model: KnnLMForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(MemDecError, match="found KnnLMForCausalLM; make it from its folders again"):
        model.save_pretrained(tmp_path / "m")
