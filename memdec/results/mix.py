"""Stage `mix`: the perplexity of a memory, or of p_kNN in its place, beside a base, from the scores of both. No torch.

Output: as `memdec evaluate` writes it: `scores/`, `records.json`, and `forgetting.json` if general corpora were scored.
"""

from pathlib import Path

from memdec.artefacts import artefact
from memdec.errors import ArtifactError
from memdec.harness.scores import TokenScores
from memdec.results import scores
from memdec.results.records import VALID, Records, Text, write
from memdec.settings import DEFAULT_MEMORY, MixSettings


def run(
    base: Path, scored: Path, out: Path, settings: MixSettings, *, name: str = DEFAULT_MEMORY, seed: int = 0
) -> None:
    """Choose the weight on valid, and measure the mixture on test.

    Args:
        base: Evaluation of the base alone, by `memdec evaluate`.
        scored: Scores of the memory or of p_kNN on the same texts, by `memdec score`.
        out: Output folder.
        settings: Candidates for the weights, and resamples.
        name: Name of the memory in the records.
        seed: Seed of the run; it is written into the records.

    Raises:
        ArtifactError: The two have not read the same tokens in the same windows, or the memory's probabilities are over
            entries that the base lacks.
    """
    theirs, ours = artefact.read(base, "evaluation"), artefact.read(scored, "scores")
    _check(base, theirs, scored, ours)
    is_memory, control = ours.facts["rows"] is not None, ours.settings.get("control")
    plain = {
        **settings.model_dump(mode="json", include={"resamples", "alphas" if is_memory else "lambdas"}),
        **{each: value for each, value in ours.settings.items() if each != "control"},
        "seed": seed,
        "system": "MemDec",
        "memory": name,
        **({} if control is None else {"control": control}),
    }
    inputs = {**theirs.inputs, **ours.inputs, "base evaluation": theirs.recipe, "scores": ours.recipe}
    with artefact.building(out, "evaluation", plain, inputs) as build:
        if build is None:
            return
        corpus = ours.facts["corpus"]
        texts: list[Text] = [VALID, ("test", None), *(("test", on) for on in ours.facts["also"])]
        bases = {text: scores.token_scores(base, *text)[0] for text in texts}
        seconds = {text: scores.alone(scored, *text) for text in texts}

        def records(manifest: artefact.Manifest, rate: float | None = None) -> Records:
            device, precision = manifest.facts["device"], manifest.settings["precision"]
            stride = int(manifest.settings["stride"])
            return Records(build.path, str(base), corpus, settings, stride, seed, device, precision, rate)

        found = records(theirs).alone("base", bases)
        mixed = records(ours, ours.facts["learning_rate"])
        if is_memory:
            both = {text: TokenScores(bases[text].base, each[scores.MEMORY]) for text, each in seconds.items()}
            made = mixed.mixed(name, both)
        else:
            names = {tau: scores.tau(tau) for tau in ours.settings["temperatures"]}
            by_tau = {
                text: {tau: TokenScores(bases[text].base, each[at]) for tau, at in names.items()}
                for text, each in seconds.items()
            }
            made = mixed.with_neighbours(by_tau, name)
        if control is not None:
            made = [record | {"control": control} for record in made]
        write(build.path, corpus, found + made)
        known = {**theirs.facts["corpora_sha256"], **ours.facts["corpora_sha256"]}
        build.facts.update(methods=["base", "MemDec"], corpora_sha256=known, device=ours.facts["device"])


def _check(base: Path, theirs: artefact.Manifest, scored: Path, ours: artefact.Manifest) -> None:
    """Check that a base and a memory have read the same texts, as the same tokens, in the same windows."""
    wanted = {"system": "base", "context": ours.settings["context"], "stride": ours.settings["stride"]}
    texts = {each: recipe for each, recipe in ours.inputs.items() if each == "corpus" or each.startswith("also ")}
    found = {**theirs.settings, **theirs.inputs}
    differ = [each for each, value in {**wanted, **texts}.items() if found.get(each) != value]
    if differ:
        raise ArtifactError(
            f"{base}: expected the evaluation of a base alone on the texts of {scored}, found another {', '.join(differ)}; "
            "run memdec evaluate without a system, with the same --corpus, --also, --context and --stride"
        )
    if any(theirs.facts["ids"].get(text) != ids for text, ids in ours.facts["ids"].items()):
        raise ArtifactError(
            f"{scored}: expected scores of the tokens that {base} has read, found other ids; base and memory need one "
            "tokenizer: see memdec adapt-vocab"
        )
    rows = ours.facts["rows"]
    if rows is not None and rows > theirs.facts["rows"]:
        raise ArtifactError(
            f"{scored}: expected at most {theirs.facts['rows']} entries, those of the head of {base}, found {rows}; run "
            "memdec evaluate with --base and --memory, which gives the rest of the probability to the others"
        )
