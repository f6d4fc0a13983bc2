"""What `memdec explain` tells of a text, against plain passes of the models and the targets of the very same text."""

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, plain_scores
from rich.console import Console

from memdec import cli
from memdec.artefacts import artefact
from memdec.datastore import index, target_rows, targets
from memdec.datastore import keys as datastore
from memdec.errors import ArtifactError, ConfigError
from memdec.inference import token_reports
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.token_reports import Guess, Neighbours, Prediction, TokenReport
from memdec.maths import sparse_rows
from memdec.results import explain, table6
from memdec.settings import Case, DatastoreSettings, ExplainSettings, IndexSettings, TargetSettings, TokenizerSpec
from memdec.text import tokens

ALPHA, STRIDE = 0.4, CONTEXT // 2
WINDOW = {"context": CONTEXT, "stride": STRIDE}
NASTY = 'The <b>matrix</b> & "window"\n\n\treturns </script><!--  naïve “中”  token\r\n of   size 4. {{data}}'


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> Any:
    return tokens.load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="module")
def mixture(base_folder: Path, small_folder: Path) -> MemDecForCausalLM:
    return MemDecForCausalLM.from_parts(base_folder, [small_folder], [ALPHA])


@pytest.fixture(scope="module")
def keys(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datastores of train and valid by the base, and an index over the first."""
    folder = tmp_path_factory.mktemp("keys")
    for split in ("train", "valid"):
        datastore.run(base_folder, token_folder, folder / split, DatastoreSettings(split=split), **WINDOW)
    index.run(folder / "train", folder / "index", IndexSettings())
    return {name: folder / name for name in ("train", "valid", "index")}


@pytest.fixture(scope="module")
def nasty(mixture: MemDecForCausalLM, words: Any) -> list[TokenReport]:
    return token_reports.explain(mixture, words, words.encode(NASTY), **WINDOW, top=4)


# --- numbers ------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_plain_passes_over_sliding_windows(
    mixture: MemDecForCausalLM, words: Any, token_folder: Path, base_folder: Path, small_folder: Path
) -> None:
    ids = tokens.load_stream(token_folder, "test")[:75].tolist()
    found = token_reports.explain(mixture, words, ids, **WINDOW, top=1)
    assert [(report.position, report.token) for report in found] == list(enumerate(ids))
    prefix = tokens.prefix_id(words)
    base, memory = (plain_scores(folder, ids, prefix, STRIDE) for folder in (base_folder, small_folder))
    joint = np.log(ALPHA * np.exp(memory) + (1 - ALPHA) * np.exp(base))
    for name, expected in (("base", base), ("memory", memory), ("joint", joint)):
        np.testing.assert_allclose([getattr(report, name).log_p for report in found], expected, atol=1e-4)
        assert explain.summary(found)[name] == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    np.testing.assert_allclose([report.memory_over_base for report in found], memory - base, atol=2e-4)
    np.testing.assert_allclose([report.gain for report in found], joint - base, atol=2e-4)
    assert {report.knn for report in found} == {None}


def test_the_most_probable_tokens(mixture: MemDecForCausalLM, words: Any) -> None:
    ids = words.encode("The matrix 3 returns the token")
    found = token_reports.explain(mixture, words, ids, **WINDOW, top=5)
    text = torch.tensor([[tokens.prefix_id(words), *ids[:-1]]])
    with torch.no_grad():
        rows = {"base": mixture.base, "memory": mixture.memories[0], "joint": mixture}
        probs = {name: model(input_ids=text).logits[0].double().softmax(-1) for name, model in rows.items()}
    for report in found:
        for name, p in probs.items():
            best = p[report.position].topk(5)
            told = getattr(report, name)
            assert [guess.token for guess in told.top] == best.indices.tolist()
            np.testing.assert_allclose([guess.p for guess in told.top], best.values, rtol=1e-4)
            assert told.p == pytest.approx(float(p[report.position, report.token]), rel=1e-4)


@pytest.mark.parametrize(("alpha", "same"), [(0.0, "base"), (1.0, "memory")])
def test_all_weight_on_one_model(mixture: MemDecForCausalLM, words: Any, alpha: float, same: str) -> None:
    mixture.set_weights([alpha])
    try:
        found = token_reports.explain(mixture, words, words.encode("The kernel reads"), **WINDOW)
    finally:
        mixture.set_weights([ALPHA])
    assert all(report.joint == getattr(report, same) for report in found)
    assert all(report.base != report.memory for report in found)


def test_neighbours_are_those_of_targets(
    mixture: MemDecForCausalLM, words: Any, keys: dict[str, Path], token_folder: Path, tmp_path: Path
) -> None:
    settings = TargetSettings(neighbours=20, temperature=3.0)
    targets.run(keys["train"], keys["index"], token_folder, tmp_path / "t", settings, queries=keys["valid"])
    ids = tokens.load_stream(token_folder, "valid")[: CONTEXT + 3 * STRIDE]  # the first windows of the whole text
    sha = artefact.read(token_folder, "tokens").facts["sha256"]["valid"]
    rows = target_rows.TargetReader([tmp_path / "t"], sha).rows([(0, len(ids))])
    asked = Neighbours([keys["train"]], keys["index"], ExplainSettings(neighbours=20, temperature=3.0), words)
    found = token_reports.explain(mixture, words, ids.tolist(), **WINDOW, top=1000, neighbours=asked)
    told = [report.knn for report in found if report.knn is not None]
    np.testing.assert_allclose(
        [each.p for each in told], sparse_rows.probability_of(rows, np.array(ids, int)), atol=1e-5
    )
    assert 0.1 < np.mean([each.p > 0 for each in told]) < 1  # both kinds are there
    for row, each in enumerate(told):
        span = slice(rows.indptr[row], rows.indptr[row + 1])
        assert {guess.token: guess.p for guess in each.top} == pytest.approx(
            dict(zip(rows.tokens[span].tolist(), rows.probs[span].tolist(), strict=True)), abs=1e-5
        )
        assert [guess.p for guess in each.top] == sorted((guess.p for guess in each.top), reverse=True)


def test_a_streamed_datastore_is_searched_with_the_distances_of_its_index(
    mixture: MemDecForCausalLM, words: Any, base_folder: Path, token_folder: Path, tmp_path: Path
) -> None:
    datastore.run(base_folder, token_folder, tmp_path / "d", DatastoreSettings(stored=False), **WINDOW)
    index.run(tmp_path / "d", tmp_path / "i", IndexSettings(kind="ivfflat", centroids=4, check_nprobe=[4]))
    asked = Neighbours([tmp_path / "d"], tmp_path / "i", ExplainSettings(neighbours=9, nprobe=4), words)
    found = token_reports.explain(mixture, words, words.encode("The matrix 3"), **WINDOW, neighbours=asked, top=9)
    assert all(sum(g.p for g in report.knn.top) == pytest.approx(1) for report in found if report.knn is not None)


def test_tokens_spell_the_text(nasty: list[TokenReport]) -> None:
    spelled = [report.text for report in nasty]
    assert all(spelled)
    assert "\ufffd" in spelled  # the vocabulary has no whole token for these characters
    assert {"ï", "“", "中", "”"} <= {text for text in spelled if len(text) == 1}
    assert "".join(spelled).replace("\ufffd", "") == NASTY


def test_alternatives_are_spelled_as_they_would_stand_there(words: Any) -> None:
    spell = token_reports._speller(words)
    the, of = words.encode("The matrix of")[0], words.encode("The of")[-1]
    first, second, third = words.encode("中")
    assert words.decode([of]) == spell((the,), of)
    assert [spell((the,), first), spell((the, first), second), spell((the, first, second), third)] == ["�", "�", "中"]
    assert spell((first, second), the) == words.decode([the])  # leaves the character unfinished


# --- terminal -----------------------------------------------------------------------------------------------------


def example(text: str = " a\n", knn: Prediction | None = None) -> TokenReport:
    base = Prediction(math.log(0.25), [Guess(9, "\t", 0.5), Guess(7, text, 0.25)])
    memory = Prediction(math.log(0.5), [Guess(7, text, 0.5)])
    return TokenReport(3, 7, text, base, memory, Prediction(math.log(1e-5), [Guess(8, "x" * 40, 0.123456)]), knn)


def printed(report: TokenReport, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(explain.table([report]))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_terminal_shows_all_numbers_in_80_columns() -> None:
    head, own, *best = printed(example(knn=Prediction(-math.inf, [Guess(5, "\x1b", 1.0)])), 80)
    assert head.split() == ["token", "base", "%", "memory", "%", "kNN", "%", "joint", "%", "gain"]
    assert own.split() == ["·a↵", "25.00", "50.00", "0.00", "<0.01", "-10.13"]
    assert best[0].split()[:6] == ["50.00", "⇥", "50.00", "·a↵", "100.00", "\\x1b"]
    assert best[0].endswith("12.35 xxxxxxx…")
    assert best[1].split() == ["25.00", "·a↵"]
    assert max(map(len, (head, own, *best))) <= 80


def test_without_a_datastore_there_is_no_such_column() -> None:
    assert "kNN" not in printed(example(), 80)[0]


# --- page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, the text within #text, and the data, of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data = "", ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(dict(attrs).get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        last = self.open.pop()
        assert last == tag or any(tag == name and attrs.get("id") == last for name, attrs in self.tags)

    def handle_data(self, data: str) -> None:
        self.text += data if "text" in self.open else ""
        self.data += data if self.open[-1:] == ["data"] else ""


def test_the_page_holds_the_text_and_the_numbers(nasty: list[TokenReport]) -> None:
    page = Page(explain.page(nasty, {"Base": "<a&b>", "Memory": "{{tokens}}"}))
    assert page.open == []
    assert page.text.replace("\ufffd", "") == NASTY.replace("\r", "")
    spans = [attrs for tag, attrs in page.tags if tag == "span" and "data-i" in attrs]
    assert [int(attrs["data-i"] or -1) for attrs in spans] == list(range(len(nasty)))
    for attrs, report in zip(spans, nasty, strict=True):
        assert attrs["class"] == ("more" if report.memory.p > report.base.p else "less")
        depth = min(1, abs(math.log(report.memory.p / report.base.p)) / 3)
        assert float((attrs["style"] or "").removeprefix("--d:")) == pytest.approx(depth, abs=0.0051)
    assert 0 < sum(attrs["class"] == "more" for attrs in spans) < len(spans)
    data = json.loads(page.data)
    assert [each["text"] for each in data] == [report.text for report in nasty]
    for each, report in zip(data, nasty, strict=True):
        assert list(each["told"]) == ["base", "memory", "joint"]
        assert each["told"]["joint"]["p"] == report.joint.p
        assert each["told"]["memory"]["top"] == [
            {"token": guess.token, "text": guess.text, "p": guess.p} for guess in report.memory.top
        ]
        assert (each["m"], each["g"]) == (report.memory_over_base, report.gain)


def test_the_page_is_whole_and_harmless(nasty: list[TokenReport]) -> None:
    source = explain.page(nasty, {"Base": "<img src=x onerror=alert(1)>", "Memory": "{{tokens}}"})
    page = Page(source)
    assert "<dd>&lt;img src=x onerror=alert(1)&gt;</dd><dt>Memory</dt><dd>{{tokens}}</dd>" in source
    assert not {"img", "b", "link", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.tags for name in attrs)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch|innerHTML", source)
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv"))
    assert (policy or "").startswith("default-src 'none';")


def test_a_token_that_would_end_the_data(nasty: list[TokenReport]) -> None:
    text = "</script><script>alert(1)</script><!--<script>"  # one token of some vocabularies
    page = Page(explain.page([example(text), *nasty], {}))
    assert json.loads(page.data)[0]["text"] == text
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert page.text.startswith(text)


def test_white_space_is_marked_and_kept() -> None:
    page = explain.page([example(text) for text in ("  ", " a\n", "\t", "\r\n")], {})
    assert '><i class="s"> </i><i class="s"> </i></span><' in page
    assert '> a<i class="n"></i>\n</span><' in page
    assert '><i class="t">\t</i></span><' in page
    assert '><i class="r"></i><i class="n"></i>\n</span></div>' in page


# --- the command --------------------------------------------------------------------------------------------------


def memdec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["memdec", "explain", *map(str, given)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_the_command(
    base_folder: Path, small_folder: Path, keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = "The matrix 3 returns the token.\r\n" * 8  # longer than the context
    (tmp_path / "text.txt").write_bytes(text.encode())
    given = ["--base", base_folder, "--memory", small_folder, "--datastore", keys["train"], "--index", keys["index"]]
    given += ["--file", tmp_path / "text.txt", "--html", tmp_path / "page.html", "--top", 2, "--neighbours", 8]
    code, out, err = memdec(monkeypatch, capsys, *given)
    assert code == 0, err
    source = (tmp_path / "page.html").read_text()
    page = Page(source)
    data = json.loads(page.data)
    assert "".join(each["text"] for each in data) == text
    assert len(data) > CONTEXT
    assert {len(told["top"]) for each in data for name, told in each["told"].items() if name != "kNN"} == {2}
    assert [line for line in out.splitlines() if line.startswith(f"{len(data)} tokens, alpha 0.6; perplexity: base ")]
    assert out.splitlines()[0].split()[::2] == ["token", "%", "%", "%", "%"]
    assert len(re.findall(r"^\S", out, re.MULTILINE)) == len(data) + 3  # the head, a line per token, what is said after
    assert f"<dt>Alpha</dt><dd>0.6</dd><dt>Tokens</dt><dd>{len(data)}</dd>" in source
    assert f"<dd>{CONTEXT} tokens, {STRIDE} scored</dd>" in source


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected a text, found an empty one; give it as an argument or by --file"),
        (["text", "--file", "f"], "expected a text or --file, found both"),
        (["--file", "nowhere"], "nowhere: expected a file with UTF-8 text, found"),
        (["text", "--index", "i"], "expected datastore and index, found an index alone; give --datastore, too"),
        (["text", "--datastore", "d"], "expected datastore and index, found a datastore alone; give --index, too"),
        (["text", "--alpha", "2"], "alpha': Input should be less than or equal to 1"),
        (["text", "--context", str(2 * CONTEXT)], f"context: expected at most {CONTEXT} tokens (positions of the models), found"),
        (["text", "--context", "8", "--stride", "9"], "need 1 <= stride <= context, found stride 9, context 8"),
        (["text", "--datastore", "TRAIN", "--index", "INDEX", "--neighbours", "1000000"], "neighbours: expected at most"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    given: list[str], message: str, base_folder: Path, small_folder: Path, keys: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folders = {"TRAIN": keys["train"], "INDEX": keys["index"]}
    models = ["--base", base_folder, "--memory", small_folder]
    code, _, err = memdec(monkeypatch, capsys, *models, *(folders.get(word, word) for word in given))
    lines = [line for line in err.splitlines() if line and "it/s]" not in line]
    assert code == 2, err
    assert len(lines) == 1
    assert message in lines[0]


def test_what_does_not_belong_together_is_refused(
    mixture: MemDecForCausalLM, words: Any, base_folder: Path, small_folder: Path, keys: dict[str, Path],
    corpus_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ArtifactError, match=r"expected an index of .*, found one of other keys"):
        Neighbours([keys["valid"]], keys["index"], ExplainSettings(neighbours=5), words)
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=290), tmp_path / "other", [corpus_folder])
    other = tokens.load_tokenizer(str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match="with the models: expected one tokenizer, found two"):
        Neighbours([keys["train"]], keys["index"], ExplainSettings(neighbours=5), other)
    alone = MemDecForCausalLM.from_models(mixture.base, [], [])
    for model, ids in ((alone, [1]), (mixture, [])):
        with pytest.raises(ConfigError, match=rf"found {len(ids)} tokens and {len(model.memories)} memories"):
            token_reports.explain(model, words, ids, **WINDOW)


# --- Table 6 ------------------------------------------------------------------------------------------------------


def test_a_marked_word_has_the_product_of_its_tokens(
    mixture: MemDecForCausalLM, words: Any, keys: dict[str, Path]
) -> None:
    settings = ExplainSettings(neighbours=16, nprobe=1)
    neighbours = Neighbours([keys["train"]], keys["index"], settings, words)
    for text, word in (("The [[matrix]] returns.", "matrix"), ("The kernel of [[size 4]]. It", "size 4")):
        before = text.split("[[")[0]
        ids = words.encode(before + word)
        n = len(ids) - len(words.encode(before.rstrip()))
        row = table6.probabilities(Case(text=text), mixture, words, neighbours)
        assert (row["target"], row["tokens"]) == (word, n)
        inputs = torch.tensor([[tokens.prefix_id(words), *ids[:-1]]])
        for model, name in ((mixture.base, "BaseLM"), (mixture.memories[0], "MemDec")):
            log_p = model(inputs).logits[0].double().log_softmax(-1)
            each = [log_p[i, ids[i]] for i in range(len(ids) - n, len(ids))]
            assert row[name] == pytest.approx(100 * float(torch.stack(each).sum().exp()), rel=1e-5)
        assert 0 <= row["kNN"] <= 100
        behind = table6.probabilities(Case(text=f"{text} More"), mixture, words, neighbours)
        assert [behind[name] for name in ("MemDec", "kNN", "BaseLM")] == [
            row[name] for name in ("MemDec", "kNN", "BaseLM")
        ]
    with pytest.raises(ConfigError, match=f"at most {CONTEXT} tokens"):
        table6.probabilities(Case(text="word " * 99 + "[[end]]"), mixture, words, neighbours)


@pytest.mark.parametrize(
    "text", ["none", "[[first]] word", "two [[of]] them [[here]]", "an [[ ]] empty one", "open [[one"]
)
def test_a_case_marks_one_word(text: str) -> None:
    with pytest.raises(ValueError, match=r"one word between \[\[ and \]\]"):
        Case(text=text)
