"""Laws of the engine core: what a caller sees of requests, adapters and the end."""

from __future__ import annotations

from sloraj.messages import GetStats
from tests.sloraj.core_driver import EOS, CoreDriver


def test_tokens_are_the_same_alone_and_in_any_mix() -> None:
    driver = CoreDriver()
    driver.loaded("one", "1:3")
    driver.loaded("two", "2:5")
    prompts = [[1, 2, 3], list(range(20)), [4], [5, 6], [9] * 11, [8, 8]]
    adapters = [None, "one", "two", "one", None, "two"]
    contents = {None: 0, "one": 1, "two": 2}
    ids = [driver.generate(p, a, max_tokens=12) for p, a in zip(prompts, adapters, strict=True)]
    driver.run()
    for request_id, prompt, adapter in zip(ids, prompts, adapters, strict=True):
        driver.expect(request_id, prompt, contents[adapter], max_tokens=12)
    driver.expect_clean()


def test_a_stop_id_ends_a_choice_and_is_not_among_its_tokens() -> None:
    driver = CoreDriver(vocab_size=12)
    prompts = [[i, i + 1] for i in range(8)]
    ids = [driver.generate(p, ignore_eos=False, max_tokens=50) for p in prompts]
    driver.run()
    for request_id, prompt in zip(ids, prompts, strict=True):
        driver.expect(request_id, prompt, max_tokens=50, stop_ids=(EOS,))
        answer = driver.answers[request_id, 0]
        assert (answer.stop_token_id == EOS) == (answer.finish_reason == "stop")
    assert "stop" in {a.finish_reason for a in driver.answers.values()}
    assert driver.ask(GetStats)["finished_requests"] == 8
    driver.expect_clean()
