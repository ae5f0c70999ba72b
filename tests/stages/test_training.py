"""The block trainer: optimizers by hand, minibatches, what is kept, what ends it, and what it costs."""

import math
from itertools import chain

import pytest
import torch

from qbench.errors import NumericsError, SpecError
from qbench.stages.training import DIVERGED, Learned, TrainReport, check_training, gather, train
from tests.stages.live import Live


def _leaf(*values):
    return torch.tensor(values).requires_grad_()


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _seeds(*numbers):
    """What a loss on these sequences is multiplied by: distinct."""
    return torch.tensor([1.0 + number for number in numbers])


# ------------------------------------------------------------------ optimizers and schedules, by hand

SCHEDULES = {
    "constant": lambda k, n: 1.0,
    "linear": lambda k, n: 1 - k / n,
    "cosine": lambda k, n: (1 + math.cos(math.pi * k / n)) / 2,
}


def _by_hand(start, lr, wd, optimizer, factor, steps):
    """Minimizing (p - 3)^2 from `start` for one number, in Python's floats, as the papers write it."""
    p, m, v = start, 0.0, 0.0
    for k in range(steps):
        rate, g = lr * factor(k, steps), 2 * (p - 3)
        if optimizer == "signsgd":
            g += wd * p
            p -= rate * ((g > 0) - (g < 0))
            continue
        if optimizer == "adam":
            g += wd * p
        else:
            p -= rate * wd * p  # decoupled (arXiv 1711.05101)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p -= rate * (m / (1 - 0.9 ** (k + 1))) / (math.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
    return p


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "signsgd"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_steps_are_those_of_the_optimizer_and_schedule(optimizer, schedule, wd):
    slow, fast = _leaf(0.0, 5.0), _leaf(-1.0)
    report = train(
        [Learned([slow], 0.03, wd), Learned([fast], 0.2)],
        lambda _: (slow - 3).square().sum() + (fast - 3).square().sum(),
        3,
        epochs=2,
        batch_size=1,
        shuffle=False,
        optimizer=optimizer,
        schedule=schedule,
        keep_best="none",
    )
    factor = SCHEDULES[schedule]
    expected = [_by_hand(start, 0.03, wd, optimizer, factor, 6) for start in (0.0, 5.0)]
    assert slow.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert fast.tolist() == pytest.approx([_by_hand(-1.0, 0.2, 0.0, optimizer, factor, 6)], rel=1e-4)
    assert report.steps == 6
    assert slow.grad is None


def test_a_signed_step_leaves_what_has_no_gradient():
    p = _leaf(1.0, 2.0)
    train([Learned([p], 0.5)], lambda _: p[0] * 7, 1, epochs=1, shuffle=False, optimizer="signsgd", keep_best="none")
    assert p.tolist() == [0.5, 2.0]


def test_gradients_are_clipped_by_their_common_norm():
    moved = []
    for clip in (None, 0.05, 1e9):
        p, q = _leaf(0.0), _leaf(0.0)
        # Adam forgets the size of its first gradient; the second, of another size, tells.
        steps = iter([1.0, 0.01])

        def loss(_, p=p, q=q, steps=steps):
            factor = next(steps)
            return factor * (3 * p + 4 * q).sum()

        train([Learned([p, q], 0.1)], loss, 2, epochs=1, shuffle=False, keep_best="none", clip_grad=clip)
        moved.append((p.item(), q.item()))
    assert moved[0] == moved[2]
    m, v = 0.9 * 0.1 * 0.03 + 0.1 * 0.03, 0.999 * 0.001 * 0.03**2 + 0.001 * 0.03**2
    second = (m / (1 - 0.81)) / (math.sqrt(v / (1 - 0.999**2)) + 1e-8)  # norms 5 and 0.05 both become 0.05
    assert moved[1][0] == pytest.approx(-0.1 - 0.1 * second, rel=1e-3)
    assert moved[0][0] != pytest.approx(moved[1][0], rel=1e-2)


