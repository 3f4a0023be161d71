"""Traffic for a served demo: many clients that stream, some that leave, and operators who load,
replace and unload adapters meanwhile. Every answer is checked as it comes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from checkpoints.demo.tasks import BASE_TASK, TASKS, Task, prompt, random_text
from tests.e2e.served import BASE, Served

CANCEL_SHARE = 0.15  # half of them after some events, half after some time, whatever comes first
MAX_PATIENCE_S = 5.0
REQUEST_TIMEOUT_S = 90.0
LOOK_S = 0.25  # between two looks at how much is in flight
CHAT_SHARE = 0.3
TENANTS = tuple(f"tenant/{index}" for index in range(6))  # names that the operators change
TENANT_SHARE = 0.15
NUM_OPERATORS = 3


@dataclasses.dataclass
class Tenant:
    """A name whose adapter changes. `epoch` is odd while a change is under way."""

    name: str
    is_loaded: bool = False
    epoch: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request."""

    model: str
    text: str
    is_chat: bool

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.model, "max_tokens": 64, "temperature": 0}
        if self.is_chat:
            return asked | {"messages": [{"role": "user", "content": self.text}]}
        return asked | {"prompt": prompt(self.text)}

    def alone(self, demo: Served) -> str:
        """The whole answer when nobody else asks."""
        (choice,) = demo.http.post(f"{demo.url}{self.path}", json=self.body()).json()["choices"]
        return str(choice["message"]["content"] if self.is_chat else choice["text"])


