"""What runs inside OpenCompass's own environment, as a script: it imports nothing of qbench.

    python -P inside.py describe request.json answer.json     what dataset modules hold
    python -P inside.py run request.json                      score a checkpoint, in the current folder

Every import of OpenCompass is here, in functions: this module can be imported where OpenCompass is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: Options of a dataset's configuration that say where its data lie.
DATA_OPTIONS = ("path", "data_files", "wiki_path", "labels_path")


def versions() -> dict[str, str]:
    """The versions in this environment; fails if OpenCompass or what it needs cannot be imported."""
    import opencompass
    import opencompass.cli.main
    import opencompass.datasets
    import torch
    import transformers

    return {
        "opencompass": opencompass.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def configurations(module: str) -> list[Any]:
    """The dataset configurations that the file of `module` (dotted name) defines, in its order."""
    import importlib.util

    from mmengine.config import Config

    found = importlib.util.find_spec(module)
    config = Config.fromfile(found.origin)
    lists = [value for name, value in config.items() if name == "datasets" or name.endswith("_datasets")]
    by_abbr = {each["abbr"]: each for datasets in lists for each in datasets}  # a list and its parts may both be there
    return list(by_abbr.values())


def describe(module: str) -> list[dict[str, Any]]:
    """Per dataset of `module`: abbr, mode, prompt (OpenCompass's hash), definition (sha256 of the whole configuration),
    labels (how often each item is read, None: once) and data (its files relative to the data folder)."""
    import tempfile

    from mmengine.config import Config

    with tempfile.TemporaryDirectory() as folder:  # written and read as OpenCompass does, so that hashes are its own
        path = f"{folder}/config.py"
        Config({"datasets": configurations(module)}, format_python_code=False).dump(path)
        return [_described(each) for each in Config.fromfile(path, format_python_code=False)["datasets"]]


def _described(dataset: Any) -> dict[str, Any]:
    from opencompass.utils.prompt import get_prompt_hash

    template = dataset["infer_cfg"].get("prompt_template", dataset["infer_cfg"].get("ice_template", {})).get("template")
    mode = _mode(dataset["infer_cfg"]["inferencer"]["type"])
    definition = hashlib.sha256(json.dumps(dataset.to_dict(), sort_keys=True, default=str).encode()).hexdigest()
    return {
        "abbr": dataset["abbr"],
        "mode": mode,
        "prompt": get_prompt_hash(dataset)[:6],  # the summary calls it the version
        "definition": definition,
        "labels": len(template) if mode in ("ppl", "ll") and isinstance(template, Mapping) else None,
        "data": sorted(set(_data(dataset))),
    }


def _mode(inferencer: str) -> str:
    """As OpenCompass's summary names it."""
    if "GenInferencer" in inferencer:
        return "gen"
    if "PPLInferencer" in inferencer or "PPLOnlyInferencer" in inferencer:
        return "ppl"
    return "ll" if "LLInferencer" in inferencer else "unknown"


def _data(dataset: Any) -> Iterator[str]:
    from opencompass.utils.datasets_info import DATASETS_MAPPING

    for option in DATA_OPTIONS:
        value = dataset.get(option)
        if isinstance(value, str):
            local = DATASETS_MAPPING.get(value, {}).get("local", value)
            if (path := os.path.normpath(local)).startswith(f"data{os.sep}"):
                yield Path(path).as_posix()


def run(request: Mapping[str, Any]) -> None:
    """Score the checkpoint request["model"] on the datasets of request["module"]; OpenCompass writes under ./out.

    request: module, limit (items per dataset or None), model (options of OpenCompass's model class).
    """
    from mmengine.config import Config

    datasets = configurations(request["module"])
    if request["limit"] is not None:
        for dataset in datasets:
            earlier = dataset["reader_cfg"].get("test_range", "")
            dataset["reader_cfg"]["test_range"] = f"{earlier}[0:{request['limit']}]"
    model = {"type": "opencompass.models.HuggingFaceBaseModel", **request["model"]}
    Config({"datasets": datasets, "models": [model]}, format_python_code=False).dump("config.py")
    _teach_tokenizers()
    from opencompass.cli.main import main

    # In one process: a task that fails ends it with its trace, instead of leaving a gap in the summary.
    sys.argv = ["opencompass", "config.py", "--work-dir", "out", "--debug"]
    main()


def _teach_tokenizers() -> None:
    """OpenCompass calls tokenizers by a name that transformers 5 dropped."""
    from transformers import PreTrainedTokenizerBase

    if not hasattr(PreTrainedTokenizerBase, "batch_encode_plus"):
        PreTrainedTokenizerBase.batch_encode_plus = lambda self, texts, **options: self(texts, **options)


def main(arguments: list[str]) -> None:
    """`describe` answers {"versions": …, "modules": {module: [datasets]}}; a module that cannot be read is left out and
    its error stands under "errors"."""
    request = json.loads(Path(arguments[1]).read_text())
    if arguments[0] == "run":
        run(request)
        return
    answer: dict[str, Any] = {"versions": versions(), "modules": {}, "errors": {}}
    for module in request["modules"]:
        try:
            answer["modules"][module] = describe(module)
        except Exception as error:  # whatever a configuration file does wrong, the others are described
            answer["errors"][module] = f"{type(error).__name__}: {error}"
    Path(arguments[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
