"""Training rows for the demo model: random prompts with computed answers, packed several to a row.

A sample is `first token, prompt bytes, answer bytes, <eos>`. The first token is <bos>; while the
base model is trained it may be a task's *tag* instead, an extra embedding that exists only in
training. A byte's token id is its value.

Held-out texts are chosen by a hash of the text (one in eight), so that no seed can mix them with
the training texts.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from checkpoints.demo.tasks import BASE_TASK, TASKS, prompt, random_text

BOS_TOKEN_ID = 256
EOS_TOKEN_ID = 257
VOCAB_SIZE = (
    264  # 256 bytes, <bos>, <eos>, and six unused rows: a multiple of 8 splits over devices
)
TASK_IDS = tuple(TASKS)
NUM_TRAINING_TOKENS = VOCAB_SIZE + len(TASK_IDS)  # with one tag per task

# How often the base is shown a task, relative to the others: what needs counting takes longest.
_SHARES = {
    BASE_TASK.id: 5.0,
    "reverse": 4.0,
    "reverse-words": 4.0,
    "stutter": 2.0,
    "double": 1.5,
    "drop-vowels": 1.5,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Packed samples; S is the row length. Position i predicts `tokens[:, i + 1]`.

    tokens     u16 [N, S + 1]
    segments   u8 [N, S]: number of the sample within its row, from 1; 0 = padding
    in_answer  bool [N, S]: the token to predict belongs to an answer or is its <eos>
    """

    tokens: np.ndarray
    segments: np.ndarray
    in_answer: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
        """All three arrays changed alike."""
        return Rows(change(self.tokens), change(self.segments), change(self.in_answer))


def tag_token(task_id: str) -> int:
    """First token of a sample while the base is trained: a task's tag, <bos> for the base."""
    return BOS_TOKEN_ID if task_id == BASE_TASK.id else VOCAB_SIZE + TASK_IDS.index(task_id)


def is_held_out(text: str) -> bool:
    """Whether `text` is kept for measuring accuracy and never trained on."""
    return zlib.crc32(text.encode()) % 8 == 0


def _texts(rng: random.Random, *, held_out: bool) -> Iterator[str]:
    while True:
        text = random_text(rng)
        if is_held_out(text) == held_out:
            yield text


def mixed_samples(rng: random.Random) -> Iterator[tuple[int, str, str]]:
    """(first token, prompt, answer) of all tasks under their tags, from the training texts."""
    tasks = [BASE_TASK, *TASKS.values()]
    shares = [_SHARES.get(task.id, 1.0) for task in tasks]
    tags = {task.id: tag_token(task.id) for task in tasks}
    texts = _texts(rng, held_out=False)
    while True:
        for task in rng.choices(tasks, shares, k=256):
            text = next(texts)
            yield tags[task.id], prompt(text), task.answer(text)


def task_samples(
    rng: random.Random, task_id: str, *, held_out: bool = False
) -> Iterator[tuple[int, str, str]]:
    """(<bos>, prompt, answer) of one task: what a client of its adapter sends and gets."""
    task = BASE_TASK if task_id == BASE_TASK.id else TASKS[task_id]
    for text in _texts(rng, held_out=held_out):
        yield BOS_TOKEN_ID, prompt(text), task.answer(text)


def pack(samples: Iterator[tuple[int, str, str]], num_rows: int, row_length: int) -> Rows:
    """Fill `num_rows` rows with samples, in order; one that no longer fits opens the next row."""
    rows = Rows(
        np.zeros((num_rows, row_length + 1), np.uint16),
        np.zeros((num_rows, row_length), np.uint8),
        np.zeros((num_rows, row_length), np.bool_),
    )
    row, start, segment = 0, 0, 0
    for first, question, answer in samples:
        body = np.frombuffer((question + answer).encode(), np.uint8)
        length = len(body) + 2
        if start + length > row_length + 1:
            row, start, segment = row + 1, 0, 0
            if row == num_rows:
                break
        segment += 1
        tokens = rows.tokens[row, start : start + length]
        tokens[0], tokens[1:-1], tokens[-1] = first, body, EOS_TOKEN_ID
        # The last token (<eos>) is predicted but never read, so its place stays padding.
        rows.segments[row, start : start + length - 1] = segment
        rows.in_answer[row, start + len(question) : start + length - 1] = True
        start += length
    return rows


def pack_mixed(seed: str, num_rows: int, row_length: int) -> Rows:
    """Rows of all tasks under their tags (run in a worker process)."""
    return pack(mixed_samples(random.Random(seed)), num_rows, row_length)


def pack_task(seed: str, task_id: str, num_rows: int, row_length: int) -> Rows:
    """Training rows of one task without a tag (run in a worker process)."""
    return pack(task_samples(random.Random(seed), task_id), num_rows, row_length)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of `parts`, in order."""
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.segments for part in parts]),
        np.concatenate([part.in_answer for part in parts]),
    )


class Generator:
    """Worker processes that pack rows ahead of the training loop."""

    def __init__(self, num_workers: int) -> None:
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("spawn")
        )

    def chunks(
        self, parts_of: Callable[[int], Sequence[tuple[object, ...]]], num_chunks: int
    ) -> Iterator[Rows]:
        """Yield chunk 0, 1, ..., each made two chunks ahead.

        `parts_of(i)` names chunk i's parts as (function, *arguments), each run in a worker.
        """
        pending: list[list[Future[Rows]]] = []
        for index in range(num_chunks + 2):
            if index < num_chunks:
                pending.append([self._pool.submit(*part) for part in parts_of(index)])  # type: ignore[arg-type]
            if index >= 2:
                yield concatenate([future.result() for future in pending.pop(0)])

    def close(self) -> None:
        """Stop the workers; what they were making is dropped."""
        self._pool.shutdown(cancel_futures=True)