@dataclasses.dataclass
class Outcome:
    """What came of it all. `problems` is empty if all was as it has to be."""

    num_answers: int = 0
    num_cancelled: int = 0
    num_not_found: int = 0  # of tenants that were away
    num_loads: int = 0
    num_reloads: int = 0
    num_unloads: int = 0
    num_tokens: int = 0
    in_flight: list[int] = dataclasses.field(default_factory=list)  # as the clients count
    running: list[int] = dataclasses.field(default_factory=list)  # as the server counts
    seconds: float = 0.0
    first_token_s: list[float] = dataclasses.field(default_factory=list)
    mismatches: list[tuple[Asked, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        waits = sorted(self.first_token_s)
        p50, p99 = (waits[int(len(waits) * share)] for share in (0.5, 0.99))
        return (
            f"load: {self.num_answers} answers in {self.seconds:.0f} s, {len(self.mismatches)} of "
            f"them not the right one; {self.num_cancelled} cancelled, {self.num_not_found} for a "
            f"tenant that was away; {self.num_loads} loads, {self.num_reloads} reloads, "
            f"{self.num_unloads} unloads; {min(self.in_flight)} or more in flight, "
            f"{statistics.median(self.running):.0f} (p50) in the server; "
            f"{self.num_tokens / self.seconds:.0f} tokens/s; first token after {p50:.2f} s (p50), "
            f"{p99:.2f} s (p99)"
        )


class Load:
    """One run. All of it lives on one event loop."""

    def __init__(self, demo: Served, http: httpx2.AsyncClient, seconds: float) -> None:
        self.outcome = Outcome()
        self._demo, self._http = demo, http
        self._end_s = time.monotonic() + seconds
        self._in_flight = 0
        self._tenants = {name: Tenant(name) for name in TENANTS}
        self._tasks: dict[str, Task] = {}  # by version, which a content has for ever

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    def _problem(self, what: object, problem: object) -> None:
        self.outcome.problems.append(f"{what}: {problem}")

    # --- clients ---

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._is_over:
            is_tenant = rng.random() < TENANT_SHARE
            model = rng.choice(TENANTS if is_tenant else (BASE, *TASKS))
            asked = Asked(model, random_text(rng), is_chat=rng.random() < CHAT_SHARE)
            patience_s, num_events = REQUEST_TIMEOUT_S, None
            if rng.random() < CANCEL_SHARE / 2:
                patience_s = rng.uniform(0, MAX_PATIENCE_S)
            elif rng.random() < CANCEL_SHARE / 2:
                num_events = rng.randint(1, 8)
            self._in_flight += 1
            try:
                async with asyncio.timeout(patience_s):
                    await self._ask(asked, num_events)
            except TimeoutError as error:
                if patience_s == REQUEST_TIMEOUT_S:
                    self._problem(asked, repr(error))
                self.outcome.num_cancelled += 1
            except httpx2.HTTPError as error:
                self._problem(asked, repr(error))
            finally:
                self._in_flight -= 1

    async def _ask(self, asked: Asked, num_events: int | None) -> None:
        """Stream an answer; leave after `num_events` of it."""
        tenant = self._tenants.get(asked.model)
        seen = None if tenant is None else dataclasses.replace(tenant)
        started_s = time.monotonic()
        body = asked.body() | {"stream": True}
        async with self._http.stream("POST", asked.path, json=body) as answer:
            if tenant is not None and seen == tenant and tenant.epoch % 2 == 0:
                expected = 200 if tenant.is_loaded else 404
                if answer.status_code != expected:
                    self._problem(asked, f"{answer.status_code}, expected {expected}")
            if tenant is not None and answer.status_code == 404:
                self.outcome.num_not_found += 1
            elif answer.status_code != 200:
                self._problem(asked, f"{answer.status_code} {await answer.aread()!r}")
            else:
                version = answer.headers.get("x-sloraj-adapter-version")
                text, is_whole = await self._read(asked, _events(answer), num_events, started_s)
                self._check(asked, await self._task(asked, version), text, is_whole=is_whole)

    async def _task(self, asked: Asked, version: str | None) -> Task:
        """The task of an answer. A tenant's new version may answer before its load has."""
        if asked.model not in self._tenants:
            return BASE_TASK if asked.model == BASE else TASKS[asked.model]
        assert version is not None
        while version not in self._tasks:
            await asyncio.sleep(0.01)
        return self._tasks[version]

    async def _read(
        self,
        asked: Asked,
        events: AsyncIterator[Any],
        num_events: int | None,
        started_s: float,
    ) -> tuple[str, bool]:
        """The text up to where the client leaves, and whether that is all of it."""
        text, finish_reason, num_seen, last = "", None, 0, None
        async for last in events:
            if last == "[DONE]" or "error" in last:
                break
            if num_seen == 0:
                self.outcome.first_token_s.append(time.monotonic() - started_s)
            num_seen += 1
            (choice,) = last["choices"]
            text += (choice["delta"].get("content") if asked.is_chat else choice["text"]) or ""
            finish_reason = choice["finish_reason"]
            if num_seen == num_events and finish_reason is None:
                self.outcome.num_cancelled += 1
                return text, False
        if last != "[DONE]" or finish_reason != "stop":
            self._problem(asked, f"ended with {finish_reason} and {last}")
        self.outcome.num_answers += 1
        return text, True

    def _check(self, asked: Asked, task: Task, text: str, *, is_whole: bool) -> None:
        """Note what is not the right answer under the name that this adapter always has."""
        self.outcome.num_tokens += len(text) + is_whole  # a token a byte, and <eos>
        right = task.answer(asked.text)
        if text != (right if is_whole else right[: len(text)]):
            model = BASE if task is BASE_TASK else task.id
            self.outcome.mismatches.append((dataclasses.replace(asked, model=model), text))

    # --- operators ---

    async def operator(self, seed: int) -> None:
        """Change the tenants of one operator, one after the other."""
        rng = random.Random(seed)
        mine = [self._tenants[name] for name in TENANTS[seed::NUM_OPERATORS]]
        while not self._is_over:
            await asyncio.sleep(rng.uniform(0, 0.5))
            tenant = rng.choice(mine)
            if tenant.is_loaded and rng.random() < 0.4:
                await self._unload(tenant)
            else:
                await self._load(tenant, rng.choice(list(TASKS.values())))

    async def _load(self, tenant: Tenant, task: Task) -> None:
        folder = tenant.name.replace("/", "-")
        self._demo.copy_of(task.id, folder)
        tenant.epoch += 1
        body = {"lora_name": tenant.name, "lora_path": folder, "load_inplace": tenant.is_loaded}
        answer = await self._http.post("/v1/load_lora_adapter", json=body)
        if answer.status_code != 200:
            self._problem(body, answer.text)
            return
        self._tasks[answer.json()["version"]] = task
        self.outcome.num_loads += not tenant.is_loaded
        self.outcome.num_reloads += tenant.is_loaded
        tenant.is_loaded = True
        tenant.epoch += 1

    async def _unload(self, tenant: Tenant) -> None:
        tenant.epoch += 1
        answer = await self._http.post(
            "/v1/unload_lora_adapter", json={"lora_name": tenant.name}, timeout=REQUEST_TIMEOUT_S
        )
        if answer.status_code != 200:
            self._problem(f"unload {tenant}", answer.text)
        self.outcome.num_unloads += 1
        tenant.is_loaded = False
        tenant.epoch += 1

    async def close(self) -> None:
        for tenant in self._tenants.values():
            if tenant.is_loaded:
                await self._unload(tenant)

    # --- onlooker ---

    async def onlooker(self) -> None:
        """Count what is in flight, once all clients are there, and ask the server."""
        await asyncio.sleep(2.0)
        while not self._is_over:
            health = (await self._http.get("/health")).json()
            if health["status"] != "ok":
                self._problem("health", health)
            if not self._is_over:
                self.outcome.in_flight.append(self._in_flight)
                self.outcome.running.append(health["running_requests"])
            await asyncio.sleep(LOOK_S)


async def _events(answer: httpx2.Response) -> AsyncIterator[Any]:
    async for line in answer.aiter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


async def run_load(demo: Served, *, seconds: float, num_clients: int) -> Outcome:
    """Every request has ended, and the tenants are gone again, when this returns."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=num_clients)
    async with httpx2.AsyncClient(
        base_url=demo.url, limits=limits, timeout=REQUEST_TIMEOUT_S, verify=False
    ) as http:
        load = Load(demo, http, seconds)
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for seed in range(num_clients):
                group.create_task(load.client(seed))
            for seed in range(NUM_OPERATORS):
                group.create_task(load.operator(seed))
            group.create_task(load.onlooker())
        load.outcome.seconds = time.monotonic() - started_s
        await load.close()
    return load.outcome
