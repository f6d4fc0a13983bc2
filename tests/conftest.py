"""Shared fixtures: artefacts made by the real stages in seconds, without mocks."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from making import CONTEXT, made_text, other_text, spec

from memdec.settings import SPLITS, FileCorpus, TokenizerSpec, TrainSettings
from memdec.text import corpora, tokens

torch.set_num_threads(1)
# No deadline: the first call of a compiled loop compiles it.
settings.register_profile("core", deadline=None, max_examples=25)
settings.register_profile("whole", deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Use fewer hypothesis examples in the core suite (`-m "not slow"`)."""
    settings.load_profile("core" if config.option.markexpr == "not slow" else "whole")


@pytest.fixture(autouse=True)
def few_tasks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own 14,000 task files take ten seconds to index: only slow tests have them."""
    manager = sys.modules.get("lm_eval.tasks.manager")
    if manager is None or request.node.get_closest_marker("slow"):
        return
    own, build = Path(str(manager.__file__)).parent, manager.TaskIndex.build

    def others(paths: Iterable[Path], **how: Any) -> dict[str, Any]:
        found: dict[str, Any] = build([path for path in paths if Path(path) != own], **how)
        return found

    monkeypatch.setattr(manager.TaskIndex, "build", staticmethod(others))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real corpora, models and task rows."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEMDEC_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set MEMDEC_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose test split has another grammar, so tuning on the wrong split changes the result."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = {"train": made_text(210, 0), "valid": made_text(15, 1), "test": other_text(25, 2)}
    for split, text in texts.items():
        (folder / f"{split}.txt").write_text(text)
    paths = {split: str(folder / f"{split}.txt") for split in SPLITS}
    corpora.run(FileCorpus(source="files", paths=paths, min_bytes=200), folder / "made")
    return folder / "made"


@pytest.fixture(scope="session")
def tokenizer_folder(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=300), out, [corpus_folder])
    return out


@pytest.fixture(scope="session")
def token_folder(corpus_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "made"
    tokens.run_tokens(tokenizer_folder, corpus_folder, out)
    return out


@pytest.fixture(scope="session")
def short_tokens(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of that stream, in the first grammar alone: for tests that train, search or count all of it many times."""
    home = tmp_path_factory.mktemp("short")
    for split, n_documents, seed in (("train", 60, 60), ("valid", 10, 10), ("test", 10, 11)):
        (home / f"{split}.txt").write_text(made_text(n_documents, seed))
    paths = {split: str(home / f"{split}.txt") for split in SPLITS}
    corpora.run(FileCorpus(source="files", paths=paths, min_bytes=200), home / "corpus")
    tokens.run_tokens(tokenizer_folder, home / "corpus", home / "tokens")
    return home / "tokens"


@pytest.fixture(scope="session")
def base_folder(tokenizer_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "base"
    from memdec.training import stages  # takes seconds to import, and many tests do not need it

    stages.run_pretrain(spec(24), tokenizer_folder, token_folder, out, context=CONTEXT)
    return out


@pytest.fixture(scope="session")
def small_folder(tokenizer_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer; tests use it as a memory and to start training one."""
    from memdec.training import stages

    out = tmp_path_factory.mktemp("models") / "small"
    stages.run_pretrain(spec(16, seed=1), tokenizer_folder, token_folder, out, context=CONTEXT)
    return out


@pytest.fixture(scope="session")
def dapt_folder(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, trained further: much better on valid, little better on test, so the best alpha differs."""
    from memdec.training import stages

    out = tmp_path_factory.mktemp("models") / "dapt"
    settings = TrainSettings(epochs=0.5, learning_rate=1e-2)
    stages.run_finetune(base_folder, token_folder, out, settings, context=CONTEXT, seed=0)
    return out
