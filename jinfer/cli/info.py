"""`jinfer info`: a description of a model folder."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from jinfer.cli.json_text import json_text
from jinfer.cli.screen import binary_size, counted, show
from jinfer.shipped import find_shipped
from jinfer.weights.describe import ModelDescription, describe
from jinfer.weights.hub import resolve_model


def info(args: Namespace) -> int:
    """Prints the description of one model; returns 0."""
    folder = find_shipped(args.model) or resolve_model(args.model)
    description = describe(folder)
    if args.json:
        show(json_text({"model": str(args.model), **asdict(description)}) + "\n")
        return 0
    lines = {"model": args.model, **_lines(folder, description)}
    for name, said in lines.items():
        show(f"{name:<14}{said}\n")
    return 0


def _lines(folder: Path, description: ModelDescription) -> dict[str, str]:
    num_tensors = sum(description.stored_dtypes.values())
    dtypes = ", ".join(f"{count} {name}" for name, count in description.stored_dtypes.items())
    kv_bytes = description.kv_bytes_per_token.items()
    end_ids = ", ".join(map(str, description.eos_token_ids))
    return {
        "folder": str(folder),
        "architecture": f"{description.architecture} (family {description.family})",
        "parameters": f"{description.num_parameters:,}",
        "weights": f"{binary_size(description.file_bytes)} on disk, "
        f"{counted(num_tensors, 'tensor')}: {dtypes}",
        "context": counted(description.max_position_embeddings, "token"),
        "KV cache": ", ".join(f"{size:,} bytes per token in {name}" for name, size in kv_bytes),
        "tokenizer": description.tokenizer,
        "end tokens": end_ids or "none",
    }
