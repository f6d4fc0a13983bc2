"""Write models of the paper's shapes with random weights, to measure speed: `python -m benchmarks.shapes OUT [--tiny]`.

OUT/base has the shape of Qwen2.5-1.5B, OUT/memory that of Qwen2.5-0.5B (the pair of the paper's Figure 4), in bfloat16:
3.1 and 1.0 GB. Both have the same artificial byte-level tokenizer, with as many entries as the real one: the mixture is
computed over the tokens of the tokenizer, not over the padded head.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model with tied embeddings; of the `vocabulary` rows of its head, `words` are tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 151_936
    words: int = 151_665
    positions: int = 32_768


PAIR = {"base": Shape(1536, 28, 12, 2, 8960), "memory": Shape(896, 24, 14, 2, 4864)}
TINY = {"base": Shape(64, 3, 4, 2, 128, 320, 300, 128), "memory": Shape(32, 2, 2, 1, 64, 320, 300, 128)}


def tokenizer(n_words: int) -> Any:
    """A tokenizer of all bytes, EOS, and tokens that occur in no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, EOS, *(f"<unused{i}>" for i in range(n_words - len(letters) - 1))]
    plain = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def make(out: Path, shapes: dict[str, Shape]) -> None:
    """Write a folder for each shape; the weights are made on the GPU if there is one."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    for seed, (name, shape) in enumerate(shapes.items()):
        words = tokenizer(shape.words)
        config = Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.positions,
            tie_word_embeddings=True,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
        torch.manual_seed(seed)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(out / name)
        words.save_pretrained(out / name)
        print(f"{out / name}: {model.num_parameters():,} parameters", flush=True)


def main() -> None:
    """Make both folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    args = parser.parse_args()
    make(args.out, TINY if args.tiny else PAIR)


if __name__ == "__main__":
    main()
