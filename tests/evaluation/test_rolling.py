"""Rolling perplexity against lm-eval's own code: its windows, its model adapter, its task's counting."""

import json
import math
import re

import numpy as np
import pytest
import torch

from qbench.calibration.corpora import pydoc_split
from qbench.errors import AssetError, EvaluationError, SpecError
from qbench.evaluation.rolling import (
    build,
    count_words,
    detokenizer,
    encode,
    prefix_token,
    rolling_nll,
    rolling_perplexity,
    rolling_windows,
)
from qbench.models.load import load_model, load_tokenizer
from qbench.spec import EvaluationSpec
from tests.engine.helpers import tiny_asset
from tests.evaluation.subjects import full_precision, quantized

lm_eval = pytest.importorskip("lm_eval")

OPTIONS = {
    "corpora": ["pydoc-heldout"],
    "path": None,
    "length": 64,
    "n": None,
    "batch": None,
    "detokenize": "none",
}
SPEC = EvaluationSpec(
    evaluator="rolling", version=1, task="text", fingerprint="0" * 64, length=64, n=None, mode="rolling"
)
PAGES = [
    " = One = \n \n The quick brown fox , it is said , jumped 1 @,@ 000 times ( or so ) . ",
    " = Two = \n \n " + "A much longer text that is cut into several windows . " * 12,
    ' = Three = \n \n Über " quoted " words \'s .\n',
]


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_asset(), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_asset())


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 13, 14, 15, 99, 100, 101])
def test_windows_are_those_of_lm_eval(length, size):
    from lm_eval.utils import get_rolling_token_windows

    ids = list(range(1000, 1000 + size))
    expected = list(get_rolling_token_windows(ids, prefix_token=-1, max_seq_len=length, context_len=1))
    found = [(tokens[:-1], tokens[-count:]) for tokens, count in rolling_windows(ids, -1, length)]
    assert found == [(list(inputs), list(targets)) for inputs, targets in expected]
    assert [token for _, targets in found for token in targets] == ids


def test_nothing_to_read_is_no_window():
    assert not list(rolling_windows([], -1, 5))


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_losses_are_those_of_lm_evals_own_model(batch, model, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    requests = [Instance("loglikelihood_rolling", {}, (page,), 0) for page in PAGES]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    ids = [encode(tokenizer, page) for page in PAGES]
    assert ids == [theirs.tok_encode(page) for page in PAGES]
    assert prefix_token(tokenizer) == theirs.prefix_token_id
    assert len(ids[1]) > 128
    steps = []
    found = rolling_nll(model, ids, theirs.prefix_token_id, 64, batch, lambda done, total: steps.append((done, total)))
    assert found.numpy() == pytest.approx(-np.array(expected), rel=1e-5)
    assert steps[-1] == (7, 7)


def test_special_tokens_are_not_added_to_a_text_that_begins_with_one():
    class Marking:
        bos_token_id, eos_token_id = 1, 2

        def decode(self, token):
            return {1: "<s>", 2: "</s>"}[token]

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [*([1] if add_special_tokens else []), *text.encode()]}

    assert encode(Marking(), "a") == [1, 97]
    assert encode(Marking(), "<s>a") == list(b"<s>a")
    assert prefix_token(Marking()) == 1
    Marking.bos_token_id = None
    assert prefix_token(Marking()) == 2
    assert encode(Marking(), "<s>a") == [1, *b"<s>a"]


