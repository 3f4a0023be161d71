"""Laws of the step-time model, on steps whose true costs the test makes up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sloraj.batch import AdapterInstall, ScheduledBatch, ScheduledRow
from sloraj.request import SamplingParams, Sequence
from sloraj.step_time import StepFeatures, StepTimeModel, StepTimes, features_of
from tests.sloraj.fake_runner import packed_adapter

TRUE_S = {  # another machine than the priors': nothing is within 1.5 of them
    "constant": 9e-3, "num_decode_rows": 2e-5, "context_tokens": 3e-7, "num_prefill_tokens": 4e-6,
    "num_bound_tokens": 4.5e-5, "prefill_pairs": 1e-9, "adapter_bytes": 1e-12,
    "num_installs": 3e-4, "install_bytes": 1e-10, "send_bytes": 4e-12,
}  # fmt: skip


def seconds(features: StepFeatures) -> float:
    return TRUE_S["constant"] + sum(
        TRUE_S[name] * value for name, value in features._asdict().items()
    )


def random_features(random: np.random.Generator) -> StepFeatures:
    rows = int(random.integers(0, 256))
    tokens = int(random.choice([0, 0, 128, 256, 512, 1024, 2048])) if rows else 512
    installs = int(random.choice([0, 0, 0, 1, 2]))
    return StepFeatures(
        rows, rows * int(random.integers(10, 1000)), tokens, max(tokens - 256, 0),
        tokens * int(random.integers(50, 1500)), int(random.integers(1, 200)) * 17_000_000,
        installs, installs * int(random.integers(0, 120_000_000)),
        int(random.choice([0, 0, 17_000_000, 134_000_000])),
    )  # fmt: skip


def trained(seed: int, noise: float, pauses: float = 0.0, steps: int = 3000) -> StepTimeModel:
    random, model = np.random.default_rng(seed), StepTimeModel()
    for _ in range(steps):
        features = random_features(random)
        measured = seconds(features) * float(np.exp(random.normal(0, noise)))
        if random.random() < pauses:
            measured += float(random.uniform(0.05, 2.0))
        model.observe(features, measured)
    return model


def errors(model: StepTimeModel, seed: int) -> np.ndarray:
    """Relative errors on steps that the model has not seen, f64 [500]."""
    random = np.random.default_rng(1000 + seed)
    steps = [random_features(random) for _ in range(500)]
    return np.array([abs(model.predict(step) / seconds(step) - 1) for step in steps])


@pytest.mark.parametrize("seed", range(3))
def test_the_costs_that_made_noisy_steps_are_found(seed: int) -> None:
    model = trained(seed, noise=0.03)
    assert np.percentile(errors(model, seed), 95) < 0.04
    for name, true in TRUE_S.items():  # each cost, as far as it matters to a step
        largest = {"num_installs": 2, "num_decode_rows": 256, "num_prefill_tokens": 2048}
        if name not in largest:
            continue
        share = abs(model.costs[name] - true) * largest[name] / TRUE_S["constant"]
        assert share < 0.5, (name, model.costs[name], true)
    for name in ("constant", "context_tokens", "num_bound_tokens", "install_bytes"):
        assert model.costs[name] == pytest.approx(TRUE_S[name], rel=0.15), name


@pytest.mark.parametrize("seed", range(3))
def test_pauses_of_seconds_in_one_step_of_twenty_change_little(seed: int) -> None:
    assert np.percentile(errors(trained(seed, noise=0.03, pauses=0.05), seed), 95) < 0.08


def test_one_pause_moves_no_prediction_by_more_than_a_few_percent() -> None:
    model, random = trained(5, noise=0.03), np.random.default_rng(6)
    steps = [random_features(random) for _ in range(100)]
    before = [model.predict(step) for step in steps]
    model.observe(steps[0], 5.0)
    after = [model.predict(step) for step in steps]
    assert max(abs(b / a - 1) for a, b in zip(before, after, strict=True)) < 0.03


def test_a_device_that_slows_down_is_followed() -> None:
    model, random = trained(7, noise=0.02), np.random.default_rng(8)
    for _ in range(1500):
        step = random_features(random)
        model.observe(step, 1.5 * seconds(step))
    steps = [random_features(random) for _ in range(200)]
    assert np.median([model.predict(s) / (1.5 * seconds(s)) for s in steps]) == pytest.approx(
        1, abs=0.05
    )


@pytest.mark.parametrize("factor", [1e-3, 0.1, 1.0, 30.0, 1e4])
def test_the_first_dozen_steps_find_the_scale_of_any_machine(factor: float) -> None:
    model, random = StepTimeModel(), np.random.default_rng(9)
    for _ in range(12):
        step = random_features(random)
        model.observe(step, factor * seconds(step))
    steps = [random_features(random) for _ in range(200)]
    ratios = [model.predict(step) / (factor * seconds(step)) for step in steps]
    assert 0.5 < np.median(ratios) < 2


@pytest.mark.parametrize("seed", range(5))
def test_no_measurement_makes_a_prediction_of_nothing_or_less(seed: int) -> None:
    model, random = StepTimeModel(), np.random.default_rng(seed)
    for _ in range(500):
        model.observe(random_features(random), float(random.choice([-1, 0, 1e-9, 1e-3, 1, 1e4])))
        step = random_features(random)
        assert 0 < model.predict(step) < float("inf")
    assert np.isfinite(model._information).all()


def test_more_work_never_takes_less_time() -> None:
    model, random = trained(11, noise=0.2, pauses=0.1), np.random.default_rng(12)
    for _ in range(200):
        step = random_features(random)
        more = StepFeatures(*(value + int(random.integers(0, 100)) for value in step))
        assert model.predict(more) >= model.predict(step)


def test_the_same_steps_give_the_same_model() -> None:
    assert trained(3, 0.1, 0.1, 200).costs == trained(3, 0.1, 0.1, 200).costs


def test_weeks_of_one_kind_of_step_forget_no_more_than_the_prior() -> None:
    model = StepTimeModel()
    step = StepFeatures(64, 64 * 500, 0, 0, 0, 10**9, 0, 0, 0)
    for _ in range(5000):
        model.observe(step, seconds(step))
    known = np.linalg.eigvalsh(model._information)
    assert known.min() > 0 and known.max() < 1000  # what is told again and again is not added up
    assert model.predict(step) == pytest.approx(seconds(step), rel=0.02)


def test_what_rare_steps_cost_is_not_forgotten_over_many_others() -> None:
    model, random = trained(13, noise=0.02), np.random.default_rng(14)
    prefill = StepFeatures(60, 60 * 500, 2048, 1792, 2048 * 300, 60 * 17_000_000, 0, 0, 0)
    for _ in range(20_000):  # minutes of decoding
        rows = int(random.integers(50, 70))
        decode = StepFeatures(rows, rows * 500, 0, 0, 0, rows * 17_000_000, 0, 0, 0)
        model.observe(decode, seconds(decode) * float(np.exp(random.normal(0, 0.02))))
    assert model.predict(prefill) == pytest.approx(seconds(prefill), rel=0.1)


def test_steps_that_the_sum_cannot_describe_leave_the_others_right() -> None:
    model, random = StepTimeModel(), np.random.default_rng(15)
    for place in range(2000):
        rows = 20 + place // 100
        decode = StepFeatures(rows, rows * 400, 0, 0, 0, 0, 0, 0, 0)
        if place % 10 == 0:  # padded to 512, and yet as quick as its tokens are few
            mixed = decode._replace(num_prefill_tokens=512, num_bound_tokens=256)
            model.observe(mixed, seconds(decode) + 4.5e-5 * float(random.integers(0, 256)))
        model.observe(decode, seconds(decode) * float(np.exp(random.normal(0, 0.03))))
        if place > 500:
            assert model.predict(decode) == pytest.approx(seconds(decode), rel=0.1)


# --- what is in a step ---


def row(start: int, num_tokens: int, slot: int) -> ScheduledRow:
    sequence = Sequence("r", 0, [1], SamplingParams(), 1, frozenset(), 0, 1, None, 0.0)
    return ScheduledRow(sequence, 0, slot, 0, start, num_tokens, 0, False, True)


def test_features_count_what_a_step_does() -> None:
    packed = [packed_adapter(content, pages) for content, pages in ((1, 2), (2, 3), (3, 5))]
    installs = tuple(AdapterInstall(i + 1, i + 1, (), p) for i, p in enumerate(packed[:2]))
    sends = (AdapterInstall(3, 3, (), packed[2]),)
    rows = (row(9, 1, 0), row(19, 1, 1), row(5, 1, 1), row(0, 300, 2), row(100, 50, 1))
    batch = ScheduledBatch(1, rows, installs, sends)
    sizes = {0: 0, 1: 1000, 2: 200}
    assert features_of(batch, sizes.__getitem__, (128, 512), num_sent=1) == StepFeatures(
        num_decode_rows=3,
        context_tokens=10 + 20 + 6,
        num_prefill_tokens=512,  # 353 tokens, padded
        num_bound_tokens=256,
        prefill_pairs=300 * 300 // 2 + 50 * (100 + 25),
        adapter_bytes=1200,
        num_installs=2,
        install_bytes=packed[1].num_bytes,
        send_bytes=packed[2].num_bytes,
    )
    decode = dataclasses.replace(batch, rows=rows[:3], installs=(), sends=())
    assert features_of(decode, sizes.__getitem__, ()) == StepFeatures(3, 36, 0, 0, 0, 1000, 0, 0, 0)


# --- how long it took ---


def test_steps_that_overlap_share_no_time_and_gaps_belong_to_none() -> None:
    now_s = 0.0
    times = StepTimes(lambda: now_s, {0: 0}.__getitem__, ())
    measured: list[float] = []
    times.model.observe = lambda features, seconds: measured.append(seconds)  # type: ignore[method-assign]
    batch = ScheduledBatch(1, (row(3, 1, 0),))
    # Two steps run ahead of each other, then four seconds without work, then one alone.
    for moment, is_read in (
        (10.0, False), (10.1, False), (10.6, True), (10.61, False), (11.0, True), (11.3, True),
        (15.0, False), (15.2, True),
    ):  # fmt: skip
        now_s = moment
        if is_read:
            times.read()
        else:
            times.enqueue(batch)
    assert measured == pytest.approx([0.6, 0.4, 0.3, 0.2])


def test_what_is_enqueued_keeps_the_device_busy_for_the_sum_of_its_predictions() -> None:
    now_s = 5.0
    times = StepTimes(lambda: now_s, {0: 0}.__getitem__, ())
    batch = ScheduledBatch(1, (row(3, 1, 0),))
    assert times.busy_s(now_s) == 0
    times.enqueue(batch)
    times.enqueue(batch)
    each = times.model.predict(times.last)
    assert times.busy_s(now_s) == pytest.approx(2 * each)
    now_s += 0.5 * each
    assert times.busy_s(now_s) == pytest.approx(1.5 * each)
    now_s += 5.0  # the step takes longer than predicted: it may end at any moment
    assert times.busy_s(now_s) == 0
    times.read()
    assert 0 < times.busy_s(now_s) == pytest.approx(times.model.predict(times.last))


def test_at_first_every_step_is_learnt_and_then_some_of_those_with_prefill_most() -> None:
    now_s = 0.0
    times = StepTimes(lambda: now_s, {0: 0}.__getitem__, ())
    decode, mixed = ScheduledBatch(1, (row(3, 1, 0),)), ScheduledBatch(1, (row(0, 9, 0),))

    def learnt(batch: ScheduledBatch, num: int) -> int:
        nonlocal now_s
        before = times.model.num_observed
        for _ in range(num):
            times.enqueue(batch)
            now_s += 0.01
            times.read()
        return times.model.num_observed - before

    assert learnt(decode, 50) == 50  # at first every step
    learnt(decode, 100)
    assert learnt(mixed, 80) == 10
    assert learnt(decode, 320) == 10
    assert times.model.mean_step_s == pytest.approx(0.01, rel=0.01)
