"""The HTTP API over real sockets: OpenAI's objects, errors, limits, disconnecting clients."""

import json
import socket
import threading
from typing import Any

import openai
import pytest
from live_server import CAPACITY, JSON, MAX_BODY, QUEUE, SLOTS

from gptjax.sample import SamplingParams, decoding
from gptjax.serve.metrics import Metrics
from gptjax.serve.worker import Worker
from gptjax.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")


def events(body: bytes) -> list[Any]:
    """The data of server-sent events; None for [DONE]."""
    parts = body.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    data = [part.removeprefix("data: ") for part in parts]
    return [None if one == "[DONE]" else json.loads(one) for one in data]


def stream(server, **fields: Any) -> list[Any]:
    body = json.dumps({**fields, "stream": True}).encode()
    status, headers, answer = server.send("/v1/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    return events(answer)


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )


@pytest.mark.slow
def test_prefill_is_compiled_before_the_server_is_ready(make_sampler, on_mesh, monkeypatch) -> None:
    shapes, prefill = [], decoding.prefill
    spy = lambda p, chunk, *rest: shapes.append(chunk[0].shape) or prefill(p, chunk, *rest)
    monkeypatch.setattr(decoding, "prefill", spy)
    with on_mesh():
        worker = Worker(make_sampler(), Metrics(), slots=1, capacity=CAPACITY, queue=1)
        worker.start()
    try:
        assert len(shapes) == 1
    finally:
        worker.stop(30)


# --- completions -----------------------------------------------------------------------------


def test_completion_has_the_fields_of_openai(server) -> None:
    status, answer = server.complete(prompt="abc", max_tokens=5, logprobs=2)
    assert status == 200
    assert answer.keys() == {"id", "object", "created", "model", "seed", "choices", "usage"}
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "text", "finish_reason", "logprobs"}
    drawn = answer["usage"]["completion_tokens"]
    # The prompt is three bytes after the EOS with which documents begin.
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": drawn,
        "total_tokens": 4 + drawn,
    }
    assert {len(column) for column in choice["logprobs"].values()} == {drawn}
    assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])


def test_defaults_are_those_of_openai(server) -> None:
    _, plain = server.complete(prompt="abc", seed=4, logit_bias={"256": -100})
    defaults = {"temperature": 1, "max_tokens": 16, "top_p": 1, "n": 1, "stream": False}
    _, same = server.complete(
        model="tiny", prompt="abc", seed=4, logit_bias={"256": -100}, **defaults, echo=False
    )
    assert plain["choices"] == same["choices"]
    assert plain["usage"]["completion_tokens"] == 16
    assert plain["choices"][0]["finish_reason"] == "length"
    assert plain["choices"][0]["logprobs"] is None


def test_random_seed_is_returned_and_reproduces_the_completion(server) -> None:
    answers = [server.complete(prompt="abc", n=2)[1] for _ in range(2)]
    first, second = (answer["seed"] for answer in answers)
    assert first != second
    assert answers[0]["choices"] != answers[1]["choices"]
    _, again = server.complete(prompt="abc", n=2, seed=first)
    assert again["choices"] == answers[0]["choices"]


def test_every_form_of_prompt_is_completed_in_order(server) -> None:
    eos = server.served.sampler.ids("")[0]
    ids = [eos, *b"abc"]
    common = {"temperature": 0, "max_tokens": 6}
    _, text = server.complete(prompt="abc", **common)
    _, as_ids = server.complete(prompt=ids, **common)
    _, several = server.complete(prompt=["xy", "abc"], **common)
    _, several_ids = server.complete(prompt=[[eos, *b"xy"], ids], **common)
    assert as_ids["choices"] == text["choices"]
    assert several["choices"] == several_ids["choices"]
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
    assert several["choices"][1]["text"] == text["choices"][0]["text"]
    assert several["usage"]["prompt_tokens"] == 3 + 4


