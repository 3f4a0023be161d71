"""POST /v1/completions and /v1/chat/completions: one flow, streaming or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from serving import models
from serving.bridge import Bridge, ClientGone, DisconnectWatch, Generation, Increment
from serving.chat_prompt import chat_prompt
from serving.errors import error_body
from serving.replies import ChatReply, CompletionReply, Reply
from serving.schemas import CompletionRequest, GenerationRequest, parse_chat, parse_completion
from serving.sse import DONE, KEEP_ALIVE, EventStream, encode_json, event
from serving.state import ServerState, read_object, request_id, server_state
from serving.tenants import tenant_of
from sloraj.errors import AdapterNotFound, CapacityError, SlorajError

CLIENT_GONE_STATUS = 499  # nobody reads it; it is what the metrics and the access log say


async def completions(request: Request) -> Response:
    server = server_state(request)
    bridge = server.host.bridge_for_new_work()
    info = bridge.engine.info
    parsed = parse_completion(await read_object(request), info, server.config.max_prompts)
    target = models.resolve(parsed.model, info)
    reply = CompletionReply(
        request_id(request),
        target.name,
        num_choices=len(parsed.prompts) * parsed.params.n,
        n=parsed.params.n,
        return_token_ids=parsed.return_token_ids,
        echoes=await _echoes(bridge, parsed),
    )
    answer = _Answer(request, server, bridge, parsed, target, reply)
    return await answer.run(
        parsed.prompts, add_special_tokens=parsed.add_special_tokens, allow_special=False
    )


async def chat_completions(request: Request) -> Response:
    server = server_state(request)
    bridge = server.host.bridge_for_new_work()
    info = bridge.engine.info
    parsed = parse_chat(await read_object(request), info)
    target = models.resolve(parsed.model, info)
    prompt = await chat_prompt(bridge, server.templates, parsed)
    reply = ChatReply(
        request_id(request),
        target.name,
        num_choices=parsed.params.n,
        n=parsed.params.n,
        return_token_ids=parsed.return_token_ids,
    )
    answer = _Answer(request, server, bridge, parsed, target, reply)
    return await answer.run(
        [prompt], add_special_tokens=parsed.add_special_tokens, allow_special=True
    )


async def _echoes(bridge: Bridge, parsed: CompletionRequest) -> list[str] | None:
    if not parsed.echo:
        return None
    decode = bridge.engine.tokenizer.decode

    def texts() -> list[str]:
        return [
            prompt if isinstance(prompt, str) else decode(prompt, skip_special_tokens=False)
            for prompt in parsed.prompts
        ]

    return await bridge.call(texts)


class _Answer:
    """One request from submission to its last byte. The status is decided by the first output."""

    def __init__(
        self,
        request: Request,
        server: ServerState,
        bridge: Bridge,
        parsed: GenerationRequest,
        target: models.Target,
        reply: Reply,
    ) -> None:
        self._request = request
        self._server = server
        self._bridge = bridge
        self._parsed = parsed
        self._target = target
        self._reply = reply
        self._timer: asyncio.TimerHandle | None = None
        self._watch: DisconnectWatch | None = None
        self._generation: Generation | None = None

    async def run(
        self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool, allow_special: bool
    ) -> Response:
        tenant = tenant_of(
            self._server.config.tenant_from, self._request.headers, self._parsed.user
        )
        generation = self._start(len(prompts))
        try:
            await generation.submit(
                prompts,
                self._parsed.params,
                self._target.adapter_id,
                add_special_tokens=add_special_tokens,
                allow_special=allow_special,
                priority=self._parsed.priority,
                tenant=tenant,
                first_token_slo_s=self._parsed.first_token_slo_s,
            )
            self._reply.num_prompt_tokens = generation.num_prompt_tokens
            first = await generation.next()
            self._server.metrics.first_token(generation.arrival_s)
            self._reply.adapter_version = first[1].adapter_version
            if self._parsed.stream.is_stream:
                generation.max_queued = (
                    self._server.config.max_buffered_events * generation.num_open_choices
                )
                return EventStream(
                    self._events(generation, first),
                    headers=self._headers(),
                    send_timeout_s=self._server.config.send_timeout_s,
                    on_close=self._finish,
                )
            return await self._whole(generation, first)
        except ClientGone:
            self._finish()
            return Response(status_code=CLIENT_GONE_STATUS)
        except AdapterNotFound as exc:
            self._finish()
            raise await models.not_found(self._bridge, self._target.name) from exc
        except BaseException:
            self._finish()
            raise

    def _start(self, num_prompts: int) -> Generation:
        generation = self._bridge.generation(
            request_id(self._request), num_prompts, self._parsed.params.n
        )
        self._generation = generation
        self._watch = DisconnectWatch(self._request.receive, lambda: generation.fail(ClientGone()))
        timeout_s = self._server.config.request_timeout_s
        if timeout_s is not None:
            late = CapacityError(f"the request took longer than {timeout_s:g} s")
            self._timer = asyncio.get_running_loop().call_later(timeout_s, generation.fail, late)
        return generation

    def _finish(self) -> None:
        """Free everything this request holds. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.stop()
        if self._generation is not None:
            generation, self._generation = self._generation, None
            generation.close()
            self._server.metrics.finished(
                self._target.adapter_id,
                [choice.finish_reason or "abort" for choice in self._reply.choices],
                self._reply.usage,
                time.monotonic() - generation.arrival_s,
            )

    def _headers(self) -> dict[str, str]:
        version = self._reply.adapter_version
        return {"x-sloraj-adapter-version": version} if version else {}

    async def _whole(self, generation: Generation, first: Increment) -> Response:
        self._reply.add(*first)
        while generation.num_open_choices:
            self._reply.add(*await generation.next())
        self._finish()
        body = encode_json(self._reply.whole())
        return Response(body, media_type="application/json", headers=self._headers())

    async def _events(self, generation: Generation, first: Increment) -> AsyncIterator[bytes]:
        """The stream's bytes, each event in one piece. An error after the 200 is the last event."""
        options, reply = self._parsed.stream, self._reply
        increment = first
        try:
            while True:
                bodies = reply.chunks(*increment, with_usage=options.continuous_usage)
                yield b"".join(event(body) for body in bodies)
                if not generation.num_open_choices:
                    break
                while (got := await self._next(generation)) is None:
                    yield KEEP_ALIVE
                increment = got
            if options.include_usage:
                yield event(reply.usage_chunk())
        except SlorajError as exc:
            yield event(error_body(exc))
        yield DONE

    async def _next(self, generation: Generation) -> Increment | None:
        """The next increment, or None when it is time to show that the connection lives."""
        interval_s = self._server.config.sse_keep_alive_s
        if not interval_s:
            return await generation.next()
        try:
            async with asyncio.timeout(interval_s):
                return await generation.next()
        except TimeoutError:
            return None
