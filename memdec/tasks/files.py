"""The list of all files under MEMDEC_DATA that the tasks read, with rows, columns, origin, and a hash to verify them.

A commit is that of the named file, not the newest one of its repository. The hashes were computed from complete
data sets where these were available. For the three files with `drawn`, only a random sample of rows was available, and
the hash covers that sample.
"""

from dataclasses import dataclass

from memdec.tasks import dcpmi_rows, github, perplexity, qa, verbalizers
from memdec.tasks.dcpmi_rows import SETS
from memdec.tasks.github import GitHubFile
from memdec.tasks.rows import HubRows

_MEDICINE = ("AdaptLLM/medicine-tasks", "68afee8d7be55335ba0e34deacc23120233161f6")
_FINANCE = ("AdaptLLM/finance-tasks", "48d43d2")
_LAW = ("AdaptLLM/law-tasks", "9833f318db11941509f2b56a29b423757f8acbd9")
_KNNLM_LIMITS = ("GSYfate/knnlm-limits", "d18ec8ac2296af27337700fd15b841b3f3517c43")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file under MEMDEC_DATA that a task reads.

    Attributes:
        file: Path under MEMDEC_DATA; the first folder is the task.
        rows: Number of rows of the complete file; None if none is published. The rows of a word list are its labels.
        columns: Fields that every row must have.
        origin: Source from which `fetch` downloads it; None if no public source has these rows.
        sha256: Hash of the fields that the task reads (`fetch.content`); None if no complete data set was available.
        drawn: Number of rows that the hash covers: a sample by `random.Random(0).sample`, in file order. None: all
            rows.
    """

    file: str
    rows: int | None
    columns: tuple[str, ...]
    origin: HubRows | GitHubFile | None = None
    sha256: str | None = None
    drawn: int | None = None

    @property
    def task(self) -> str:
        """The file's task, as in `--task`."""
        return self.file.split("/")[0]

    @property
    def publisher(self) -> str:
        """Data set on the Hub or repository on GitHub, as owner/name; empty for a file that the user provides."""
        if isinstance(self.origin, GitHubFile):
            return self.origin.repository
        return self.origin.path if self.origin is not None else ""


def _adaptllm(source: tuple[str, str], name: str, n_rows: int, *columns: str) -> DataFile:
    path, revision = source
    kinds = columns or ("input", "options", "gold_index")
    return DataFile(f"{name.lower()}/adaptllm_schema.jsonl", n_rows, kinds, HubRows(path, name, "test", revision))


def _zero_shot(
    name: str, n_rows: int, path: str, parse: github.Parser, sha256: str, drawn: int | None = None
) -> DataFile:
    kind = SETS[name.split("/")[0]]
    origin = GitHubFile(*_KNNLM_LIMITS, f"data/{path}", parse)
    return DataFile(f"{name}.jsonl", n_rows, (*kind.texts, kind.label), origin, sha256, drawn)


def _words(name: str, n_labels: int, commit: str, path: str, parse: github.Parser) -> DataFile:
    origin = GitHubFile("thunlp/OpenPrompt", commit, f"scripts/TextClassification/{path}", parse)
    return DataFile(f"verbalizers/{name}.json", n_labels, ("name", "words"), origin, verbalizers.SHA256[name])


