"""An OpenCompass that needs no OpenCompass: a program that answers as `inside.py` does, and dataset files to choose
from."""

import json
import sys
from pathlib import Path

from qbench.evaluation.opencompass.catalog import Dataset, Part
from qbench.evaluation.opencompass.environment import Environment

PROGRAM = """#!{python}
import json, os, pathlib, sys
behaviour = json.loads(pathlib.Path({behaviour!r}).read_text())
arguments = sys.argv[sys.argv.index("-P") + 2:]
request = json.loads(pathlib.Path(arguments[1]).read_text())
calls = pathlib.Path({calls!r})
calls.write_text(calls.read_text() + json.dumps(
    {{"arguments": arguments, "request": request, "environ": dict(os.environ), "cwd": os.getcwd()}}) + "\\n")
if arguments[0] == "describe":
    known = behaviour["describe"]
    answer = {{"versions": {{"opencompass": "0"}}, "modules": {{m: known[m] for m in request["modules"] if m in known}},
              "errors": {{m: "SyntaxError: broken" for m in request["modules"] if m not in known}}}}
    pathlib.Path(arguments[2]).write_text(json.dumps(answer))
    sys.exit(0)
checkpoint = pathlib.Path(request["model"]["path"])
if behaviour.get("keep"):
    import shutil
    shutil.copytree(checkpoint, behaviour["keep"])
print(behaviour["log"], end="", flush=True)
for name, text in behaviour["files"].items():
    path = pathlib.Path("out", "20260101_000000", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
if behaviour.get("sleep"):
    import time
    pathlib.Path(behaviour["started"]).write_text(str(os.getpid()))
    time.sleep(behaviour["sleep"])
sys.exit(behaviour["code"])
"""

PIQA = "opencompass.configs.datasets.piqa.piqa_ppl_1cf9f0"
LAMBADA = "opencompass.configs.datasets.lambada.lambada_gen_217e11"
RACE = "opencompass.configs.datasets.race.race_ppl_a138cd"


def part(abbr="piqa", mode="ppl", data=("data/piqa",), labels=2, prompt="1cf9f0"):
    return {
        "abbr": abbr,
        "mode": mode,
        "prompt": prompt,
        "definition": f"definition of {abbr}",
        "labels": labels,
        "data": list(data),
    }


DESCRIBED = {
    PIQA: [part()],
    LAMBADA: [part("lambada", "gen", ("data/lambada/test.jsonl",), None, "217e11")],
    RACE: [part("race-middle", data=("data/race",), labels=4), part("race-high", data=("data/race",), labels=4)],
}


def dataset(name="piqa", module=PIQA):
    parts = tuple(Part(**{**each, "data": tuple(each["data"])}) for each in DESCRIBED[module])
    return Dataset(name, module, parts)


class Fake:
    """An installed environment whose program does what `behave` says; `calls` are the requests it got."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.behaviour = folder, folder / "behaviour.json"
        self.log = folder / "calls.jsonl"
        packages = folder / "lib" / "python3" / "site-packages" / "opencompass" / "configs" / "datasets"
        for path in (
            "piqa/piqa_ppl_1cf9f0",
            "piqa/piqa_ppl_0cfff2",
            "piqa/__init__",
            "lambada/lambada_gen_217e11",
            "race/race_ppl_a138cd",
            "squad20/squad20_gen",
            "one/twice",
            "two/twice",
        ):
            (packages / path).parent.mkdir(parents=True, exist_ok=True)
            (packages / f"{path}.py").touch()
        program = folder / "bin" / "python"
        program.parent.mkdir()
        program.write_text(PROGRAM.format(python=sys.executable, behaviour=str(self.behaviour), calls=str(self.log)))
        program.chmod(0o755)
        self.log.touch()
        self.environment = Environment(folder, {"opencompass": "0"})
        self.behave()

    def behave(self, *, log: str = "", files=None, code: int = 0, **more) -> None:
        values = {"describe": DESCRIBED, "log": log, "files": files or {}, "code": code, **more}
        self.behaviour.write_text(json.dumps(values))

    @property
    def calls(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def outputs(correct: dict[str, list[bool]], mode="ppl", metric="accuracy", scale=100) -> dict[str, str]:
    """The files that OpenCompass leaves for datasets whose items were answered rightly or not."""
    rows, files = ["dataset,version,metric,mode,model"], {}
    for name, flags in correct.items():
        value = scale * sum(flags) / len(flags)
        rows.append(f"{name},1cf9f0,{metric},{mode},{value:.2f}")
        details = {str(i): {"predictions": "a", "references": "a", "correct": flag} for i, flag in enumerate(flags)}
        files[f"results/model/{name}.json"] = json.dumps({metric: value, "details": {"type": "PPL", **details}})
        files[f"predictions/model/{name}.json"] = json.dumps({str(i): {"prediction": 0} for i in range(len(flags))})
    return {"summary/summary_20260101_000000.csv": "\n".join(rows) + "\n", **files}
