"""The teacher over a real HTTP server that fails, stalls, talks nonsense and counts."""

import contextlib
import datetime
import email.utils
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from ovr_megatron.config import ConfigError, DataConfig, RewardConfig, RewardJudgeConfig, SourceConfig
from ovr_megatron.config.endpoint import TRANSPORT_FIELDS
from ovr_megatron.curation import teacher
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.reward_rules import judge_settings
from ovr_megatron.curation.settings import PrepareConfig, TeacherConfig
from ovr_megatron.evaluation.judge_settings import JudgeConfig
from ovr_megatron.runtime.chat_messages import Completion, Question
from ovr_megatron.runtime.chat_replies import retry_after
from ovr_megatron.runtime.endpoint import Endpoint, EndpointError, _completions
from ovr_megatron.runtime.terminal import printable
from tests.curation.teacher_server import KEY, Teacher


@pytest.fixture
def server() -> Iterator[Teacher]:
    with Teacher() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def config(tmp_path: Path, server: Teacher, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    prompts = [{"messages": [{"role": "user", "content": f"add {i} 1"}], "answer": str(i + 1)} for i in range(12)]
    answered = {"messages": [{"role": "user", "content": "add 0 0"}, {"role": "assistant", "content": "x</think>y"}]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*prompts, answered]))
    port = server.server_address[1]
    return PrepareConfig(
        dir=str(tmp_path / "out"),
        stages=["collect", "teacher"],
        data=DataConfig(sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"))]),
        teacher=TeacherConfig(
            base_url=f"http://127.0.0.1:{port}/v1",
            model="sage",
            key_env="TEACHER_KEY",
            concurrency=3,
            attempts=4,
            backoff_s=0.01,
            timeout_s=5.0,
        ),
    )


def rows(config: PrepareConfig) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (Path(config.dir) / "teacher/rows.jsonl").read_text().splitlines()]


def report(config: PrepareConfig) -> dict[str, Any]:
    return json.loads((Path(config.dir) / "teacher/report.json").read_text())


def test_failures_are_asked_again_and_what_stays_wrong_is_counted(config: PrepareConfig, server: Teacher) -> None:
    server.script |= {
        "add 1 1": [429, 500, "garbage"],
        "add 2 1": ["drop", "empty", 503],
        "add 3 1": [429] * 4,
        "add 4 1": [400],
        "add 5 1": ["long"],
    }
    prepare(config)
    told = report(config)
    assert told["kept"] == 10
    assert told["dropped"] == {"no answer": 1, "refused by the teacher": 1, "answer cut off": 1}
    assert "4 attempts, the last: HTTP 429" in told["examples"]["no answer"][0]["error"]
    assert [server.asked[f"add {i} 1"] for i in range(7)] == [1, 4, 4, 4, 1, 1, 1]
    assert 1 < server.most_busy <= 3
    assert told["tokens"] == 100 * 10
    found = rows(config)
    assert found[0]["messages"][1]["content"] == "0 and 1 make 1.\n</think>\n\nIt is \\boxed{1}."
    assert [row["answer"] for row in found[:-1]] == [str(i + 1) for i in range(12) if i not in (3, 4, 5)]
    assert found[-1]["messages"][1]["content"] == "x</think>y"
    assert {body["model"] for body in server.bodies} == {"sage"}


