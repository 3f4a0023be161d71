"""Requests run on behalf of `Engine`: how many at once, all at once, or one as an iterator."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from sloraj.completion import Completion, CompletionBuilder
from sloraj.errors import SlorajError
from sloraj.frontend_api import FrontendApi, RequestOutput
from sloraj.request import SamplingParams

Prompt = str | list[int]  # a text, or token ids
OnOutput = Callable[[RequestOutput], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One request: prompt, parameters, adapter (None: the base model), and its standing."""

    prompt: Prompt
    params: SamplingParams
    adapter_id: str | None
    priority: int = 0
    tenant: str | None = None


class Window:
    """How many sequences may be with the engine at once: a long list must not fill its queue."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_inside = 0
        self._changed = threading.Condition()

    def enter(self, num_sequences: int, *, wait: bool) -> bool:
        """False if there is no room and `wait` is False. Anything fits into an empty window."""
        with self._changed:
            while self._num_inside and self._num_inside + num_sequences > self._capacity:
                if not wait:
                    return False
                self._changed.wait()
            self._num_inside += num_sequences
            return True

    def leave(self, num_sequences: int) -> None:
        with self._changed:
            self._num_inside -= num_sequences
            self._changed.notify_all()


class Running:
    """A request inside the window, which it leaves by its last output or by `cancel`."""

    def __init__(self, runner: JobRunner, job: Job, deliver: OnOutput) -> None:
        self._runner = runner
        self._deliver = deliver
        self._job = job
        self._num_unfinished = job.params.n
        self._is_inside = True
        self._lock = threading.Lock()
        self.request_id = runner.next_id()

    def on_output(self, output: RequestOutput) -> None:
        self._num_unfinished -= output.finish_reason is not None
        if output.error is not None or self._num_unfinished == 0:
            self.leave()
        self._deliver(output)

    def leave(self) -> None:
        with self._lock:
            was_inside, self._is_inside = self._is_inside, False
        if was_inside:
            self._runner.window.leave(self._job.params.n)

    def cancel(self) -> None:
        self._runner.frontend.abort(self.request_id)
        self.leave()


class JobRunner:
    """Starts jobs on a frontend, through one window. Safe to use from many threads."""

    def __init__(self, frontend: FrontendApi, window: Window) -> None:
        self.frontend = frontend
        self.window = window
        self._numbers = itertools.count(1)

    def next_id(self) -> str:
        return f"engine-{next(self._numbers)}"

    def start(self, job: Job, deliver: OnOutput, *, wait: bool) -> Running | None:
        """None if the window has no room and `wait` is False. Raises what `submit` does."""
        if not self.window.enter(job.params.n, wait=wait):
            return None
        running = Running(self, job, deliver)
        try:
            self.frontend.submit(
                running.request_id, job.prompt, job.params, job.adapter_id, running.on_output,
                priority=job.priority, tenant=job.tenant,
            )  # fmt: skip
        except BaseException:
            running.leave()
            raise
        return running

    def run_all(self, jobs: Sequence[Job], *, return_errors: bool) -> list[Completion]:
        """Completions in the order of jobs. Raises the first error, or returns them all."""
        outputs: queue.SimpleQueue[tuple[int, RequestOutput]] = queue.SimpleQueue()
        builders = [CompletionBuilder(job.adapter_id, job.params.n) for job in jobs]
        running: dict[int, Running] = {}
        num_started = 0
        try:
            while num_started < len(jobs) or running:
                while num_started < len(jobs):
                    try:
                        started = self._start_into(outputs, num_started, jobs, wait=not running)
                    except SlorajError as error:
                        builders[num_started].fail(error)
                    else:
                        if started is None:
                            break
                        running[num_started] = started
                    _raise_unless(return_errors, builders[num_started])
                    num_started += 1
                if running:
                    number, output = outputs.get()
                    builders[number].add(output)
                    _raise_unless(return_errors, builders[number])
                    if builders[number].is_finished:
                        del running[number]
            return [builder.build() for builder in builders]
        finally:
            for request in running.values():
                request.cancel()

    def _start_into(
        self,
        outputs: queue.SimpleQueue[tuple[int, RequestOutput]],
        number: int,
        jobs: Sequence[Job],
        *,
        wait: bool,
    ) -> Running | None:
        return self.start(jobs[number], lambda output: outputs.put((number, output)), wait=wait)


def _raise_unless(return_errors: bool, builder: CompletionBuilder) -> None:
    if builder.error is not None and not return_errors:
        raise builder.error


class CompletionStream(Iterator[RequestOutput]):
    """The increments of one request. `close`, or dropping the last reference, drops the request."""

    def __init__(self, runner: JobRunner, job: Job) -> None:
        self._outputs: queue.SimpleQueue[RequestOutput | None] = queue.SimpleQueue()
        self._num_unfinished = job.params.n
        self._running: Running | None = None
        self._running = runner.start(job, self._outputs.put, wait=True)

    def __next__(self) -> RequestOutput:
        output = self._outputs.get() if self._num_unfinished else None
        if output is None:
            self.close()
            raise StopIteration
        if output.error is not None:
            self.close()
            raise output.error
        self._num_unfinished -= output.finish_reason is not None
        return output

    def close(self) -> None:
        """Drop the request if it still runs, and end the iteration. Idempotent."""
        running, self._running = self._running, None
        self._num_unfinished = 0
        if running is not None:
            running.cancel()
            self._outputs.put(None)  # wakes an iteration waiting in another thread

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