@pytest.mark.slow
def test_samples_of_several_prompts_equal_those_of_the_sampler(server, on_mesh) -> None:
    """With more continuations than slots."""
    sampler, prompts = server.served.sampler, ["ab", "c"]
    with on_mesh():
        settings = SamplingParams(max_tokens=6, samples=2, seed=3, top_p=0.9)
        wanted = [one.text for one in sampler.generate(prompts, settings)]
    assert len(wanted) > SLOTS
    _, answer = server.complete(prompt=prompts, max_tokens=6, n=2, seed=3, top_p=0.9)
    assert [choice["text"] for choice in answer["choices"]] == wanted


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0},
        {"top_k": 1},
        {"min_p": 0.99},
        {"top_p": 0.001},
        {"presence_penalty": 50},
        {"frequency_penalty": 50},
        {"repetition_penalty": 50},
        {"logit_bias": {"97": 100}},
    ],
)
def test_each_sampling_param_changes_the_completion(server, setting: dict[str, Any]) -> None:
    common = {"prompt": "abc", "seed": 7, "max_tokens": 12}
    _, plain = server.complete(**common)
    _, other = server.complete(**common, **setting)
    assert other["choices"] != plain["choices"]


ASCII = {str(i): -100 for i in range(128, 258)}
"""Biases that leave only bytes that are a character each, without EOS."""


def test_text_ends_before_a_stop_text(server) -> None:
    common = {"prompt": "abc", "seed": 7, "max_tokens": 40, "logit_bias": ASCII, "logprobs": 0}
    _, plain = server.complete(**common)
    text, tokens = plain["choices"][0]["text"], plain["choices"][0]["logprobs"]["tokens"]
    assert "".join(tokens) == text
    stop = text[20:23]
    assert text.find(stop) == 20
    for given in (stop, [stop, "never met"]):
        _, answer = server.complete(**common, stop=given)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[:20], "stop")
        assert answer["usage"]["completion_tokens"] == 23
        assert choice["logprobs"]["tokens"] == tokens[:20]
        assert choice["logprobs"]["text_offset"] == list(range(20))


def test_stop_text_frees_the_slot_while_other_samples_continue(server) -> None:
    fields = {"prompt": "abc", "seed": 7, "logit_bias": ASCII, "n": SLOTS}
    _, plain = server.complete(**fields, max_tokens=40)
    stop = plain["choices"][0]["text"][8:12]
    assert all(stop not in choice["text"] for choice in plain["choices"][1:])
    server.throttle.seconds = 0.02
    connection = server.connect()
    body = json.dumps({**fields, "max_tokens": 1000, "stop": stop})
    connection.request("POST", "/v1/completions", body, JSON)
    server.until(lambda: server.metric("gptjax_rows_busy") == SLOTS)
    server.until(lambda: server.metric("gptjax_rows_busy") == SLOTS - 1)
    connection.close()


def test_streamed_tokens_come_with_their_text(server) -> None:
    """Even if some is held back because a stop text may begin there."""
    common = {"prompt": "abc", "seed": 7, "max_tokens": 20, "logit_bias": ASCII}
    _, whole = server.complete(**common)
    text = whole["choices"][0]["text"]
    stop = text[8:11] + "\x80"
    chunks = [p["choices"][0] for p in stream(server, **common, stop=stop, logprobs=0)[:-1]]
    assert max(len(chunk["text"]) for chunk in chunks) >= 3
    assert all("".join(chunk["logprobs"]["tokens"]) == chunk["text"] for chunk in chunks)
    assert "".join(chunk["text"] for chunk in chunks) == text


def test_eos_token_finishes_and_has_its_vocabulary_entry_as_text(server) -> None:
    eos = server.served.sampler.ids("")[0]
    _, answer = server.complete(prompt="abc", logit_bias={str(eos): 100}, logprobs=1)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<eos>"]
    assert answer["usage"]["completion_tokens"] == 1


# --- streams ---------------------------------------------------------------------------------


