"""An exported model is a plain checkpoint: transformers alone loads it and computes the same."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qbench.assets import resolve_model
from qbench.engine.passes import run_pass
from qbench.engine.source import MemorySource, StreamSource
from qbench.errors import AssetError, SpecError
from qbench.export.hf import StreamExport, export_memory
from qbench.models.load import load_config, load_model, meta_model
from tests.engine.helpers import recipe, tiny_asset, tiny_windows

CPU = torch.device("cpu")
GROUP, BITS = 32, 3


def _from_memory(folder, algorithm="gptq"):
    asset = tiny_asset()
    source = MemorySource(load_model(asset, dtype=torch.float32, device=CPU))
    result = run_pass(source, recipe(algorithm, bits=BITS, group_size=GROUP), tiny_windows(4, 64))
    with result.weights.inside(source.model) as model:
        artifact = export_memory(folder, model, asset)
        with torch.no_grad():
            logits = model(tiny_windows(2, 50, skip=3000)).logits
    return artifact, logits


def _stream_source():
    asset = tiny_asset()
    return StreamSource(asset.path, meta_model(load_config(asset)), torch.float32, CPU)


def _from_stream(folder, algorithm="gptq"):
    source = _stream_source()
    export = StreamExport(folder, source, tiny_asset())
    wanted = recipe(algorithm, bits=BITS, group_size=GROUP) if algorithm else None
    run_pass(
        source,
        wanted,
        tiny_windows(4, 64),
        keep_weights=False,
        receive=export.receive,
    )
    return export.close()


@torch.no_grad()
def _logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(tiny_windows(2, 50, skip=3000)).logits


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_both_exports_load_and_compute_the_quantized_models_logits(algorithm, tmp_path):
    _, expected = _from_memory(tmp_path / "memory", algorithm)
    _from_stream(tmp_path / "stream", algorithm)
    assert torch.equal(_logits(tmp_path / "memory"), expected)
    assert torch.equal(_logits(tmp_path / "stream"), expected)


def test_transformers_alone_loads_an_export_with_its_tokenizer(tmp_path):
    for name, write in (("memory", _from_memory), ("stream", _from_stream)):
        write(tmp_path / name)
        own, original = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / name, tiny_asset().path))
        assert own("def f(x):")["input_ids"] == original("def f(x):")["input_ids"]
    program = (
        "import sys, warnings\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "    assert model.lm_head.weight is model.model.embed_tokens.weight\n"
        "    print(model.dtype)\n"
        "assert not any(name.startswith('qbench') for name in sys.modules)\n"
    )
    folders = [str(tmp_path / name) for name in ("memory", "stream")]
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.float32"] * 2


@pytest.mark.parametrize("write", [_from_memory, _from_stream])
def test_decoded_weights_have_at_most_two_to_the_bits_levels_per_group(write, tmp_path):
    write(tmp_path / "out")
    tensors = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    original = load_file(tiny_asset().path / "model.safetensors")
    assert tensors.keys() == original.keys()
    quantized = 0
    for name, value in tensors.items():
        if "layers" in name and value.ndim == 2:
            quantized += 1
            assert max(len(group.unique()) for group in value.view(-1, GROUP)) == 2**BITS
            assert not torch.equal(value, original[name].float())
        else:
            assert torch.equal(value, original[name].float()), name
    assert quantized == 4 * 7


def test_a_stream_is_written_shard_by_shard_and_put_in_place_at_the_end(tmp_path):
    source, folder = _stream_source(), tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("an earlier export")
    export, seen = StreamExport(folder, source, tiny_asset()), []

    def receive(finished):
        export.receive(finished)
        seen.append(len(list(tmp_path.rglob("block-*.safetensors"))))
        assert (folder / "config.json").read_text() == "an earlier export"

    run_pass(source, recipe("rtn"), None, keep_weights=False, receive=receive)
    artifact = export.close()
    assert seen == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(tiny_asset().path / "model.safetensors").keys()
    tensors = [load_file(folder / file) for file in set(index["weight_map"].values())]
    assert index["metadata"]["total_size"] == sum(v.nbytes for part in tensors for v in part.values())
    assert artifact.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert artifact.path == str(folder.resolve())
    assert artifact.kind == "hf"


def test_a_stream_export_without_all_blocks_is_refused(tmp_path):
    """A pass that went on behind a block that this export never received must not look like a whole model."""
    source, folder = _stream_source(), tmp_path / "out"
    export = StreamExport(folder, source, tiny_asset())
    run_pass(source, recipe("rtn"), None, receive=lambda done: export.receive(done) if done.index > 1 else None)
    with pytest.raises(AssetError, match=r"block 0 and 1 more are missing") as refused:
        export.close()
    assert "\n" not in str(refused.value)
    assert not folder.exists()


def test_the_full_precision_model_is_exported_whole(tmp_path):
    _from_stream(tmp_path / "out", algorithm=None)
    with torch.no_grad():
        expected = load_model(tiny_asset(), dtype=torch.float32, device=CPU)(tiny_windows(2, 50, skip=3000)).logits
    assert torch.equal(_logits(tmp_path / "out"), expected)


def test_the_models_own_folder_is_never_replaced(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_asset().path, folder)
    asset = resolve_model(name="copy", path=folder)
    before = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
    source = StreamSource(folder, meta_model(load_config(asset)), torch.float32, CPU)
    model = load_model(asset, dtype=torch.float32, device=CPU)
    for path in (folder, tmp_path / "x" / ".." / "model"):
        with pytest.raises(SpecError, match="other than the one that the model is read from"):
            StreamExport(path, source, asset)
        with pytest.raises(SpecError, match="other than the one that the model is read from"):
            export_memory(path, model, asset)
    assert sorted((path.name, path.stat().st_size) for path in folder.iterdir()) == before


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    first, _ = _from_memory(folder)
    model = load_model(tiny_asset(), dtype=torch.float32, device=CPU)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_memory(folder, model, tiny_asset())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sum(path.stat().st_size for path in folder.iterdir()) == first.bytes


def test_the_digest_is_of_names_and_contents(tmp_path):
    one, _ = _from_memory(tmp_path / "a")
    same, _ = _from_memory(tmp_path / "b")
    other, _ = _from_memory(tmp_path / "c", "rtn")
    assert one.sha256 == same.sha256 != other.sha256
