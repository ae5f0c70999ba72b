"""Needles: where the fact stands, that decoding from copies of the cache is what whole forwards give."""

import re

import pytest
import torch
from transformers import DynamicCache

from qbench.calibration.corpora import resolve_corpus, tokenize
from qbench.errors import AssetError, SpecError
from qbench.evaluation.needle import Needle, build, find_needle, make_needles, needle_measurements
from qbench.models.kv_cache import QuantizedCache
from qbench.models.load import load_model, load_tokenizer
from tests.architectures import tiny_model
from tests.engine.caches import cache_format
from tests.engine.helpers import tiny_asset
from tests.evaluation.subjects import full_precision, quantized

OPTIONS = {
    "corpora": ["pydoc-heldout"],
    "path": None,
    "lengths": [150, 200],
    "depths": [0, 0.5, 1],
    "n": 2,
    "codes": 4,
    "facts": 2,
    "seed": 0,
    "batch": None,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_asset())


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return tokenize(resolve_corpus("pydoc-heldout"), tokenizer)


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("length", [120, 333])
def test_texts_have_their_length_and_the_fact_its_depth(length, tokenizer, haystack):
    depths = (0.0, 0.3, 1.0)
    needles = make_needles(tokenizer, haystack, length, depths, 5, 6, 1, 1)
    assert [needle.depth for needle in needles] == list(depths) * 5
    whole = tokenizer.decode(haystack)
    for needle in needles:
        assert len(needle.prompt) + max(map(len, needle.codes)) == length
        assert len(set(needle.codes)) == 6
        text = tokenizer.decode(needle.prompt)
        answer = tokenizer.decode(needle.codes[0])
        before, after = text.split(f"{answer}.\n\n")  # once
        question = after[after.rindex("Remember") :]
        sentence = question.removeprefix("Remember: t").join(["\n\nT", ""])
        assert before.endswith(sentence)
        hay = before.removesuffix(sentence), after.removesuffix(question).removesuffix("\n\n")
        assert hay[0] + hay[1] in whole
        share = len(tokenizer(hay[0])["input_ids"]) / (len(tokenizer(hay[0] + hay[1])["input_ids"]) or 1)
        assert share == pytest.approx(needle.depth, abs=0.05)
        assert not any(tokenizer.decode(code) in text for code in needle.codes[1:])


def test_other_places_have_codes_of_their_own(tokenizer, haystack):
    depths = (0.0, 0.5, 1.0)
    for needle in make_needles(tokenizer, haystack, 250, depths, 3, 6, 4, 0):
        assert len(needle.prompt) + max(map(len, needle.codes)) == 250
        text = tokenizer.decode(needle.prompt)
        place = text[text.rindex("code of the") :].removeprefix("code of the ").removesuffix(" is")
        told = re.findall(r"The secret code of the (\w+) is (\w+ \w+)\.", text)
        assert len(dict(told)) == 4
        assert dict(told)[place] == tokenizer.decode(needle.codes[0]).strip()
        assert set(dict(told).values()) == {tokenizer.decode(code).strip() for code in needle.codes[:4]}
        if needle.depth != 0.5:
            assert [key for key, _ in told].index(place) == 3 * needle.depth


def test_texts_depend_on_nothing_but_the_seed(tokenizer, haystack):
    def make(seed=0, n=3, codes=4, facts=2):
        return make_needles(tokenizer, haystack, 150, (0.5,), n, codes, facts, seed)

    assert make() == make()
    assert make(n=5)[:3] == make()
    assert make(seed=1) != make()
    assert [needle.codes[:3] for needle in make(codes=3)] == [needle.codes[:3] for needle in make()]


def _plain(model, needle):
    """Each code in a forward of its own, and greedy decoding by whole forwards."""
    prompt = torch.tensor([needle.prompt])
    scores = []
    for code in needle.codes:
        ids = torch.cat([prompt, torch.tensor([code])], dim=1)
        logp = model(ids, use_cache=False).logits[0, len(needle.prompt) - 1 : -1].double().log_softmax(-1)
        scores.append(logp.gather(1, torch.tensor(code)[:, None]).sum().item())
    ids = prompt
    for _ in needle.codes[0]:
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return scores[0] > max(scores[1:]), tuple(ids[0, len(needle.prompt) :].tolist()) == needle.codes[0]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.no_grad()
def test_is_what_whole_forwards_give(name):
    """Random models, with codes among which their own likeliest answer is often the right one; unequal lengths."""
    model, config = tiny_model(name)
    generator = torch.Generator().manual_seed(0)
    results = set()
    for number in range(16):
        prompt = torch.randint(3, 97, (1, 20), generator=generator)
        likeliest = prompt
        for _ in range(3):
            likeliest = torch.cat([likeliest, model(likeliest).logits[:, -1:].argmax(-1)], dim=1)
        answer = tuple(likeliest[0, 20:].tolist())
        others = torch.randint(3, 97, (3, 4), generator=generator).tolist()
        codes = [answer[: 1 + number % 3], *(tuple(code[: 1 + place]) for place, code in enumerate(others))]
        if number % 4 == 1:
            codes = codes[::-1]
        if number % 4 == 2:
            codes[0] = (*codes[0][:-1], 96)
        needle = Needle(prompt=tuple(prompt[0].tolist()), codes=tuple(map(tuple, codes)), depth=0.5, number=number)
        found = find_needle(model, needle, DynamicCache(config=config))
        assert found == _plain(model, needle), number
        results.add(found)
    assert {found[0] for found in results} == {found[1] for found in results} == {True, False}