def test_stream_adds_up_to_the_whole_completion(server) -> None:
    fields = {"prompt": ["ab", "c"], "n": 2, "seed": 5, "max_tokens": 9, "logprobs": 3}
    _, whole = server.complete(**fields, stop="q")
    *chunks, last, done = stream(server, **fields, stop="q", stream_options={"include_usage": True})
    assert done is None
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {(p["id"], p["seed"], p["object"]) for p in [*chunks, last]} == {
        (chunks[0]["id"], 5, "text_completion")
    }
    for wanted in whole["choices"]:
        own = [p["choices"][0] for p in chunks if p["choices"][0]["index"] == wanted["index"]]
        assert "".join(chunk["text"] for chunk in own) == wanted["text"]
        assert [chunk["finish_reason"] for chunk in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == wanted["finish_reason"]
        for column, values in wanted["logprobs"].items():
            assert [one for chunk in own for one in chunk["logprobs"][column]] == values


def test_a_prompt_that_ends_in_a_space_is_told(server, monkeypatch) -> None:
    assert "warnings" not in server.complete(prompt="ab ", max_tokens=2)[1]  # its tokens are bytes
    monkeypatch.setattr(ByteTokenizer, "encode", lambda _, text: [*b"^", *text.encode()])
    _, whole = server.complete(prompt=["ab", "ab "], max_tokens=2)
    (note,) = whole["warnings"]
    assert note.startswith("prompt 'ab ' ends in a space")
    assert stream(server, prompt="ab ", max_tokens=2)[0]["warnings"] == [note]
    assert "warnings" not in server.complete(prompt=["ab", [7]], max_tokens=2)[1]


def test_stream_is_sent_chunk_by_chunk(server) -> None:
    """The first chunk is read while the engine is paused."""
    connection = server.connect()
    body = json.dumps({"prompt": "a", "max_tokens": 900, "stream": True})
    server.throttle.seconds = 0.01
    connection.request("POST", "/v1/completions", body, JSON)
    response = connection.getresponse()
    first = response.readline()
    server.throttle.running.clear()
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["finish_reason"] is None
    assert server.metric("gptjax_rows_busy") == 1
    connection.close()


# --- OpenAI's own client ---------------------------------------------------------------------


def test_openai_client_completes_and_streams(server, client) -> None:
    done = client.completions.create(
        model="tiny", prompt="abc", max_tokens=8, logprobs=1, seed=1, extra_body={"top_k": 50}
    )
    assert isinstance(done.choices[0].text, str)
    assert len(done.choices[0].logprobs.tokens) == done.usage.completion_tokens
    chunks = list(
        client.completions.create(
            model="tiny", prompt="abc", max_tokens=8, seed=1, stream=True, extra_body={"top_k": 50}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text
    assert chunks[-1].choices[0].finish_reason == done.choices[0].finish_reason
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_client_raises_its_own_errors(server, client) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="tiny", prompt="abc", temperature=-1)
    assert refusal.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model="other", prompt="abc")
    assert refusal.value.code == "model_not_found"


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "a", "tempratur": 1, "best": 2}, "best", ["best, tempratur", "temperature"]),
        ({}, "prompt", ["prompt: is required"]),
        ({"prompt": []}, "prompt", ["prompt=[]", "not empty"]),
        ({"prompt": [[]]}, "prompt", ["prompt 0: is empty"]),
        ({"prompt": ["a", 1]}, "prompt", ["must be a text, token ids"]),
        ({"prompt": [True]}, "prompt", ["must be a text, token ids"]),
        ({"prompt": [1, 264]}, "prompt", ["outside 0..263"]),
        ({"prompt": "a", "temperature": -1}, "temperature", ["temperature=-1", "not be negative"]),
        ({"prompt": "a", "temperature": "1"}, "temperature", ['temperature="1"', "a number"]),
        ({"prompt": "a", "temperature": 1e999}, None, ["Infinity"]),
        ({"prompt": "a", "top_p": 0}, "top_p", ["top_p=0", "above 0"]),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", ["max_tokens=0", "at least 1"]),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", ["an integer"]),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", ["an integer"]),
        ({"prompt": "a", "max_tokens": CAPACITY}, "max_tokens", [f"at most {CAPACITY - 2} fit"]),
        ({"prompt": "a" * CAPACITY}, "prompt", ["leave no space", str(CAPACITY)]),
        ({"prompt": "a", "n": 0}, "n", ["n=0", f"from 1 to {QUEUE}"]),
        ({"prompt": ["a", "b"], "n": QUEUE}, "n", ["2 prompts", f"1 to {QUEUE // 2}"]),
        ({"prompt": ["a"] * (QUEUE + 1)}, "prompt", [str(QUEUE)]),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop", ["at most 4"]),
        ({"prompt": "a", "stop": ""}, "stop", ["must not be empty"]),
        ({"prompt": "a", "stop": 3}, "stop", ["stop=3"]),
        ({"prompt": "a", "logprobs": 21}, "logprobs", ["from 0 to 20"]),
        ({"prompt": "a", "logprobs": True}, "logprobs", ["an integer"]),
        ({"prompt": "a", "seed": 2**32}, "seed", ["below 2**32"]),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", ["token ids"]),
        ({"prompt": "a", "logit_bias": {"264": 1}}, "logit_bias", ["outside", "264"]),
        ({"prompt": "a", "logit_bias": {"1": 1e5}}, "logit_bias", ["token 1"]),
        ({"prompt": "a", "logit_bias": {"1": 1, "01": 2}}, "logit_bias", ["token 1 twice"]),
        ({"prompt": "a", "logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias", ["300"]),
        ({"prompt": "a", "echo": True}, "echo", ["not supported"]),
        ({"prompt": "a", "best_of": 2}, "best_of", ["not supported"]),
        ({"prompt": "a", "suffix": "b"}, "suffix", ["suffix: unknown field"]),
        ({"prompt": "a", "stream": 1}, "stream", ["true or false"]),
        ({"prompt": "a", "stream_options": {}}, "stream_options", ["stream=true"]),
        (
            {"prompt": "a", "stream": True, "stream_options": {"x": 1}},
            "stream_options",
            ["include_usage"],
        ),
    ],
)
def test_invalid_request_is_refused_with_param_and_reason(server, fields, param, words) -> None:
    status, answer = server.complete(**fields)
    assert status == 400
    assert answer.keys() == {"error"}
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert all(word in error["message"] for word in words), error["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\xff", b'{"prompt": NaN}', b"[" * 10_000, b"1" * 10_000),
        *(b"[]", b'"text"', b"null", b'{"prompt": "a", "temperature": -Infinity}'),
    ],
)
def test_body_that_is_not_a_json_object_is_refused_without_a_traceback(server, body: bytes) -> None:
    status, _, answer = server.send("/v1/completions", body)
    assert status == 400
    message = json.loads(answer)["error"]["message"]
    assert message.startswith("the body ")
    assert "Traceback" not in message


