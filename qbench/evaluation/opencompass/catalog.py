"""Names of datasets to OpenCompass's dataset files, and what those hold. Does not import torch."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qbench.assets import file_sha256
from qbench.errors import EvaluationError, SpecError
from qbench.evaluation.opencompass.environment import INSIDE, Environment, clean_environ, tail

#: The prompts that a name stands for, by the file's name without .py: OpenCompass's own defaults at this version.
KNOWN = {
    "piqa": "piqa_ppl_1cf9f0",
    "winogrande": "winogrande_ll_c5cf57",
    "ARC-e": "ARC_e_ppl_a450bd",
    "ARC-c": "ARC_c_ppl_a450bd",
    "hellaswag": "hellaswag_ppl_47bff9",
    "BoolQ": "SuperGLUE_BoolQ_ppl_314b96",
    "siqa": "siqa_ppl_ced5f6",
    "commonsenseqa": "commonsenseqa_ppl_5545e2",
    "obqa": "obqa_ppl_c7c154",
    "race": "race_ppl_a138cd",
    "storycloze": "storycloze_ppl_496661",
    "COPA": "SuperGLUE_COPA_ppl_9f3618",
    "RTE": "SuperGLUE_RTE_ppl_66caf3",
    "lambada": "lambada_gen_217e11",
    "mmlu": "mmlu_ppl_ac766d",
    "ceval": "ceval_ppl_578f8d",
    "cmmlu": "cmmlu_ppl_8b9c76",
    "gsm8k": "gsm8k_gen_1d7fe4",
    "math": "math_gen_a58d9d",
    "bbh": "bbh_gen_ee62e9",
    "drop": "drop_openai_simple_evals_gen_3857b0",
    "mbpp": "mbpp_gen_830460",
    "nq": "nq_gen_3dcea1",
    "triviaqa": "triviaqa_gen_2121ce",
}
_ROOT = "opencompass.configs.datasets"


@dataclass(frozen=True)
class Part:
    """One dataset of a dataset file, in OpenCompass's terms.

    `mode` is ppl, ll or gen; `prompt` its hash of the prompt ("version"); `definition` a sha256 of the whole
    configuration; `labels` how many readings of an item are compared (None: text is generated); `data` the files and
    folders that are read, relative to the folder that holds `data`.
    """

    abbr: str
    mode: str
    prompt: str
    definition: str
    labels: int | None
    data: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """What a name in `eval.datasets` stands for: a dataset file (`module`) and its parts."""

    name: str
    module: str
    parts: tuple[Part, ...]

    @property
    def data(self) -> tuple[str, ...]:
        return tuple(sorted({path for part in self.parts for path in part.data}))

    @property
    def mode(self) -> str:
        """The mode and, where all parts share one, the prompt: `ppl-1cf9f0`."""
        modes, prompts = {part.mode for part in self.parts}, {part.prompt for part in self.parts}
        mode = "-".join(sorted(modes))
        return f"{mode}-{prompts.pop()}" if len(prompts) == 1 else mode


@dataclass(frozen=True)
class Catalog:
    """The dataset files of an installed OpenCompass."""

    environment: Environment

    @cached_property
    def modules(self) -> dict[str, str]:
        """Dotted module by the file's name without .py; a name that several folders use is left to its full path."""
        found: dict[str, list[str]] = {}
        root = self.environment.configurations
        for folder, _, names in os.walk(root):
            for name in names:
                if name.endswith(".py") and name != "__init__.py":
                    inner = Path(folder).relative_to(root).parts
                    found.setdefault(name[:-3], []).append(".".join((_ROOT, *inner, name[:-3])))
        return {stem: modules[0] for stem, modules in found.items() if len(modules) == 1}

    def module(self, name: str) -> str:
        """The dotted module of a name: one of `KNOWN`, a file's name (`piqa_ppl_0cfff2`), a name that has a default
        (`squad20` → squad20_gen), or a dotted module itself. SpecError with near matches otherwise."""
        if name.startswith(f"{_ROOT}."):
            path = self.environment.configurations.joinpath(*name.removeprefix(f"{_ROOT}.").split("."))
            if path.with_suffix(".py").is_file():
                return name
        for stem in (KNOWN.get(name, name), f"{name}_ppl", f"{name}_gen"):
            if stem in self.modules:
                return self.modules[stem]
        raise SpecError("eval.datasets", name, self._instead(name))

    def resolve(self, names: Sequence[str]) -> list[Dataset]:
        """The datasets, described by OpenCompass itself; remembered in its environment."""
        modules = [self.module(name) for name in names]
        described = self._described(modules)
        return [
            Dataset(name, module, tuple(Part(**{**part, "data": tuple(part["data"])}) for part in described[module]))
            for name, module in zip(names, modules, strict=True)
        ]

    def _instead(self, name: str) -> str:
        names = {known.lower(): known for known in [*self.modules, *KNOWN]}
        near = [names[each] for each in difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.5)]
        hint = f"near: {', '.join(near)}" if near else f"known: {', '.join(KNOWN)}"
        return f"no dataset of OpenCompass; {hint}; or the name of one of its files in configs/datasets"

    def _described(self, modules: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        folder = self.environment.folder / f"described-{file_sha256(INSIDE)[:12]}"  # by what describes
        folder.mkdir(exist_ok=True)
        if unknown := [module for module in modules if not (folder / f"{module}.json").exists()]:
            answer = ask(self.environment, unknown)
            for module, parts in answer["modules"].items():
                partial = folder / f"{module}.{os.getpid()}.partial"
                partial.write_text(json.dumps(parts))
                os.replace(partial, folder / f"{module}.json")
            for module, error in answer["errors"].items():
                raise SpecError("eval.datasets", module, f"its file cannot be used: {error}")
        return {module: json.loads((folder / f"{module}.json").read_text()) for module in modules}


def ask(environment: Environment, modules: Sequence[str]) -> dict[str, Any]:
    """What `inside.main` answers about `modules`; takes the ten seconds that importing OpenCompass does."""
    with tempfile.TemporaryDirectory(prefix="qbench-opencompass-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"modules": list(modules)}))
        done = subprocess.run(
            [str(environment.python), "-P", str(INSIDE), "describe", str(request), str(answer)],
            cwd=folder,
            env=clean_environ(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            last = (tail(done.stderr, 1) or [f"exit code {done.returncode}"])[0]
            raise EvaluationError(f"opencompass: its environment {environment.folder} does not work: {last}")
        return json.loads(answer.read_text())
