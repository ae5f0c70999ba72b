"""Log-likelihoods and greedy continuations against plain forwards, one request at a time."""

import random

import pytest
import torch
from transformers import DynamicCache

from qbench.errors import EvaluationError
from qbench.evaluation.lm_eval import scoring
from qbench.evaluation.lm_eval.generation import generate
from qbench.evaluation.lm_eval.scoring import score
from tests.architectures import ARCHITECTURES, VOCABULARY, tiny_model


def _pairs(seed=0, questions=6, choices=4, longest=30):
    """Contexts of many lengths, each with several continuations of 1 to 6 tokens; some continuations twice."""
    draw = random.Random(seed)
    ids = lambda low, high: [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]  # noqa: E731
    pairs = []
    for question in range(questions):
        context = ids(1, longest)
        ends = [ids(1, 1 if question % 3 == 0 else 6) for _ in range(choices)]
        pairs += [(context, end) for end in [*ends, ends[0]]]
    return pairs


@torch.no_grad()
def _plain(model, pairs, max_length):
    found = []
    for context, continuation in pairs:
        tokens = [*context, *continuation][-(max_length + 1) :]
        logits = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0].double()
        logits = logits[-len(continuation) :]
        wanted = torch.tensor(continuation)
        value = logits.log_softmax(dim=-1).gather(1, wanted[:, None]).sum().item()
        found.append((value, bool((logits.argmax(dim=-1) == wanted).all())))
    return found


def _same(found, expected):
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_one_forward_per_request_on_every_architecture(architecture, share):
    model = tiny_model(architecture)[0]
    pairs = _pairs()
    _same(score(model, pairs, max_length=60, share=share), _plain(model, pairs, 60))


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("share", [False, True])
def test_batches_and_order_do_not_matter(batch, share):
    model = tiny_model("llama")[0]
    pairs = _pairs(seed=1)
    expected = _plain(model, pairs, 60)
    _same(score(model, pairs, max_length=60, share=share, batch=batch), expected)
    order = random.Random(2).sample(range(len(pairs)), len(pairs))
    found = score(model, [pairs[place] for place in order], max_length=60, share=share, batch=batch)
    _same(found, [expected[place] for place in order])


def test_greedy_continuations_are_known_as_such():
    model = tiny_model("llama")[0]
    context = [5, 6, 7]
    with torch.no_grad():
        grown = list(context)
        for _ in range(3):
            grown.append(model(input_ids=torch.tensor([grown])).logits[0, -1].argmax().item())
    greedy, other = grown[3:], [*grown[3:5], (grown[5] + 1) % VOCABULARY]
    assert [flag for _, flag in score(model, [(context, greedy), (context, other)], max_length=60)] == [True, False]


@pytest.mark.parametrize("share", [False, True])
def test_too_long_inputs_lose_their_beginning(share):
    model = tiny_model("llama")[0]
    pairs = _pairs(seed=3, longest=40)
    assert max(len(a) + len(b) for a, b in pairs) > 13
    _same(score(model, pairs, max_length=12, share=share), _plain(model, pairs, 12))


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 61)])
def test_what_predicts_nothing_is_refused(pair):
    with pytest.raises(EvaluationError, match="request 1"):
        score(tiny_model("llama")[0], [([1], [2]), pair], max_length=60)


def _tokens_read(model, pairs, **options):
    """Tokens that go through the model, padding included."""
    read = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    try:
        score(model, pairs, max_length=60, **options)
    finally:
        handle.remove()
    return sum(read)


def test_what_choices_share_is_read_once():
    model = tiny_model("llama")[0]
    context = list(range(3, 43))
    pairs = [(context, [50 + choice, 60, 61, 62]) for choice in range(4)]
    assert _tokens_read(model, pairs, share=False) == 4 * 43
    assert _tokens_read(model, pairs, share=True) == 39 + 4 * 4  # the last shared token predicts: it is read again
    one_token = [(context, [50 + choice]) for choice in range(4)]
    assert _tokens_read(model, one_token, share=False) == 40


def test_a_context_may_end_inside_what_is_shared():
    model = tiny_model("llama")[0]
    text = list(range(3, 33))
    pairs = [(text[:25], [80, 81]), (text[:12], [*text[12:20], 92, 93]), (text[:25], text[25:]), (text[:12], text[12:])]
    _same(score(model, pairs, max_length=60, share=True), _plain(model, pairs, 60))


def test_a_short_common_beginning_does_not_break_up_a_long_one():
    model = tiny_model("llama")[0]
    start, more = list(range(3, 13)), list(range(20, 50))
    pairs = [([*start, *more], [place, 60, 61]) for place in (70, 71, 72, 73)] + [([*start, *more[::-1]], [70, 60, 61])]
    assert _tokens_read(model, pairs, share=True) == 39 + 4 * 3 + 42


def test_sharing_never_reads_more():
    model = tiny_model("llama")[0]
    for seed in range(20):
        pairs = _pairs(seed=seed, questions=1, choices=random.Random(seed).randint(1, 5))
        assert _tokens_read(model, pairs, share=True, batch=1) <= _tokens_read(model, pairs, share=False, batch=1)


def test_beginnings_that_many_questions_share_are_found_as_well():
    """Few-shot examples, and choices inside the question (winogrande)."""
    examples, draw = [7] * 40, random.Random(5)
    pairs = [([*examples, draw.randrange(8, 90)], [draw.randrange(8, 90)] * 3) for _ in range(6)]
    model = tiny_model("llama")[0]
    assert _tokens_read(model, pairs, share=True) < _tokens_read(model, pairs, share=False) / 2
    _same(score(model, pairs, max_length=60, share=True), _plain(model, pairs, 60))


def test_progress_reaches_all_requests():
    seen = []
    pairs = _pairs()
    score(
        tiny_model("llama")[0], pairs, max_length=60, batch=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (len(pairs), len(pairs))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_batch_stays_within_its_tokens(monkeypatch):
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 64)
    model, largest = tiny_model("llama")[0], []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: largest.append(args[0].numel()))
    score(model, _pairs(), max_length=60, share=True)
    handle.remove()
    assert max(largest) <= 64


@torch.no_grad()
def _greedy(model, prompt, most):
    grown = list(prompt)
    for _ in range(most):
        grown.append(model(input_ids=torch.tensor([grown])).logits[0, -1].argmax().item())
    return grown[len(prompt) :]


@pytest.mark.parametrize("batch", [None, 1])
def test_generates_what_repeated_forwards_choose(batch):
    model = tiny_model("llama")[0]
    draw = random.Random(4)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in (3, 5, 3, 8, 5, 3)]
    expected = [_greedy(model, prompt, 7) for prompt in prompts]
    fresh = lambda: DynamicCache(config=model.config)  # noqa: E731
    assert generate(model, fresh, prompts, 7, lambda tokens: False, batch) == expected
    # Each stops by itself, the others go on.
    last = [expected[0][2], expected[3][0]]
    found = generate(model, fresh, prompts, 7, lambda tokens: tokens[-1] in last, batch)
    for tokens, whole in zip(found, expected, strict=True):
        end = next((place + 1 for place, token in enumerate(whole) if token in last), 7)
        assert tokens == whole[:end]
