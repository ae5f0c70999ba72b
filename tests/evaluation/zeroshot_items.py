"""Written items of lm-eval's tasks in the hub's schemas, and evaluations of them."""

import json
import random

from qbench.calibration.corpora import pydoc_split
from qbench.evaluation.lm_eval import build as build_evaluations

DEFAULTS = {"tasks": ["piqa"], "limit": None, "num_fewshot": None, "data_dir": None, "batch": None}


def sentences():
    words = pydoc_split()[1].split()
    place, draw = 0, random.Random(0)
    while True:
        size = draw.randint(1, 12)
        yield " ".join(words[place : place + size])
        place += size


def write(folder, task, split, rows):
    (folder / task).mkdir(exist_ok=True)
    (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_items(folder):
    """Items of several tasks in the hub's schemas; labels are drawn."""
    text, draw = sentences(), random.Random(1)
    piqa = [{"goal": next(text), "sol1": next(text), "sol2": next(text), "label": draw.randrange(2)} for _ in range(30)]
    write(folder, "piqa", "validation", piqa)
    for task in ("arc_easy", "arc_challenge"):
        rows = []
        for _ in range(25):
            labels = ["A", "B", "C", "D"][: draw.randint(3, 4)]
            choices = {"text": [next(text) for _ in labels], "label": labels}
            rows.append({"id": "x", "question": next(text), "choices": choices, "answerKey": draw.choice(labels)})
        write(folder, task, "test", rows)
        write(folder, task, "train", rows[:9])
    boolq = [{"question": next(text), "passage": next(text), "idx": 0, "label": draw.randrange(2)} for _ in range(20)]
    write(folder, "boolq", "validation", boolq)
    wino = []
    for _ in range(20):
        sentence = f"{next(text)} _ {next(text)}"
        wino.append({"sentence": sentence, "option1": next(text), "option2": next(text), "answer": draw.choice("12")})
    write(folder, "winogrande", "validation", wino)
    hella = []
    for place in range(20):
        row = {
            "ind": place,
            "activity_label": next(text),
            "ctx_a": next(text),
            "ctx_b": next(text),
            "ctx": "",
            "split": "val",
        }
        row |= {
            "endings": [next(text) for _ in range(4)],
            "label": str(draw.randrange(4)),
            "source_id": "",
            "split_type": "",
        }
        hella.append(row)
    write(folder, "hellaswag", "validation", hella)
    write(folder, "lambada_openai", "test", [{"text": f"{next(text)} {next(text)} end"} for _ in range(12)])
    write(folder, "wikitext", "test", [{"page": (next(text) + "\n") * 60} for _ in range(3)])
    gsm = [{"question": next(text), "answer": f"so it is #### {draw.randrange(9)}"} for _ in range(5)]
    write(folder, "gsm8k", "test", gsm)
    write(folder, "gsm8k", "train", gsm * 3)
    for subject in ("mmlu_abstract_algebra", "mmlu_anatomy"):
        rows = [
            {
                "question": next(text),
                "choices": [next(text) for _ in range(4)],
                "answer": draw.randrange(4),
                "subject": "s",
            }
            for _ in range(8 if subject.endswith("anatomy") else 12)
        ]
        write(folder, subject, "test", rows)
        write(folder, subject, "dev", rows[:5])


def build(items, tasks, **options):
    return build_evaluations({**DEFAULTS, "tasks": tasks, "data_dir": str(items), **options}, "memory")


def measure(evaluation, subject):
    evaluation.preflight(subject.context)
    return {(row.task, row.name): row for row in evaluation.measure(subject, lambda done, total: None)}