@torch.no_grad()
def test_codes_are_decoded_from_what_the_cache_holds(model, tokenizer, haystack):
    """Against token-by-token decoding of every code from a cache of its own."""
    layers = [cache_format("kivi", 2, 16)] * 4
    changed = 0
    for needle in make_needles(tokenizer, haystack, 150, (0.1, 0.9), 2, 3, 1, 0):
        scores = []
        for code in needle.codes:
            cache = QuantizedCache(layers)
            logits = model(torch.tensor([needle.prompt]), past_key_values=cache, use_cache=True).logits[:, -1]
            score = 0.0
            for token in code:
                score += logits.double().log_softmax(-1)[0, token].item()
                logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[:, -1]
            scores.append(score)
        found, _ = find_needle(model, needle, QuantizedCache(layers))
        assert found == (scores[0] > max(scores[1:]))
        changed += scores[0] != pytest.approx(_score(model, needle, needle.codes[0]), abs=1e-3)
    assert changed


def _score(model, needle, code):
    ids = torch.tensor([[*needle.prompt, *code]])
    logp = model(ids, use_cache=False).logits[0, len(needle.prompt) - 1 : -1].double().log_softmax(-1)
    return logp.gather(1, torch.tensor(code)[:, None]).sum().item()


def test_a_tie_is_not_found(model):
    twins = Needle(prompt=(5, 6, 7), codes=((8, 9), (8, 9)), depth=0.5, number=0)
    assert find_needle(model, twins, DynamicCache())[0] is False


def test_needles_go_through_the_quantized_cache(tmp_path, model, monkeypatch):
    seen = []
    monkeypatch.setattr("qbench.evaluation.needle.find_needle", lambda m, n, cache: seen.append(cache) or (True, True))
    (only,) = build({**OPTIONS, "lengths": [150]}, "memory")
    only.measure(quantized(tmp_path, 4, cache=cache_format("kivi", 2, 16), model=model), lambda done, total: None)
    assert {type(cache) for cache in seen} == {QuantizedCache}
    assert len(set(map(id, seen))) == 6  # an empty one each


def test_shares_are_clustered_by_text(tmp_path, model):
    first, second = build(OPTIONS, "memory")
    assert (first.spec.protocol, second.spec.protocol) == ("needle-150", "needle-200")
    subject = full_precision(tmp_path, model)
    first.preflight(subject.context)
    steps = []
    choice, exact = first.measure(subject, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (6, 6)
    assert choice.n == exact.n == 6
    assert choice.clusters.tolist() == [0, 0, 0, 1, 1, 1]
    assert choice.value == choice.samples.mean()
    again = first.measure(full_precision(tmp_path, model), lambda done, total: None)
    assert [m.value for m in again] == [choice.value, exact.value]
    first.measure(quantized(tmp_path, 3, cache=cache_format("kivi", 2, 16), model=model), lambda done, total: None)


def test_standard_error_over_clusters():
    """All depths alike: as if each text had been read once."""
    spec = build(OPTIONS, "memory")[0].spec
    needles = [Needle(prompt=(), codes=(), depth=d, number=k) for k in range(4) for d in (0.0, 0.5, 1.0)]
    hits = [(k in (0, 2, 3), False) for k in range(4) for _ in range(3)]
    choice, exact = needle_measurements(needles, hits, spec)
    assert choice.value == 0.75
    assert choice.stderr == pytest.approx(torch.tensor([1.0, 0, 1, 1]).std().item() / 2)
    assert (exact.value, exact.stderr) == (0, 0)
    alone, _ = needle_measurements(needles[:3], hits[:3], spec)
    assert alone.stderr is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, "eval.lengths=[]"),
        ({"lengths": 512}, "eval.lengths=512"),
        ({"lengths": [512, 512]}, "eval.lengths=[512,512]"),
        ({"lengths": [1]}, "eval.lengths=1"),
        ({"depths": [0.5, 1.5]}, "eval.depths=1.5"),
        ({"depths": ["x"]}, "eval.depths=x"),
        ({"codes": 1}, "eval.codes=1"),
        ({"facts": 0}, "eval.facts=0: must be an integer, 1 to 4"),
        ({"facts": 5}, "eval.facts=5: must be an integer, 1 to 4"),
        ({"n": 0}, "eval.n=0"),
        ({"seed": -1}, "eval.seed=-1"),
        ({"path": "missing.txt"}, "eval.path=missing.txt"),
    ],
)
def test_bad_options_are_refused_in_one_line(change, message):
    with pytest.raises((SpecError, AssetError)) as error:
        build({**OPTIONS, **change}, "memory")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("length", "message"),
    [(30, "eval.lengths=30: at least"), (10**6, "eval.lengths=1000000: at most"), (10**5, "at most")],
)
def test_lengths_that_cannot_be_are_refused_before_anything_loads(length, message, tmp_path, model):
    (only,) = build({**OPTIONS, "lengths": [length]}, "memory")
    with pytest.raises(SpecError) as error:
        only.preflight(full_precision(tmp_path, model).context)
    assert message in str(error.value)


def test_options_are_part_of_the_key():
    changes = {"depths": [0, 0.5], "n": 3, "codes": 5, "facts": 1, "seed": 1, "lengths": [151], "corpora": ["pydoc"]}
    keys = {build({**OPTIONS, key: value}, "memory")[0].spec.key() for key, value in changes.items()}
    assert len(keys | {build(OPTIONS, "memory")[0].spec.key()}) == 8