def test_null_is_the_same_as_a_missing_field(server) -> None:
    status, _ = server.complete(prompt="a", suffix=None, user=None, stop=None, logprobs=None)
    assert status == 200


def test_lone_surrogates_are_handled(server) -> None:
    status, _ = server.complete(prompt="a\ud800b", stop="\udfff")
    assert status == 200
    status, answer = server.complete(prompt="a", model="\ud800")
    assert (status, answer["error"]["param"]) == (404, "model")
    status, answer = server.complete(**{"prompt": "a", "\ud800": 1})
    assert (status, answer["error"]["param"]) == (400, "\ud800")


def test_error_message_shortens_a_long_value(server) -> None:
    _, answer = server.complete(prompt="a", temperature="x" * 15_000)
    assert len(answer["error"]["message"]) < 2_000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
    ],
)
def test_unknown_paths_and_methods_have_the_error_object(server, method, path, status) -> None:
    got, _, body = server.send(path, method=method)
    assert got == status
    assert path in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_types_that_other_sites_can_send_are_refused(server, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    status, answer_headers, _ = server.send("/v1/completions", b'{"prompt": "a"}', headers)
    assert status == 415
    assert "access-control-allow-origin" not in answer_headers


# --- limits ----------------------------------------------------------------------------------


def test_body_above_the_limit_is_refused(server) -> None:
    body = json.dumps({"prompt": "a", "stop": "b" * MAX_BODY}).encode()
    status, _, answer = server.send("/v1/completions", body)
    assert status == 413
    assert str(MAX_BODY) in json.loads(answer)["error"]["message"]


def test_chunked_body_is_refused_when_it_passes_the_limit(server) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    with sock:
        sock.sendall(head.encode() + chunk * (MAX_BODY // 0x1000 + 1))  # and no end
        assert sock.recv(1000).startswith(b"HTTP/1.1 413")


def test_body_that_does_not_arrive_times_out(server, monkeypatch) -> None:
    monkeypatch.setattr("gptjax.serve.api._BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        sock.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 408")


def test_full_queue_refuses_and_serves_again_later(server) -> None:
    server.throttle.running.clear()
    before = server.metric("gptjax_requests_total", outcome="busy")
    answers: list[int] = []
    ask = lambda: answers.append(server.complete(prompt="a", max_tokens=3)[0])
    threads = [threading.Thread(target=ask) for _ in range(SLOTS + QUEUE)]
    for thread in threads:
        thread.start()
    held = lambda: server.metric("gptjax_rows_busy") + server.metric("gptjax_queue_length")
    server.until(lambda: held() == SLOTS + QUEUE)
    status, headers, body = server.send("/v1/completions", b'{"prompt": "a"}')
    assert status == 429
    assert int(headers["retry-after"]) > 0
    error = json.loads(body)["error"]
    assert error["type"] == "rate_limit_error"
    assert str(SLOTS + QUEUE) in error["message"]
    assert server.metric("gptjax_requests_total", outcome="busy") == before + 1
    server.throttle.running.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * (SLOTS + QUEUE)
    assert server.complete(prompt="a")[0] == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_disconnected_client_frees_its_slots(server, streamed: bool) -> None:
    """And its waiting samples leave the queue."""
    server.throttle.seconds = 0.05
    gone = server.metric("gptjax_requests_total", outcome="gone")
    drawn = server.metric("gptjax_completion_tokens_total")
    body = {"prompt": "a", "max_tokens": 1000, "n": SLOTS + 1, "stream": streamed}
    connection = server.connect()
    body["logit_bias"] = {"256": -100}  # no end before
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    server.until(lambda: server.metric("gptjax_rows_busy") == SLOTS)
    server.until(lambda: server.metric("gptjax_completion_tokens_total") > drawn)
    assert server.metric("gptjax_queue_length") == 1
    connection.close()
    server.until(lambda: server.metric("gptjax_rows_busy") == 0)
    assert server.metric("gptjax_queue_length") == 0
    assert server.metric("gptjax_completion_tokens_total") < drawn + 1000
    server.until(lambda: server.metric("gptjax_requests_total", outcome="gone") == gone + 1)
    server.throttle.seconds = 0
    assert server.complete(prompt="a")[0] == 200


# --- models and metrics ----------------------------------------------------------------------


def test_models_and_health_endpoints(server) -> None:
    status, _, body = server.send("/v1/models")
    assert status == 200
    (model,) = json.loads(body)["data"]
    assert (model["id"], model["object"], model["capacity"]) == ("tiny", "model", CAPACITY)
    status, _, body = server.send("/health")
    assert (status, json.loads(body)) == (200, {"status": "ok"})


def test_metrics_count_requests_and_tokens(server) -> None:
    names = {
        "gptjax_requests_total": {"outcome": "ok"},
        "gptjax_prompt_tokens_total": {},
        "gptjax_completion_tokens_total": {},
        "gptjax_first_token_seconds_count": {},
        "gptjax_token_seconds_count": {},
    }
    read = lambda: [server.metric(name, **labels) for name, labels in names.items()]
    before = read()
    _, answer = server.complete(prompt="abc", max_tokens=4, logit_bias={"256": -100})
    assert answer["usage"]["completion_tokens"] == 4
    after = read()
    # A burst of four draws the first token and three more at a time: none lies between two bursts.
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 4, 4, 1, 0]
    stream(server, prompt="abc", max_tokens=4, logit_bias={"256": -100})
    assert server.metric("gptjax_token_seconds_count") == before[4] + 3
    refused = server.metric("gptjax_requests_total", outcome="refused")
    server.complete(prompt=3)
    assert server.metric("gptjax_requests_total", outcome="refused") == refused + 1
    status, headers, body = server.send("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"# TYPE gptjax_token_seconds histogram" in body
    assert f"gptjax_rows {SLOTS}.0".encode() in body


def test_two_servers_in_a_process_have_separate_metrics(server, start) -> None:
    with start() as other:
        other.complete(prompt="abc")
        assert other.metric("gptjax_requests_total", outcome="ok") == 1


# --- access ----------------------------------------------------------------------------------


def test_unknown_host_name_is_refused(server) -> None:
    for host, wanted in {
        "127.0.0.1": 200,
        f"localhost:{server.port}": 200,
        "evil.example": 400,
        "localhost.evil.example:80": 400,
    }.items():
        assert server.send("/v1/models", headers={"Host": host})[0] == wanted


def test_server_with_a_token_requires_it(start) -> None:
    with start(token=b"secret", hosts=None) as server:
        bearer = lambda token: {**JSON, "Authorization": token}
        for path in ("/v1/models", "/metrics", "/v1/nothing", "//v1/models", "/health/"):
            for headers in (
                *({}, bearer("Bearer wrong"), bearer("Bearer secre"), bearer("Bearer secrets")),
                *(bearer("Bearer"), bearer("Bearer "), bearer("secret"), bearer("Basic secret")),
                bearer("Bearer s\xe9cret"),
            ):
                status, names, body = server.send(path, headers=headers)
                assert status == 401, (path, headers)
                assert names["www-authenticate"] == "Bearer"
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
        status, _, _ = server.send("/v1/completions", b'{"prompt": "a"}')
        assert status == 401
        right = bearer("Bearer secret")
        assert server.send("/v1/completions", b'{"prompt": "a"}', right)[0] == 200
        assert server.send("/metrics", headers=right)[0] == 200
        for path in ("/", "/health"):
            assert server.send(path)[0] == 200
        assert b"data-guarded=yes" in server.send("/")[2]


def test_engine_failure_is_reported_to_clients_and_the_log(start, caplog) -> None:
    with start() as server:
        server.throttle.error = RuntimeError("the secret reason")
        for wanted in (500, 500):
            status, answer = server.complete(prompt="a")
            assert status == wanted
            assert answer["error"]["type"] == "server_error"
            assert "the engine has failed" in answer["error"]["message"]
            assert "secret" not in json.dumps(answer)
        status, _, body = server.send("/health")
        assert (status, json.loads(body)) == (503, {"status": "failed"})
        assert server.metric("gptjax_requests_total", outcome="failed") == 2
    (record,) = [r for r in caplog.records if r.name == "gptjax.serve"]
    assert "the secret reason" in str(record.exc_info[1])


def test_running_stream_ends_with_an_error_when_the_engine_fails(start) -> None:
    with start() as server:
        server.throttle.seconds = 0.01
        connection = server.connect()
        body = json.dumps(
            {"prompt": "a", "max_tokens": 900, "stream": True, "logit_bias": {"256": -100}}
        )
        connection.request("POST", "/v1/completions", body, JSON)
        response = connection.getresponse()
        first = response.readline()
        server.throttle.error = RuntimeError("broken")
        *_, last = events(first + response.read())
        assert "the engine has failed" in last["error"]["message"]


@pytest.mark.parametrize("streamed", [True, False])
def test_request_that_outlasts_the_drain_time_gets_an_error(start, streamed: bool) -> None:
    with start() as server:
        server.throttle.seconds = 0.01
        connection = server.connect()
        body = {"prompt": "a", "max_tokens": 900, "logit_bias": {"256": -100}, "stream": streamed}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        server.until(lambda: server.metric("gptjax_completion_tokens_total") > 0)
        server.served.worker.drain(0)
        response = connection.getresponse()
        assert response.status == (200 if streamed else 503)
        answer = response.read()
        last = events(answer)[-1] if streamed else json.loads(answer)
        assert "being stopped" in last["error"]["message"]
        assert server.complete(prompt="a")[0] == 503
        assert server.send("/health")[0] == 503


def test_model_without_a_tokenizer_returns_token_ids(start) -> None:
    with start(text=False) as server:
        fields = {"prompt": [1, 2], "max_tokens": 5, "seed": 1, "logprobs": 1}
        _, answer = server.complete(**fields)
        (choice,) = answer["choices"]
        assert choice["text"] == ""
        assert len(choice["token_ids"]) == 5
        assert choice["logprobs"]["tokens"] == [str(i) for i in choice["token_ids"]]
        *chunks, _ = stream(server, **{**fields, "logprobs": None})
        ids = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
        assert ids == choice["token_ids"]
        for wrong in ({"prompt": "text"}, {"prompt": [1], "stop": "text"}):
            status, answer = server.complete(**wrong)
            assert status == 400
            assert "no tokenizer" in answer["error"]["message"]


def test_internal_error_is_a_500_without_details(start, monkeypatch, caplog) -> None:
    with start() as server:
        monkeypatch.setattr(
            "gptjax.serve.protocol.ResponseBuilder.choice", lambda *_: {}["the secret reason"]
        )
        status, answer = server.complete(prompt="a")
        assert status == 500
        assert "secret" not in json.dumps(answer)
        assert answer["error"]["type"] == "server_error"
        server.until(lambda: any("secret" in str(r.exc_info) for r in caplog.records if r.exc_info))
        monkeypatch.undo()
        assert server.complete(prompt="a")[0] == 200


def test_page_allows_only_its_own_script_and_style(server) -> None:
    status, headers, body = server.send("/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = body.decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in page
    for word in ("http://", "https://", "src=", " onclick", " style=", '<link rel="stylesheet'):
        assert word not in page
    assert headers["x-content-type-options"] == "nosniff"