# ------------------------------------------------------------------ minibatches


def _recorded(**options):
    seen, p = [], _leaf(1.0)

    def loss(batch):
        if torch.is_grad_enabled():
            seen.append(batch)
        return (p * _seeds(*batch)).sum()

    report = train([Learned([p], 1e-3)], loss, options.pop("count", 7), **options)
    return seen, p, report


def test_epochs_go_through_every_sequence_once_in_whole_minibatches():
    seen, _, report = _recorded(epochs=3, batch_size=3, shuffle=False)
    assert seen == [[0, 1, 2], [3, 4, 5], [6]] * 3
    assert report.steps == 9
    assert len(report.losses) == 3
    seen, _, _ = _recorded(epochs=3, batch_size=3, generator=_generator())
    assert [len(batch) for batch in seen] == [3, 3, 1] * 3
    epochs = [[*chain(*seen[k : k + 3])] for k in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert _recorded(epochs=1, batch_size=50, shuffle=False)[0] == [list(range(7))]


def test_steps_draw_whole_minibatches_without_replacement():
    seen, _, report = _recorded(steps=40, batch_size=3, generator=_generator())
    assert [len(set(batch)) for batch in seen] == [3] * 40
    assert set(chain(*seen)) == set(range(7))
    assert len(report.losses) == 14  # 3 steps are an epoch's worth; the last part has one
    assert _recorded(steps=2, batch_size=50, generator=_generator(), count=4)[0][0] != [0, 1, 2, 3]


def test_it_is_determined_by_the_generator_and_nothing_else():
    results = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(noise)
        seen, p, report = _recorded(steps=9, batch_size=2, generator=_generator(seed), keep_best="none")
        results.append((seen, p.item(), report))
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]


def test_random_minibatches_need_a_generator():
    with pytest.raises(AssertionError, match="generator"):
        _recorded(epochs=1)


# ------------------------------------------------------------------ identity limits


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "signsgd"])
@pytest.mark.parametrize("keep_best", ["none", "step", "epoch"])
def test_rate_zero_and_no_epochs_leave_the_tensors_exactly_as_they_are(optimizer, keep_best):
    start = torch.randn(50, generator=_generator()) * torch.logspace(-30, 20, 50)
    for lr, epochs in ((0.0, 3), (0.1, 0)):
        p = start.clone().requires_grad_()
        report = train(
            [Learned([p], lr, 0.1)],
            lambda _, p=p: p.tanh().sum(),
            4,
            epochs=epochs,
            shuffle=False,
            optimizer=optimizer,
            keep_best=keep_best,
        )
        assert torch.equal(p.detach(), start)
        assert report.steps == 4 * epochs
    assert report == TrainReport()
    assert train([], lambda _: torch.zeros(()), 4, epochs=3, shuffle=False) == TrainReport()


# ------------------------------------------------------------------ what is kept


def _valley(keep_best, epochs=12, lr=1.0, **options):
    """Steps of `lr` downhill and beyond; the loss of a sequence is |p - 4.2| + its number."""
    p = _leaf(0.0)
    values = []

    def loss(batch):
        values.append((p.item(), torch.is_grad_enabled()))
        return ((p - 4.2).abs() + torch.tensor([float(number) for number in batch])).mean()

    done = {"epochs": epochs, "shuffle": False, "optimizer": "signsgd", "keep_best": keep_best} | options
    return p, train([Learned([p], lr)], loss, 2, batch_size=2, **done), values