def test_the_key_is_nowhere(config: PrepareConfig, server: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script |= {"add 1 1": [400], "add 2 1": [500] * 4}
    prepare(config)
    files = [path.read_bytes() for path in Path(config.dir).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(KEY.encode() in data for data in files)
    server.script["*"] = [403]
    with pytest.raises(EndpointError, match=r"403.*\*\*\*.*correct teacher.base_url") as error:
        prepare(replace(config, teacher=replace(config.teacher, model="other")))
    assert KEY not in str(error.value)
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match=r"teacher.key_env=TEACHER_KEY: this environment variable is not set"):
        prepare(replace(config, teacher=replace(config.teacher, model="other")))


def test_nothing_is_asked_twice_over_budgets_and_failures(config: PrepareConfig, server: Teacher) -> None:
    poor = replace(config, teacher=replace(config.teacher, max_requests=5, concurrency=1))
    prepare(poor)
    assert (sum(server.asked.values()), report(poor)["dropped"]) == (5, {"over budget": 7})
    tokens = replace(config, teacher=replace(config.teacher, max_total_tokens=800, concurrency=1))
    prepare(tokens)
    assert (sum(server.asked.values()), report(tokens)["dropped"]) == (8, {"over budget": 4})
    server.script["*"] = [503] * 100
    down = replace(config, teacher=replace(config.teacher, attempts=1, concurrency=1))
    prepare(down)  # four questions fail, which is too few to give up
    assert report(down)["dropped"] == {"no answer": 4}
    server.script["*"] = []
    journal = Path(config.dir) / "teacher/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])  # the end of an interrupted write
    asked = sum(server.asked.values())
    prepare(config)
    assert sum(server.asked.values()) == asked + 5
    assert report(config)["kept"] == 13
    assert max(server.asked.values()) <= 3


def test_an_endpoint_that_only_fails_ends_the_run(config: PrepareConfig, server: Teacher) -> None:
    server.script["*"] = [503] * 1000
    failing = replace(config, teacher=replace(config.teacher, attempts=1, concurrency=2))
    with pytest.raises(EndpointError, match=r"the last 9 questions .* failed, .*HTTP 503.*run again"):
        prepare(failing)


def test_answers_are_not_lost_to_the_refusal_of_another_question() -> None:
    refused: Future[Completion | None] = Future()
    refused.set_exception(EndpointError("HTTP 403"))
    futures: list[Future[Completion | None]] = [refused, Future(), Future(), Future()]
    for number, future in enumerate(futures[1:]):
        future.set_result(Completion(number, text="yes"))
    at_work: Future[Completion | None] = Future()
    completions = _completions(futures[:3], [futures[3], at_work])
    assert [next(completions).key for _ in range(3)] == [0, 1, 2]
    with pytest.raises(EndpointError, match="HTTP 403"):
        next(completions)
    answered, failed = Completion(7, text="yes"), Completion(8, error="HTTP 503", final=False)
    futures = [Future(), Future()]
    futures[0].set_result(failed)
    futures[1].set_result(answered)
    assert list(_completions(futures)) == [answered, failed]  # a failure may be the one that ends the run


def test_no_stage_starts_anew_for_another_address_key_or_speed() -> None:
    other: dict[str, Any] = {name: 3 for name in TRANSPORT_FIELDS} | {
        "base_url": "http://host/v1",
        "key_env": "KEY",
        "allow_http": True,
    }
    judge = RewardJudgeConfig(base_url="http://127.0.0.1/v1", model="m")
    config = PrepareConfig(dir="d", stages=["collect"], data=DataConfig(sources=[SourceConfig(path="rows.jsonl")]))
    changed = replace(config, teacher=replace(config.teacher, **other))
    assert teacher.settings(changed) == teacher.settings(config)
    assert teacher.settings(replace(config, teacher=replace(config.teacher, attempts=9))) != teacher.settings(config)
    judges = [RewardConfig(judges={"j": settings}) for settings in (judge, replace(judge, **other))]
    assert judge_settings(judges[0]) == judge_settings(judges[1])


def test_samples_and_images(config: PrepareConfig, server: Teacher, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "add 2 2"}]
    row = {"messages": [{"role": "user", "content": parts}], "answer": "4", "id": "p"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    two = replace(config, teacher=replace(config.teacher, samples=2))
    prepare(two)
    assert [found["id"] for found in rows(two)] == ["p#0", "p#1"]
    urls = {body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies}
    assert len(urls) == 1 and urls.pop().startswith("data:image/png;base64,iVBOR")
    assert len({body["seed"] for body in server.bodies}) == 2


@pytest.mark.parametrize("step", ["drip", "drip head"])
def test_a_request_has_an_end_however_slowly_the_endpoint_drips(
    config: PrepareConfig, server: Teacher, step: str
) -> None:
    server.script["add 1 1"] = [step]
    began = time.monotonic()
    prepare(replace(config, teacher=replace(config.teacher, timeout_s=1.0, attempts=1)))
    assert time.monotonic() - began < 60
    [example] = report(config)["examples"]["no answer"]
    assert "no whole answer after 1 s" in example["error"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def question(number: int) -> Question:
    return Question(number, [{"role": "user", "content": f"add {number} 1"}], 0)


def test_the_clients_of_late_requests_are_closed_and_drain_closes_the_others(
    config: PrepareConfig, server: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[httpx.Client] = []

    class RecordedClient(httpx.Client):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            clients.append(self)

    monkeypatch.setattr(httpx, "Client", RecordedClient)
    server.script["*"] = ["drip"] * 8
    endpoint = Endpoint(replace(config.teacher, timeout_s=0.3, attempts=4, concurrency=2))
    for future in [endpoint.submit(question(number)) for number in range(2)]:
        completion = future.result()
        assert completion is not None and not completion.final
    # A thread may learn that the request was late before the wait for it ends, and keep its client.
    wait_until(lambda: sum(not client.is_closed for client in clients) <= 2)
    assert len(clients) > 2
    endpoint.submit(question(3)).result()
    assert not all(client.is_closed for client in clients)
    endpoint.drain(30.0)
    assert all(client.is_closed for client in clients)


def test_an_address_that_never_accepts_takes_the_time_limit(config: PrepareConfig) -> None:
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # The queue of connections is full: the kernel answers no further one.
        for _ in range(3):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        endpoint = Endpoint(replace(config.teacher, base_url=address, timeout_s=0.5, attempts=2, backoff_s=0.01))
        completion = endpoint.submit(question(1)).result()
        endpoint.drain(30.0)
    assert completion is not None and completion.error == "2 attempts, the last: no whole answer after 0.5 s"


def test_draining_ends_the_wait_for_the_next_attempt(config: PrepareConfig, server: Teacher) -> None:
    server.script["add 1 1"] = [503] * 4
    endpoint = Endpoint(replace(config.teacher, backoff_s=600.0, max_backoff_s=600.0))
    future = endpoint.submit(question(1))
    wait_until(lambda: server.asked["add 1 1"] == 1)
    endpoint.drain(60.0)
    assert future.done()
    completion = future.result()
    assert completion is not None and (completion.error or "").startswith("1 attempt, the last: HTTP 503")


def test_an_endless_answer_is_cut(config: PrepareConfig, server: Teacher) -> None:
    server.script["add 1 1"] = ["flood"]
    prepare(replace(config, teacher=replace(config.teacher, timeout_s=60.0, attempts=1, max_tokens=16)))
    [example] = report(config)["examples"]["no answer"]
    assert "the answer is longer than 1,052,672 bytes" in example["error"]


def test_a_wait_that_the_endpoint_asks_for_has_a_bound(config: PrepareConfig, server: Teacher) -> None:
    server.retry_after = "1000000"
    server.script["add 1 1"] = [429]
    began = time.monotonic()
    prepare(replace(config, teacher=replace(config.teacher, max_backoff_s=0.1)))
    assert time.monotonic() - began < 60 and report(config)["kept"] == 13


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("3", 3, 3), ("-1", 0, 0), ("nan", 0, 0), ("inf", 0, 0), ("1e999", 0, 0), ("soon", 0, 0), ("", 0, 0)],
)
def test_seconds_of_retry_after(text: str, low: float, high: float) -> None:
    assert low <= retry_after(text) <= high


def test_dates_of_retry_after() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    assert 80 <= retry_after(email.utils.format_datetime(later, usegmt=True)) <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_numbers_of_an_endpoint_are_not_believed(config: PrepareConfig, server: Teacher) -> None:
    """Tokens are what the texts allow, so that neither a lie nor a mistake spends the budget or fills it."""
    claims = [-1_000_000, 10**15, "many", None, True, 1.5]
    for number, claim in enumerate(claims):
        server.script[f"add {number} 1"] = [{"total_tokens": claim}]
    server.script["add 6 1"] = ["deep"]
    prepare(replace(config, teacher=replace(config.teacher, max_tokens=1000)))
    assert report(config)["kept"] == 13
    tokens = [json.loads(line)["tokens"] for line in (Path(config.dir) / "teacher/journal.jsonl").open()]
    assert len(tokens) == 12 and all(0 < count < 2000 for count in tokens) and max(tokens) > 1000


def test_a_redirect_does_not_take_the_key_along(config: PrepareConfig, server: Teacher) -> None:
    server.script["*"] = ["redirect"] * 100
    with pytest.raises(EndpointError, match=r"HTTP 307.*it leads elsewhere"):
        prepare(config)


def test_control_characters_of_an_endpoint_reach_no_terminal(config: PrepareConfig, server: Teacher) -> None:
    failing = replace(config, teacher=replace(config.teacher, model="m\x1b[2Jm", attempts=1))
    server.script["*"] = [403]
    with pytest.raises(EndpointError) as error:
        prepare(failing)
    assert "\x1b" not in printable(error.value) and "\\x1b[2J" in printable(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://user:hunter2@host/v1", "has a password in it"),
        ("https://hunter2@host/v1", "has a password in it"),
        ("https://host/v1?api_key=hunter2", "has api_key in its query"),
        ("http://host.example/v1", "a key would go unencrypted to host.example"),
        ("http://10.0.0.1/v1", "unencrypted to 10.0.0.1"),
        ("file:///etc/passwd", "is no address"),
        ("host/v1", "is no address"),
        ("https://host:port/v1", "is no address"),
    ],
)
@pytest.mark.parametrize("judges", [False, True])
def test_an_address_that_would_show_a_secret_is_refused(url: str, message: str, judges: bool) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        if judges:
            JudgeConfig(judge=f"{url}#model", key_env="KEY")
        else:
            TeacherConfig(base_url=url, model="m", key_env="KEY")
    assert "hunter2" not in str(error.value)


def test_addresses_that_are_allowed() -> None:
    for url in ("https://host/v1", "https://host/v1?api-version=3", "http://127.0.0.1:8000/v1", "http://[::1]/v1"):
        TeacherConfig(base_url=url, model="m", key_env="KEY")
    TeacherConfig(base_url="http://host/v1", model="m")
    TeacherConfig(base_url="http://host/v1", model="m", key_env="KEY", allow_http=True)
    JudgeConfig(judge="http://host/v1#m", key_env="KEY", allow_http=True)


@pytest.mark.parametrize("key", ["temperature", "timeout_s", "backoff_s", "max_backoff_s", "concurrency", "attempts"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 1e300])
def test_numbers_that_cannot_work_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.{key}="):
        TeacherConfig(**{key: value})
