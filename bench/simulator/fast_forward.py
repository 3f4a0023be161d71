"""Many decode steps at once, where each of them would only repeat the one before.

While no request arrives, ends or is admitted, every step gives each running sequence one token and
nothing else happens: only the contexts grow. `FastForward.run` passes over such steps and leaves
core and runner as they would be after them; the moments of all that follows are the same to the
last bit (`tests/bench/simulator/test_fast_forward.py`). What is skipped are the TokenOutputs in
between, none of which is a request's first or last.

It goes by what the plain scheduler does, first come, first served. An engine that charges by the
token, re-orders its queue or gives requests up as time passes has to be stepped: `applies` says so.
"""

from __future__ import annotations

from bench.simulator.runner import SimulatedHandle, SimulatedRunner
from sloraj.core import EngineCore
from sloraj.policies.order import FirstComeFirstServed
from sloraj.request import Sequence
from sloraj.scheduler import Scheduler


class FastForward:
    """For one core on a `SimulatedRunner`."""

    def __init__(self, core: EngineCore) -> None:
        runner = core._runner
        assert isinstance(runner, SimulatedRunner)
        self._core, self._runner, self._scheduler = core, runner, core._scheduler
        self.applies = (
            type(core._scheduler) is Scheduler
            and type(core._scheduler._waiting._order) is FirstComeFirstServed
            and getattr(core._config, "early_abort", None) is None
        )
        self.num_steps = 0  # passed over

    def run(self, until_s: float) -> int:
        """Pass over steps that begin before `until_s`, where something new may happen. How many."""
        handle = self._core._enqueued
        if not self.applies or handle is None or not self._core._inbox.empty():
            return 0
        if not self._repeats(handle):
            return 0
        running = self._scheduler._running
        most = self._num_steps(running)
        num_steps = self._pass_time(handle, most, until_s) if most > 0 else 0
        if num_steps:
            self._advance(running, num_steps)
            self.num_steps += num_steps
        return num_steps

    def _repeats(self, handle: SimulatedHandle) -> bool:
        """Whether the step that is enqueued decodes all running sequences, and the next one would
        do so again: it could admit, install and send no more than this one did, which was nothing.
        """
        scheduler, features = self._scheduler, handle.features
        if not features.is_decode or features.num_installs or features.num_sends:
            return False
        if features.num_decoding != len(scheduler._running):
            return False
        if scheduler._foresight.may_send(scheduler._waiting):  # nearer its turn, it may be worth it
            return False
        # A sequence that was preempted may have waited for its token alone. Any other that was not
        # admitted will not be: rows and pages only get fewer.
        head = scheduler._waiting.first()
        if head is not None and head.num_preemptions and scheduler._holdings.num_free_rows:
            return False
        return all(sequence.output_token_ids for sequence in scheduler._running) and all(
            row.sequence.row is not None for row in handle.sampled
        )

    def _num_steps(self, running: list[Sequence]) -> int:
        """Steps until a sequence ends or a page is wanted that is not free."""
        left = min(s.max_output_tokens - len(s.output_token_ids) - s.num_in_flight for s in running)
        size, num_free = self._core._config.page_size, self._core._pool.num_free
        if left <= 0 or len(running) * -(-left // size) <= num_free:
            return left
        while left > 0 and _missing_pages(running, left, size) > num_free:
            left //= 2
        return left

    def _pass_time(self, handle: SimulatedHandle, most: int, until_s: float) -> int:
        """The loop of `EngineCore.step` as far as the clock goes: execute N + 1, collect N."""
        runner, features = self._runner, handle.features
        model, clock = runner.model, runner.clock
        between_s, execute, device = model.between.seconds(features), model.execute, model.device
        execute_fixed_s, device_fixed_s = execute.fixed_s(features), device.fixed_s(features)
        context, rows = features.context_tokens, features.num_decoding
        now_s, free_s, end_s, done = clock.now(), runner.free_s, handle.end_s, 0
        busy_s, arrived_s = runner.busy_s, runner.arrived_s
        head_start_s = model.head_start_s
        while done < most and now_s < until_s:
            context += rows
            begun_s = now_s
            host_s = between_s + (execute_fixed_s + execute.context_s * context)
            now_s = max(now_s, begun_s + host_s)
            device_s = device_fixed_s + device.context_s * context
            free_s = max(free_s, begun_s, now_s - head_start_s, arrived_s) + device_s
            busy_s += device_s
            now_s, end_s = max(now_s, end_s), free_s
            done += 1
        if done:
            clock.sleep_until(now_s)
            handle.features = features.with_context(context)
            handle.end_s, runner.free_s, runner.busy_s = end_s, free_s, busy_s
            handle.step += done
            runner.num_steps += done
        return done

    def _advance(self, running: list[Sequence], num_steps: int) -> None:
        scheduler = self._scheduler
        tokens = [self._runner.token_id] * num_steps
        for sequence in running:
            sequence.output_token_ids += tokens
            sequence.num_computed_tokens += num_steps
            has_grown = scheduler._holdings.grow(sequence, sequence.num_computed_tokens)
            assert has_grown  # the pages are free: see `_num_steps`
        scheduler.num_steps += num_steps
        scheduler.num_computed_tokens += num_steps * len(running)
        scheduler.num_sampled_tokens += num_steps * len(running)


def _missing_pages(running: list[Sequence], num_steps: int, page_size: int) -> int:
    return sum(
        max(-(-(s.num_computed_tokens + num_steps) // page_size) - len(s.pages), 0) for s in running
    )