FILES = (
    _adaptllm(_MEDICINE, "ChemProt", 500),
    _adaptllm(_MEDICINE, "MQP", 610),
    _adaptllm(_MEDICINE, "PubMedQA", 1000),
    _adaptllm(_MEDICINE, "RCT", 2000),
    _adaptllm(_MEDICINE, "USMLE", 1273),
    _adaptllm(_FINANCE, "FPB", 970),
    _adaptllm(_FINANCE, "FiQA_SA", 235),
    _adaptllm(_FINANCE, "Headline", 20547, "input", "options", "gold_index", "class_id"),
    _adaptllm(_FINANCE, "NER", 98, "input", "label"),
    _adaptllm(_FINANCE, "ConvFinQA", 1490, "input", "label"),
    _adaptllm(_LAW, "SCOTUS", 60),
    _adaptllm(_LAW, "CaseHOLD", 3549, "input_options", "output", "gold_index"),
    _adaptllm(_LAW, "UNFAIR_ToS", 1607),
    DataFile(f"{perplexity.WIKITEXT_FOLDER}/test.parquet", 4358, ("text",), perplexity.WIKITEXT["test"]),
    DataFile(f"{perplexity.WIKITEXT_FOLDER}/validation.parquet", 3760, ("text",), perplexity.WIKITEXT["validation"]),
    DataFile(
        "nq/validation.jsonl",
        3610,
        qa.FIELDS,
        qa.NQ,
        "1e0d7f4adfdcd8e18211325cf29682c9db0f9180629e70e7dc8f2940e5aac263",
        drawn=2000,
    ),
    DataFile(
        "hotpotqa/validation.jsonl",
        7405,
        qa.FIELDS,
        qa.HOTPOTQA,
        "1057662ad563d4adcb8e3bf7c52e0160cb1cf42d440fc72c0cbbd2aacd77a34d",
        drawn=2000,
    ),
    _zero_shot(
        "sst2/test",
        1821,
        "sst2/test.tsv",
        github.sst_lines,
        "fc961e4b9a64aa70b1611f46e99764d46eb15032966ce71bdd8ec0f5aa76f695",
    ),
    _zero_shot(
        "sst2/validation",
        872,
        "sst2/dev.tsv",
        github.sst_lines,
        "22bf65df5387f0d28f8f0ea147cb4ea88e212ca2a529b7d8d30bebcf5b9289e5",
    ),
    _zero_shot(
        "mr/test",
        2000,
        "mr/test.csv",
        github.csv_records,
        "e38efc0a2425bee0d56215706b0d505e8585bc28b8e694415eba02cdbae2402f",
    ),
    DataFile("mr/validation.jsonl", None, ("text", "label")),
    _zero_shot(
        "cr/test",
        2000,
        "cr/test.jsonl",
        github.json_lines,
        "941b0d06482b68bc797b453f7c1067d0e5b421139d6db594b66b7c6806ed6c0c",
    ),
    _zero_shot(
        "rt/test",
        1066,
        "rotten_tomatoes/test.jsonl",
        github.json_lines,
        "c86bf9dbc8e7d77bd9221eaccbc09d7bc0ccfa7e4f5e80d7240fb50122894f51",
    ),
    DataFile("rt/validation.jsonl", None, ("input", "output")),
    _zero_shot(
        "hyp/test",
        516,
        "hyp/test.jsonl",
        github.json_lines,
        "ef2755995e5be4ed2e5d2f982bd3fc25c12c6072d1030b7c236fc7197d8af6b6",
    ),
    DataFile(
        "hyp/validation.jsonl",
        65,
        ("text", "label"),
        sha256="eb4f7cc69b742c844a9e80dfe5b872cfb8cb2de21e93146de92e0388a8b4e9d8",
    ),
    _zero_shot(
        "cb/test",
        56,
        "cb/dev.jsonl",
        github.json_lines,
        "5d811c4be98ce266db95f40003ad09b27580af837ea1b7edd37fb3810102c5f6",
    ),
    DataFile(
        "cb/validation.jsonl",
        250,
        ("premise", "hypothesis", "label"),
        sha256="a9e82f686bd95d02634bf1a05fc12701b2d47dd4d2a74321236c079082ea0b71",
    ),
    _zero_shot(
        "rte/test",
        277,
        "rte/val.jsonl",
        github.json_lines,
        "3da2b26a536e04dff2ec9a5a69ba99ee90e3091c99b44e569cb48f891e3c74d5",
    ),
    DataFile("rte/validation.jsonl", 2490, ("premise", "hypothesis", "label")),
    _zero_shot(
        "agn/test",
        7600,
        "agn/test.csv",
        github.csv_records,
        "a935361340c2792973f9b228933438621fb5cb6c61606a125f3fc245e91c8ebb",
        drawn=2000,
    ),
    DataFile("agn/validation.jsonl", None, ("Class Index", "Title", "Description")),
    DataFile(
        "yahoo/test.jsonl",
        dcpmi_rows.YAHOO_TEST,
        (*SETS["yahoo"].texts, SETS["yahoo"].label),
        SETS["yahoo"].hub["test"],
    ),
    _words(
        "sentiment",
        2,
        "b4bb62751707ab85312ff3c49495725edb6d2c1c",
        "imdb/knowledgeable_verbalizer.txt",
        github.word_lines("negative", "positive"),
    ),
    _words(
        "agn",
        4,
        "b4bb62751707ab85312ff3c49495725edb6d2c1c",
        "agnews/knowledgeable_verbalizer.txt",
        github.word_lines("World", "Sports", "Business", "Sci/Tech"),
    ),
    _words(
        "yahoo",
        10,
        "8772795a0850a733c5544f32e62ec0d5075ed1ee",
        "yahoo_answers_topics/knowledgeable_verbalizer.json",
        github.word_object,
    ),
)