def test_the_last_the_best_step_or_the_best_epoch_is_left_behind():
    p, report, values = _valley("none", epochs=5)
    assert p.item() == 5
    assert (report.initial, report.best, report.best_step) == (None, None, 5)
    assert all(training for _, training in values)
    for keep_best in ("step", "epoch"):
        p, report, values = _valley(keep_best)
        assert p.item() == 4
        assert report.best_step == 4
        assert report.initial == pytest.approx(4.7)
        assert report.best == pytest.approx(0.7)
    assert sum(not training for _, training in values) == 13  # before, and after every epoch
    assert [round(loss, 4) for loss in report.losses[:6]] == [4.7, 3.7, 2.7, 1.7, 0.7, 1.3]
    p, report, _ = _valley("epoch", lr=-1.0, epochs=3)  # uphill
    assert (p.item(), report.best_step) == (0, 0)
    assert report.best == report.initial == pytest.approx(4.7)


def test_an_epoch_is_judged_by_all_sequences_also_in_uneven_minibatches():
    p = _leaf(0.0)
    report = train(
        [Learned([p], 0.0)],
        lambda batch: p.sum() + torch.tensor([float(number) for number in batch]).mean(),
        5,
        epochs=1,
        batch_size=2,
        shuffle=False,
    )
    assert report.initial == pytest.approx(2)
    assert report.losses == (pytest.approx((0.5 + 2.5 + 4) / 3),)


def test_the_metrics_tell_it():
    _, report, _ = _valley("epoch", epochs=2)
    found = {name: value for module, name, value in report.metrics("learner") if module == ""}
    assert found == {
        "learner_steps": 2,
        "learner_best_step": 2,
        "learner_diverged": 0,
        "learner_loss_initial": pytest.approx(4.7),
        "learner_loss_best": pytest.approx(2.7),
        "learner_loss_epoch000": pytest.approx(4.7),
        "learner_loss_epoch001": pytest.approx(3.7),
    }


def test_projection_and_progress_come_after_every_step():
    told = []
    p = _leaf(0.0)
    train(
        [Learned([p], 1.0)],
        lambda _: (p - 5).square().sum(),
        2,
        epochs=2,
        shuffle=False,
        optimizer="signsgd",
        keep_best="none",
        project=lambda: p.clamp_(max=1.5),
        report=lambda *progress: told.append(progress),
    )
    assert p.item() == 1.5
    assert told == [(1, 4, 25.0), (2, 4, 16.0), (3, 4, 12.25), (4, 4, 12.25)]


# ------------------------------------------------------------------ what ends it


def _runaway(keep_best, **options):
    """The first epochs get better, then it grows tenfold per epoch."""
    p = _leaf(0.0)
    series = [4.0, 4.0, 3.0, 3.0, 35.0, 35.0, 45.0, 45.0, 9.0, 9.0]

    def loss(batch):
        return p.sum() * 0 + series[min(round(p.item()), 9)]

    def advance():
        p.add_(1)

    report = train(
        [Learned([p], 0.0)], loss, 2, epochs=5, shuffle=False, keep_best=keep_best, project=advance, **options
    )
    return p, report


def test_a_loss_that_runs_away_ends_the_training_with_the_best_so_far():
    p, report = _runaway("epoch")
    assert report.diverged
    assert report.steps == 8  # (45 + 45) > DIVERGED (4 + 4), which (35 + 35) and (35 + 45) are not
    assert DIVERGED == 10
    assert (p.item(), report.best) == (2, 3.0)
    with pytest.raises(NumericsError, match=r"^block 3: training diverged at step 8 of 10: .*lower learning rate"):
        _runaway("none", where="block 3")


