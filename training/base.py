"""Trains the base model of the demo from nothing, to repeat its input.

python training/base.py
"""

import torch
from examples import batches
from loop import exact_match, fit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from deltamux.demo.tasks import Task, unseen_inputs, weights_path

SEED = 20
STEPS = 2500
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3

PAD, BEGIN, END = "<pad>", "<s>", "</s>"

# The model sees only the last thing the user said, as it would see a plain prompt.
CHAT_TEMPLATE = r"{{ bos_token + messages[-1]['content'] + '\n' }}"

REPEAT = Task("repeat", "the input again", str)


def main() -> None:
    torch.manual_seed(SEED)
    folder = weights_path() / "base"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(
        folder
    )  # before it is used, as it keeps the last padding it was asked
    model = LlamaForCausalLM(architecture(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"base: {model.num_parameters():,} parameters")
    fit(model, batches(tokenizer, REPEAT.answer, BATCH_SIZE, SEED), STEPS, PEAK_LEARNING_RATE)
    model.half().float()  # what is measured is what is stored
    right = exact_match(model, tokenizer, REPEAT.answer, unseen_inputs(REPEAT, 200))
    print(f"base: {right:.1%} of unseen inputs repeated to the letter")
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32  # stored in half the bytes, and run as it was trained
    model.config.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens, then one token a byte; every text begins with BEGIN."""
    specials = (PAD, BEGIN, END)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*specials, *characters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Small enough to train on a laptop, with grouped heads as its big relatives have."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


if __name__ == "__main__":
    main()
