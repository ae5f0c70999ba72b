"""Decoded weights as a plain Hugging Face checkpoint, which transformers loads without qbench."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from qbench.assets import ModelAsset
from qbench.engine.loop import FinishedBlock
from qbench.engine.sinks import with_head
from qbench.engine.source import StreamSource
from qbench.errors import AssetError, SpecError
from qbench.export.artifact import describe
from qbench.models.load import load_tokenizer
from qbench.store.records import Artifact

INDEX = "model.safetensors.index.json"


def export_memory(folder: Path, model: nn.Module, asset: ModelAsset) -> Artifact:
    """Write `model`, which holds the decoded weights, as transformers saves any model.

    Raises SpecError where `folder` is the model's own: it would be replaced.
    """
    _refuse_own_folder(folder, asset)
    with _fresh(folder) as partial:
        model.save_pretrained(partial)
        load_tokenizer(asset).save_pretrained(partial)
    return describe(folder)


class StreamExport:
    """Writes a checkpoint shard by shard while blocks come by: one file per block, one for everything else."""

    def __init__(self, folder: Path, source: StreamSource, asset: ModelAsset) -> None:
        _refuse_own_folder(folder, asset)
        self.folder, self.source, self.asset = folder, source, asset
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.partial.mkdir(parents=True, exist_ok=True)  # a resumed pass goes on in it

    def receive(self, finished: FinishedBlock) -> None:
        tensors = {
            f"{self.source.prefix}.{finished.index}.{name}": parameter.detach().cpu().contiguous()
            for name, parameter in finished.block.named_parameters()
        }
        save_file(tensors, self.partial / _block_file(finished.index), metadata={"format": "pt"})

    def close(self, head: Tensor | None = None) -> Artifact:
        """Write what lies outside the blocks (`head` in place of the model's own), the index, configuration and
        tokenizer; then put all in place.

        Raises AssetError where a block never came by: the pass went on behind a block that was not exported.
        """
        written = {path.name for path in self.partial.glob("block-*.safetensors")}
        missing = [index for index in range(self.source.count) if _block_file(index) not in written]
        if missing:
            raise AssetError(
                f"export.path={self.folder}: block {missing[0]} and {len(missing) - 1} more are missing, because the "
                "run went on from a point that was not exported; run it again"
            )
        with self.source.shell() as model, with_head(model, head):
            outside = {
                name: parameter.detach().cpu().contiguous()
                for name, parameter in model.named_parameters(remove_duplicate=True)
                if not name.startswith(f"{self.source.prefix}.")
            }
            save_file(outside, self.partial / "outside.safetensors", metadata={"format": "pt"})
            model.config.save_pretrained(self.partial)
            if model.can_generate():
                model.generation_config.save_pretrained(self.partial)
        load_tokenizer(self.asset).save_pretrained(self.partial)
        _write_index(self.partial)
        _put_in_place(self.partial, self.folder)
        return describe(self.folder)


def _block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _refuse_own_folder(folder: Path, asset: ModelAsset) -> None:
    if folder.resolve() == asset.path.resolve():
        raise SpecError("export.path", folder, "a folder other than the one that the model is read from")


class _fresh:
    """A folder beside `folder` that takes its place when the block ends without an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial.{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            _put_in_place(self.partial, self.folder)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _write_index(folder: Path) -> None:
    from safetensors import safe_open

    where: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                where[name] = path.name
                total += _bytes(tensors.get_tensor(name))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
    (folder / INDEX).write_text(text)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