def test_numbers_that_are_not_finite_are_errors_that_name_block_and_step():
    for bad in (math.nan, math.inf):
        p, calls = _leaf(1.0), [0]

        def loss(_, p=p, calls=calls, bad=bad):
            calls[0] += 1
            return p.sum() * (bad if calls[0] == 3 else 1.0)

        with pytest.raises(NumericsError, match=rf"^block 7: the loss is {bad} at step 2 of 4; a lower learning rate"):
            train([Learned([p], 0.1)], loss, 2, epochs=2, shuffle=False, keep_best="none", where="block 7")
    p = _leaf(0.0)  # sqrt has no gradient at 0
    with pytest.raises(NumericsError, match=r"^block 7: the gradient is (nan|inf) at step 0 of 2"):
        train([Learned([p], 0.1)], lambda _: p.sqrt().sum(), 2, epochs=1, shuffle=False, where="block 7")

    def refusing(_):
        raise NumericsError("scale is not finite")

    with pytest.raises(NumericsError, match=r"^block 7, step 0 of 2: scale is not finite$"):
        train([Learned([p], 0.1)], refusing, 2, epochs=1, shuffle=False, where="block 7")


def test_autocast_multiplies_in_bfloat16():
    dtypes = []
    p = torch.randn(4, 4, generator=_generator()).requires_grad_()
    for autocast in (False, True):

        def loss(_):
            product = p @ p
            dtypes.append(product.dtype)
            return product.float().square().mean()

        train([Learned([p], 0.1)], loss, 1, epochs=1, shuffle=False, keep_best="none", autocast=autocast)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert p.dtype == torch.float32


def test_it_learns_inside_no_grad_where_the_engine_calls_it():
    p = _leaf(0.0)
    with torch.no_grad():
        train([Learned([p], 0.1)], lambda _: (p - 3).square().sum(), 1, epochs=1, shuffle=False, keep_best="none")
        assert not torch.is_grad_enabled()
    assert p.item() == pytest.approx(0.1)


# ------------------------------------------------------------------ helpers


def test_sequences_are_gathered_from_chunks_in_a_row():
    every = torch.randn(7, 3, 2, generator=_generator())
    chunks = every.split([3, 3, 1])
    assert torch.equal(gather(chunks, [6, 0, 3, 2, 0]), every[[6, 0, 3, 2, 0]])
    assert gather(chunks, [5]).shape == (1, 3, 2)


def test_rates_and_counts_that_mean_nothing_are_refused():
    check_training(lr={"lr": 0.0}, batch_size=1, epochs=0)
    for wrong, message in [
        ({"lr": {"lr": -0.1}}, r"^algo\.lr=-0\.1: a finite learning rate >= 0"),
        ({"lr": {"lr": math.inf}}, r"^algo\.lr=inf: a finite learning rate >= 0"),
        ({"lr": {"weight_decay": -1.0}}, r"^algo\.weight_decay=-1\.0: a finite weight decay >= 0"),
        ({"lr": {"let_lr": math.nan}}, r"^algo\.let_lr=nan"),
        ({"epochs": -1}, r"^algo\.epochs=-1: a number >= 0"),
        ({"batch_size": 0}, r"^algo\.batch_size=0: a number of sequences >= 1"),
    ]:
        with pytest.raises(SpecError, match=message):
            check_training(**({"lr": {"lr": 0.1}, "batch_size": 1, "epochs": 1} | wrong))


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 2), ("adam", 2), ("signsgd", 0)])
@pytest.mark.parametrize("keep_best", ["none", "step"])
def test_it_keeps_gradients_moments_and_the_best_and_nothing_that_grows_with_the_data(optimizer, copies, keep_best):
    peaks = []
    for count in (2, 12):
        p = torch.zeros(5000, requires_grad=True)
        data = torch.randn(count, 5000, generator=_generator())
        with Live([p, data]) as live:
            train(
                [Learned([p], 0.01)],
                lambda batch, p=p, data=data: (p * data[batch[0]]).sum(),
                count,
                epochs=2,
                shuffle=False,
                optimizer=optimizer,
                keep_best=keep_best,
            )
        peaks.append(live.peak)
    size = 4 * 5000
    # One minibatch's product and its gradient, and temporaries of the optimizer, come and go.
    assert peaks[0] == pytest.approx(peaks[1], abs=size / 10)
    assert peaks[0] <= (1 + copies + (keep_best == "step") + 3) * size, peaks[0] / size
