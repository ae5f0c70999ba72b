"""Configuration files of evaluators: what they build, under which protocols."""

import json

import pytest
from omegaconf import OmegaConf

from qbench.command import conf_dir
from qbench.evaluation import evaluator

PROTOCOLS = {
    "fidelity": ["kl-512", "greedy-128"],
    "layers": ["layers-512"],
    "decode": ["decode-512"],
    "token_kl": ["unigram-512"],
    "needle": ["needle-512", "needle-1024", "needle-2048"],
    "rolling": ["rolling"],
    "wikitext2": ["window-2048"],
    "ptb": ["window-2048"],
    "c4": ["documents-2048"],
    "c4_new": ["window-2048"],
}


def _build(name, **change):
    node = {**OmegaConf.to_container(OmegaConf.load(conf_dir() / "eval" / f"{name}.yaml")), **change}
    return evaluator(node.get("evaluator", node["name"])).build(node, "memory")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_files_build_what_they_say(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(9)))
    found = _build(name, path=str(path))
    assert [each.spec.protocol for each in found] == PROTOCOLS[name]
    assert len({each.spec.key() for each in found}) == len(found)


def test_decode_is_the_same_measurement_as_perplexity_in_that_mode():
    shared = {"corpora": ["pydoc"], "length": 40, "n": 3}
    (named,), (moded,) = _build("decode", **shared), _build("perplexity", mode="decode", **shared)
    assert named.spec == moded.spec
    assert named.spec.key() == moded.spec.key() != _build("perplexity", **shared)[0].spec.key()
