"""Trace files are read exactly or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trace import Request
from bench.trace_files import TraceError, read_trace, write_trace

BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_2 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OURS = "arrival_s,adapter,tenant,num_prompt_tokens,num_output_tokens\n"


def read(tmp_path: Path, text: str | bytes, name: str = "t.csv", **kwargs: object) -> list[Request]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_trace(path, **kwargs)  # type: ignore[arg-type]


REQUESTS = st.builds(
    Request,
    arrival_s=st.integers(0, 10**12).map(lambda us: us / 1e6),
    adapter=st.none() | st.integers(0, 10**6),
    tenant=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    num_prompt_tokens=st.integers(1, 10**6),
    num_output_tokens=st.integers(1, 10**6),
)


@given(st.lists(REQUESTS, min_size=1, max_size=20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Request]
) -> None:
    trace = sorted(requests, key=lambda request: request.arrival_s)
    path = tmp_path_factory.mktemp("trace") / "deep" / "trace.jsonl"
    write_trace(path, trace, {"rate": 2.0})
    assert read_trace(path) == trace


def test_both_forms_of_burstgpt_are_read_with_times_from_the_first(tmp_path: Path) -> None:
    old = read(
        tmp_path, BURST + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"
    )
    assert old == [
        Request(
            arrival_s=0.0, adapter=None, tenant="ChatGPT", num_prompt_tokens=472,
            num_output_tokens=18,
        ),
        Request(
            arrival_s=40.0, adapter=None, tenant="GPT-4", num_prompt_tokens=1087,
            num_output_tokens=230,
        ),
    ]  # fmt: skip
    new = read(
        tmp_path,
        BURST_2 + "19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log\n"
        '19440161.5,,2,"Chat,GPT",36,29,65,Conversation log\n',
    )
    assert [(r.arrival_s, r.tenant, r.num_prompt_tokens) for r in new] == [
        (0.0, "GPT-4", 906), (51.5, "Chat,GPT", 36),
    ]  # fmt: skip


def test_azures_moments_keep_their_microseconds_across_midnight_and_zones(tmp_path: Path) -> None:
    trace = read(
        tmp_path,
        AZURE + "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:00.0319605,3180,8\n"
        "2023-11-17 01:00:01+01:00,110,27\n2023-11-17T00:00:02Z,7433,14\n",
    )
    assert [r.arrival_s for r in trace] == [0.0, 0.052, 1.02004, 2.02004]
    assert [r.num_prompt_tokens for r in trace] == [4808, 3180, 110, 7433]
    assert [r.num_output_tokens for r in trace] == [10, 8, 27, 14]


def test_rows_are_sorted_and_those_of_one_moment_keep_their_order(tmp_path: Path) -> None:
    trace = read(tmp_path, BURST + "9,b,1,1,2,x\n3,a,2,1,3,x\n9,b,3,1,4,x\n3,a,4,1,5,x\n")
    assert [r.num_prompt_tokens for r in trace] == [2, 4, 1, 3]


def test_our_times_are_kept_and_an_empty_adapter_is_the_base(tmp_path: Path) -> None:
    trace = read(tmp_path, OURS + "2.5,7,ann,8,9\n3,,,8,9\n4,7,,8,9\n")
    assert [(r.arrival_s, r.adapter, r.tenant) for r in trace] == [
        (2.5, 7, "ann"), (3.0, None, "base"), (4.0, 7, "adapter-7"),
    ]  # fmt: skip


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    trace = read(
        tmp_path,
        b"\xef\xbb\xbf" + (AZURE + "2023-11-16 18:17:03,1,2\n").replace("\n", "\r\n").encode(),
    )
    assert trace[0].num_output_tokens == 2


def test_tiny_times_of_json_are_numbers_too(tmp_path: Path) -> None:
    row = '{"arrival_s": 1e-05, "num_prompt_tokens": 1, "num_output_tokens": 1}\n'
    assert read(tmp_path, row, "t.jsonl")[0].arrival_s == 0.00001


def test_failed_requests_are_refused_or_left_out_and_never_sent_empty(tmp_path: Path) -> None:
    text = BURST + "5,a,472,18,490,x\n6,a,10,0,10,x\n7,a,0,0,0,x\n8,a,1,2,3,x\n"
    with pytest.raises(
        TraceError, match=r"line 3, column 'Response tokens': got '0'.*--drop-failed"
    ):
        read(tmp_path, text)
    trace = read(tmp_path, text, drop_failed=True)
    assert [r.num_prompt_tokens for r in trace] == [472, 1]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    trace = read(tmp_path, BURST + "5,a,1,1,2,x\n6,a,2,1,3,x\n7,a,broken\n", limit=2)
    assert [r.num_prompt_tokens for r in trace] == [1, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,a,1,1,2,x", r"line 3, column 'Timestamp': got 'x', allowed: seconds"),
        ("-1,a,1,1,2,x", r"column 'Timestamp': got '-1'"),
        ("nan,a,1,1,2,x", r"column 'Timestamp': got 'nan'"),
        ("1e3,a,1,1,2,x", r"column 'Timestamp': got '1e3'"),
        ("٣,a,1,1,2,x", r"column 'Timestamp'"),
        ("1,a,1.5,1,2,x", r"column 'Request tokens': got '1.5', allowed: a whole number from 1 to"),
        ("1,a,,1,2,x", r"column 'Request tokens': got ''"),
        ("1,a,-4,1,2,x", r"column 'Request tokens': got '-4'"),
        ("1,a,1,99999999999,2,x", r"column 'Response tokens': got '99999999999'"),
        ("1,a,1,1,2", r"line 3: got 5 values, allowed: 6"),
        ("1,a,1,1,2,x,y", r"line 3: got 7 values, allowed: 6"),
        ("", r"line 3: got 0 values"),
        ('1,"a,1,1,2,x', r"line 3: .*allowed: CSV"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(TraceError, match=rf"t\.csv, .*{message}"):
        read(tmp_path, BURST + f"1,a,1,1,2,x\n{row}\n")


@pytest.mark.parametrize(
    "moment",
    ["2023-13-16 18:17:03", "2023-11-16", "16.11.2023 18:17:03", "2023-11-16 25:00:00", "5", ""],
)
def test_a_bad_moment_is_refused(tmp_path: Path, moment: str) -> None:
    with pytest.raises(TraceError, match=r"line 2, column 'TIMESTAMP': got .*, allowed: a date"):
        read(tmp_path, AZURE + f"{moment},1,1\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"arrival_s": 1, "num_prompt_tokens": 1}', r"column 'num_output_tokens': got nothing"),
        ('{"arrival_s": 1, "num_prompt_tokens": 1, "num_output_tokens": 1, "x": 1}', "'x': not"),
        ('{"arrival_s": true, "num_prompt_tokens": 1, "num_output_tokens": 1}', r"got True"),
        ('{"arrival_s": NaN, "num_prompt_tokens": 1, "num_output_tokens": 1}', r"got nan"),
        ('{"arrival_s": 1, "num_prompt_tokens": 1.0, "num_output_tokens": 1}', r"got 1.0"),
        ('{"arrival_s": 1, "arrival_s": 2}', r"column 'arrival_s': given twice"),
        ('{"arrival_s": 1, "num_prompt_tokens": 1, "num_output_tokens": 1, "adapter": -1}', "-1"),
        ('{"arrival_s": 1, "num_prompt_tokens": 1, "num_output_tokens": 1, "tenant": 5}', "got 5"),
        ("[1]", r"got '\[1\]', allowed: a JSON object"),
        ('{"arrival_s": 1,', r"at column \d+, allowed: a JSON object"),
        ('{"header": {}}', r"column 'arrival_s': got nothing"),
    ],
)  # fmt: skip
def test_a_bad_line_of_json_is_refused_with_its_place(
    tmp_path: Path, row: str, message: str
) -> None:
    good = '{"arrival_s": 1, "num_prompt_tokens": 1, "num_output_tokens": 1}'
    with pytest.raises(TraceError, match=rf"t\.jsonl, line 2.*{message}"):
        read(tmp_path, f"{good}\n{row}\n", "t.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "got no request"),
        (BURST.encode(), "got no request"),
        (b"when,what\n1,2\n", r"line 2: got columns \['what', 'when'\], allowed: ours: arrival_s"),
        (b"TIMESTAMP,TIMESTAMP\n", "each column once"),
        (AZURE.encode() + b"2023-11-16 18:17:03,1,\xff\n", "line 2: got byte 0xff, allowed: UTF-8"),
        (AZURE.replace("\n", ",Extra\n").encode() + b"2023-11-16 18:17:03,1,1,1\n", "'Extra': not"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read(tmp_path, text)
