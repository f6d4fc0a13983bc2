"""Small stand-ins for all that config/paper.yaml takes from elsewhere: models in the layout of the Hub, and corpora.

    python -m tests.paper_shapes FOLDER/shapes

`config/paper-shapes.yaml` puts them in the places of the real ones. Weights are random. What can trip the rules is as in
the real models: Qwen2 has fewer control tokens than Qwen2.5 and heads with rows for no token; the Llamas call a reserved
token differently; small models have tied embeddings and large ones have not; the weights are in several files.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.making import made_text

TOKENS = 400  # of each family, without control tokens
WIDTHS = {  # a hundredth of the real ones, in whole heads
    "GPT2-small": 8, "GPT2-medium": 12, "GPT2-large": 16, "GPT2-xl": 20,
    "Qwen2-0.5B": 8, "Qwen2-1.5B": 16, "Qwen2-7B": 32, "Qwen2-72B": 48,
    "Qwen2.5-0.5B": 8, "Qwen2.5-1.5B": 16, "Qwen2.5-3B": 24, "Qwen2.5-7B": 32, "Qwen2.5-14B": 40, "Qwen2.5-32B": 40,
    "Qwen2.5-72B": 48,
    "Llama3-8B": 32, "Llama3-70B": 48, "Llama3.1-8B": 32, "Llama3.1-70B": 48, "Llama3.2-1B": 16, "Llama3.2-3B": 24,
}  # fmt: skip
_TIED = ("-0.5B", "-1.5B", "2.5-3B", "Llama3.2-1B", "Llama3.2-3B")


def main(folder: Path) -> None:
    """Make the models and corpora in a folder; the same ones every time."""
    texts = {name: made_text(n, seed) for seed, (name, n) in enumerate(_DOCUMENTS.items())}
    _corpora(folder, texts)
    words = {family: _tokenizer(family, list(texts.values())) for family in _CONTROL}
    for name, width in WIDTHS.items():
        family = name.partition("-")[0]
        torch.manual_seed(len(name) + width)
        model = _model(name, width, len(words["Qwen2.5"]) if family.startswith("Qwen") else len(words[family]))
        model.save_pretrained(folder / name, max_shard_size="60KB")
        words[family].save_pretrained(folder / name)


_DOCUMENTS = {"wikitext": 700, "bio": 700, "fin": 700, "law": 700, "questions": 700}
_CONTROL = {
    "GPT2": ["<|endoftext|>"],
    "Qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "Qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"],
    "Llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"],
    "Llama3.1": ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"],
    "Llama3.2": ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"],
}


def _corpora(folder: Path, texts: dict[str, str]) -> None:
    documents = {name: text.split("\n\n") for name, text in texts.items()}
    data = folder / "data"
    for name in ("wikitext", "law", "questions", "fin"):
        (data / name).mkdir(parents=True, exist_ok=True)
    rows = documents["wikitext"]
    for split, part in (("train", rows[140:]), ("validation", rows[70:140]), ("test", rows[:70])):
        pd.DataFrame({"text": part}).to_parquet(data / "wikitext" / f"{split}-00000-of-00001.parquet")
    for name, field in (("law", "txt"), ("questions", "text")):
        pd.DataFrame({field: documents[name]}).to_parquet(data / name / "train-00000-of-00001.parquet")
    pd.DataFrame({"ROW_ID": range(len(documents["bio"])), "TEXT": documents["bio"]}).to_csv(
        data / "bio.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents["fin"])
    (data / "fin" / "news.jsonl").write_text(lines)


def _tokenizer(family: str, texts: list[str]) -> Any:
    """A byte-level BPE with the control tokens of a family; models of one company share the ordinary tokens."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    vocab = TOKENS + {"G": 0, "Q": 20, "L": 40}[family[0]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    control = _CONTROL[family]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token=control[0],
        eos_token=control[1] if family.startswith("Llama") else control[0],
        additional_special_tokens=control[1:],
    )


def _model(name: str, width: int, n_tokens: int) -> Any:
    tied = name.endswith(_TIED) or name.startswith("GPT2")
    if name.startswith("GPT2"):
        config = GPT2Config(
            vocab_size=n_tokens, n_positions=1024, n_embd=width, n_layer=2, n_head=width // 4,
            bos_token_id=n_tokens - 1, eos_token_id=n_tokens - 1,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    kind, config_of = (Qwen2ForCausalLM, Qwen2Config) if name.startswith("Qwen") else (LlamaForCausalLM, LlamaConfig)
    padded = n_tokens + 11 if name.startswith("Qwen") else n_tokens  # Qwen's heads have rows for no token
    return kind(
        config_of(
            vocab_size=padded, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=width // 4, num_key_value_heads=width // 8, max_position_embeddings=2048,
            tie_word_embeddings=tied, bos_token_id=n_tokens - 3, eos_token_id=n_tokens - 2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
