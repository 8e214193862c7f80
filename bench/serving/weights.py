"""Random weights of a shape, drawn on its device: they cost the same as trained ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peers.model import make_tokenizer
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaForCausalLM

from serving.shape import Shape

SEED = 20240
# Written last.
TOKENIZER = "tokenizer.json"


def adapter_names(count: int) -> tuple[str, ...]:
    return tuple(f"a{index:04d}" for index in range(count))


def make(folder: Path, shape: Shape, device: str) -> None:
    """Makes what is missing of folder/base and folder/adapters/a0000 ..."""
    if not (folder / "base" / TOKENIZER).exists():
        print("making the base", flush=True)
        make_base(folder / "base", shape, device)
    missing = [
        (index, name)
        for index, name in enumerate(adapter_names(shape.adapters[-1]))
        if not (folder / "adapters" / name).exists()
    ]
    if missing:
        print(f"making {len(missing)} adapters", flush=True)
        make_adapters(folder / "adapters", shape, missing, device)
    if device == "cuda":
        # The server, another process, wants the memory.
        torch.cuda.empty_cache()


def make_base(folder: Path, shape: Shape, device: str) -> None:
    """One file a layer, and one for what is around the layers."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    places: dict[str, str] = {}
    for file, shapes in files(shape):
        weights = {}
        for name, size in shapes.items():
            if name.endswith("norm.weight"):
                weights[name] = torch.ones(size, dtype=dtype)
            else:
                drawn = torch.randn(size, generator=generator, device=device, dtype=dtype)
                weights[name] = drawn.mul_(size[-1] ** -0.5).cpu()
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shape.config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    make_tokenizer(shape.config.vocab_size).save_pretrained(folder)


def files(shape: Shape) -> Iterator[tuple[str, dict[str, torch.Size]]]:
    """The names of the files, and what is in them."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(shape.config).state_dict().items()}
    parts = ["around", *(f"layers.{layer}." for layer in range(shape.config.num_hidden_layers))]
    for number, part in enumerate(parts, 1):
        held = {
            name: size
            for name, size in shapes.items()
            if (part in name if number > 1 else ".layers." not in name)
        }
        yield f"model-{number:05d}-of-{len(parts):05d}.safetensors", held


def make_adapters(folder: Path, shape: Shape, numbered: list[tuple[int, str]], device: str) -> None:
    """Each is another stretch of one pool of random numbers: drawing them all takes minutes."""
    sizes = target_sizes(shape)
    longest = max(shape.ranks) * sum(a + b for a, b in sizes.values())
    generator = torch.Generator(device).manual_seed(SEED)
    pool = torch.randn(
        longest + numbered[-1][0] + 1,
        generator=generator,
        device=device,
        dtype=getattr(torch, shape.dtype),
    )
    pool = pool.mul_(0.02).cpu()
    for index, name in numbered:
        rank = shape.ranks[index % len(shape.ranks)]
        weights, start = {}, index
        for module, (size_in, size_out) in sizes.items():
            for part, size in (("A", (rank, size_in)), ("B", (size_out, rank))):
                count = size[0] * size[1]
                key = f"base_model.model.{module}.lora_{part}.weight"
                weights[key] = pool[start : start + count].view(size)
                start += count
        write_adapter(folder / name, shape, rank, weights)


def target_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each module that adapters change."""
    return {
        name.removesuffix(".weight"): (size[1], size[0])
        for _, shapes in files(shape)
        for name, size in shapes.items()
        if name.removesuffix(".weight").endswith(shape.targets)
    }


def write_adapter(folder: Path, shape: Shape, rank: int, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(shape.targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