def test_numbers_are_those_of_lm_evals_wikitext_task(model, tokenizer, tmp_path):
    """Its document processing, its metrics and its aggregation, on our losses; then the whole evaluation."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    changed = [wikitext_detokenizer({"page": page}) for page in PAGES]
    assert changed == [detokenizer("wikitext")(page) for page in PAGES] != PAGES
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in changed]
    losses = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    results = [process_results({"page": page}, (loss,)) for page, loss in zip(PAGES, losses, strict=True)]
    expected = {
        "word_perplexity": weighted_perplexity([r["word_perplexity"] for r in results]),
        "byte_perplexity": weighted_perplexity([r["byte_perplexity"] for r in results]),
        "bits_per_byte": bits_per_byte([r["bits_per_byte"] for r in results]),
    }
    path = tmp_path / "pages.jsonl"
    rows = [row for page in PAGES for row in _rows(page)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n")
    (only,) = build({**OPTIONS, "path": str(path), "detokenize": "wikitext"}, "memory")
    subject = full_precision(tmp_path, model)
    only.preflight(subject.context)
    found = only.measure(subject, lambda done, total: None)
    assert {m.name: m.value for m in found} == pytest.approx(expected, rel=1e-5)
    assert only.texts() == PAGES
    exact = rolling_perplexity(-torch.tensor(losses, dtype=torch.float64), PAGES, SPEC)
    assert {m.name: m.value for m in exact} == pytest.approx(expected, rel=1e-12)
    assert [count_words(page) for page in PAGES] == [r["word_perplexity"][1] for r in results]


def _rows(page):
    """The published rows of a page: with line ends, a line of a space is an empty row."""
    return ["" if line == " " else line + "\n" for line in page.removesuffix("\n").split("\n")]


def test_samples_and_standard_errors():
    """Samples average to the logarithm; the error is that of a ratio, by simulation of documents."""
    generator = np.random.default_rng(0)

    def draw(count):
        sizes = generator.integers(1, 60, count)
        losses = torch.tensor(sizes * generator.gamma(20, 0.1, count))
        return rolling_perplexity(losses, ["x" * (size - 1) + "é" for size in sizes], SPEC)

    drawn = [draw(80) for _ in range(400)]
    for place, name in enumerate(("word_perplexity", "byte_perplexity", "bits_per_byte")):
        one = drawn[0][place]
        assert one.name == name
        mean = one.samples.mean()
        assert one.value == pytest.approx(mean if name == "bits_per_byte" else math.exp(mean), rel=1e-12)
        if name != "word_perplexity":  # a word each here: exp of a large number
            spread = np.std([row[place].value for row in drawn], ddof=1)
            assert np.mean([row[place].stderr for row in drawn]) == pytest.approx(spread, rel=0.1), name
    assert {m.stderr for m in draw(1)} == {None}
    assert drawn[0][2].value == pytest.approx(math.log2(drawn[0][1].value))


def test_a_text_is_one_document_and_quantization_shows(tmp_path, model):
    path = tmp_path / "text.txt"
    path.write_text(pydoc_split()[1][:4000])
    (only,) = build({**OPTIONS, "path": str(path), "length": None}, "memory")
    assert only.spec.protocol == "rolling"
    plain, _, bits = only.measure(full_precision(tmp_path, model), lambda done, total: None)
    assert plain.n == 1
    assert plain.stderr is None
    assert 1 < bits.value < 4
    coarse = only.measure(quantized(tmp_path, 2, model=model), lambda done, total: None)
    assert coarse[0].value > plain.value


def test_rows_of_a_file_are_documents(tmp_path, model):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One document."}\n{"text": ""}\n{"text": "Another, a longer one."}\n')
    (only,) = build({**OPTIONS, "path": str(path)}, "memory")
    assert only.measure(full_precision(tmp_path, model), lambda done, total: None)[0].n == 2
    (first,) = build({**OPTIONS, "path": str(path), "n": 1}, "memory")
    assert first.measure(full_precision(tmp_path, model), lambda done, total: None)[0].n == 1
    (many,) = build({**OPTIONS, "path": str(path), "n": 3}, "memory")
    with pytest.raises(SpecError, match=r"eval.n=3: 1 to 2"):
        many.preflight(full_precision(tmp_path, model).context)
    keys = {
        only.spec.key(),
        first.spec.key(),
        build({**OPTIONS, "path": str(path), "length": 63}, "memory")[0].spec.key(),
    }
    keys.add(build({**OPTIONS, "path": str(path), "detokenize": "wikitext"}, "memory")[0].spec.key())
    path.write_text('{"text": "One document."}\n{"text": "Another, a longer one!"}\n')
    assert len(keys | {build({**OPTIONS, "path": str(path)}, "memory")[0].spec.key()}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "eval.length=0"),
        ({"n": 0}, "eval.n=0"),
        ({"detokenize": "moses"}, "eval.detokenize=moses: must be one of none, wikitext"),
        ({"path": "missing.jsonl"}, "eval.path=missing.jsonl: no such file"),
    ],
)
def test_bad_options_are_refused_in_one_line(change, message):
    with pytest.raises((SpecError, AssetError), match=re.escape(message)):
        build({**OPTIONS, **change}, "memory")


def test_what_the_model_cannot_do(tmp_path, model):
    (only,) = build({**OPTIONS, "length": 10**6}, "memory")
    with pytest.raises(SpecError, match=r"eval.length=1000000: at most \d+, the context of tiny"):
        only.preflight(full_precision(tmp_path, model).context)
    with pytest.raises(EvaluationError, match="the loss of document 1 is nan"):
        rolling_perplexity(torch.tensor([1.0, math.nan], dtype=torch.float64), ["a", "b"], SPEC)
    with pytest.raises(EvaluationError, match="overflows"):
        rolling_perplexity(torch.tensor([1e4], dtype=torch.float64), ["a"], SPEC)
