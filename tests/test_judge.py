"""The judge, against a real HTTP server on loopback that misbehaves in each way. No model is run."""

import base64
import contextlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from lorweb_jax import evaluate as command
from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation import judge as judging
from lorweb_jax.evaluation.chat import Endpoint, Unanswered
from lorweb_jax.evaluation.making import add_scores, make_images
from lorweb_jax.evaluation.methods import Candidate
from lorweb_jax.evaluation.records import Records
from lorweb_jax.evaluation.render import add_descriptions, read_records
from lorweb_jax.evaluation.samples import Sample
from lorweb_jax.evaluation.scores import pixel_scores

KEY = "sk-secret-0123456789"
GOOD = '{"accuracy": 7, "consistency": 9}'


def completion(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


class Judge(ThreadingHTTPServer):
    """Answers each request by the next of `behaviours`, functions of (handler, body); the last one stays."""

    daemon_threads = True

    def __init__(self, *behaviours):
        self.behaviours, self.requests, self.lock = list(behaviours), [], threading.Lock()
        self.at_once = self.most_at_once = 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has given up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            behaviour = server.behaviours.pop(0) if len(server.behaviours) > 1 else server.behaviours[0]
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        behaviour(self, body)

    do_GET = do_POST

    def reply(self, status, data, **headers):
        with self.server.lock:
            self.server.at_once -= 1  # before the client can ask its next question
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def says(content):
    return lambda handler, body: handler.reply(200, completion(content))


def status(code, text=b"", **headers):
    return lambda handler, body: handler.reply(code, text, **headers)


def raw(data):
    return lambda handler, body: handler.reply(200, data)


def hangs(handler, body):
    time.sleep(0.6)
    handler.close_connection = True


def drips(handler, body):
    """A byte now and then: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(40):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    handler.close_connection = True


def drops(handler, body):
    handler.close_connection = True


def cuts(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion(GOOD))
    handler.close_connection = True


@contextlib.contextmanager
def serving(*behaviours):
    server = Judge(*behaviours)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sample(i=0):
    random = np.random.default_rng(i)
    return Sample(
        f"task {i % 2}", 'put "it" in {braces}', *random.integers(0, 256, (4, 16, 16, 3), np.uint8), key=str(i)
    )


def ask(server, **options):
    options = {"timeout": 0.3, "tries": 3, "wait": 0.01, "key": KEY} | options
    endpoint = Endpoint(server.url, "a-model", **options)
    question = judging.score_question(endpoint, "ours", "x", sample(), sample(1).b)
    return endpoint.ask(question.body, question.parse)


def test_what_is_asked():
    with serving(says(GOOD)) as server:
        assert ask(server) == {"accuracy": 7, "consistency": 9}
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "a-model" and body["temperature"] == 0
    [message] = body["messages"]
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts[1:] == ["Image A", "Image A'", "Image B", "RESULT"] and 'put "it" in {braces}' in texts[0]
    assert '{"accuracy": 1-10, "consistency": 1-10}' in texts[0]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    for url, expected in zip(urls, [*sample().condition, sample(1).b], strict=True):
        kind, _, data = url.partition(",")
        assert kind == "data:image/png;base64"
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert image.shape == (256, 256, 3)
        np.testing.assert_array_equal(image[::16, ::16], expected)


@pytest.mark.parametrize(
    "behaviour",
    [
        hangs,
        drips,
        drops,
        cuts,
        *map(status, (408, 409, 425, 429, 500, 502, 503, 529)),
        says("I'd give it 7."),
        raw(b""),
    ],
    ids=lambda b: getattr(b, "__name__", "b"),
)
def test_what_may_pass_is_tried_again(behaviour):
    with serving(behaviour, says(GOOD)) as server:
        assert ask(server) == {"accuracy": 7, "consistency": 9}
    assert len(server.requests) == 2


def test_retry_after_is_obeyed_and_waits_grow():
    with serving(status(429, Retry_After="0.4"), says(GOOD)) as server:
        began = time.monotonic()
        ask(server)
        assert 0.4 <= time.monotonic() - began < 2
    with serving(status(503)) as server:
        began = time.monotonic()
        with pytest.raises(Unanswered, match="HTTP 503"):
            ask(server, wait=0.1, tries=3)
        assert 0.8 * 0.3 <= time.monotonic() - began < 2 and len(server.requests) == 3


@pytest.mark.parametrize(
    "content",
    [
        "",
        "7",
        "[7, 9]",
        '{"accuracy": 7}',
        '{"accuracy": 7, "consistency": 9, "why": "it is"}',
        '{"accuracy": 0, "consistency": 9}',
        '{"accuracy": 11, "consistency": 9}',
        '{"accuracy": 7.0, "consistency": 9}',
        '{"accuracy": "7", "consistency": 9}',
        '{"accuracy": true, "consistency": 9}',
        '{"accuracy": NaN, "consistency": 9}',
        '{"accuracy": 7, "accuracy": 8, "consistency": 9}',
        f"{GOOD} {GOOD}",
        f"Here you are: {GOOD}",
        None,
        ["7"],
    ],
)
def test_malformed_answers_are_no_scores(content):
    with serving(says(content)) as server, pytest.raises(Unanswered, match="malformed answer"):
        ask(server, tries=2)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "data", [b"<html>", b"null", b"{}", b'{"choices": []}', b'{"choices": [null]}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_no_completion(data):
    with serving(raw(data)) as server, pytest.raises(Unanswered, match="malformed answer"):
        ask(server, tries=1)


def test_answers_without_end():
    with serving(raw(b" " * 3_000_000)) as server, pytest.raises(Unanswered, match="more than 1,048,576 bytes"):
        ask(server, tries=1, timeout=5)


@pytest.mark.parametrize("code", [401, 403, 404, 302])
def test_what_concerns_every_question_ends_it_and_the_key_stays_secret(code):
    elsewhere = says(GOOD)
    with serving(elsewhere) as other, serving(status(code, KEY.encode(), Location=other.url)) as server:
        with pytest.raises(UserError, match=f"answers {code}: .*; check --judge") as caught:
            ask(server)
        assert len(server.requests) == 1 and not other.requests and KEY not in str(caught.value)


def test_a_refused_question_is_unanswered_at_once():
    with serving(status(400, f"bad key {KEY}, bad image".encode())) as server:
        with pytest.raises(Unanswered, match="HTTP 400: bad key …, bad image"):
            ask(server)
    assert len(server.requests) == 1


def test_addresses_and_keys():
    for url in ("localhost:8000", "file:///etc/passwd", "http://", "http://user:secret@host/v1"):
        with pytest.raises(UserError, match="no http:// or https:// URL") as caught:
            Endpoint(url, "m")
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="key holds line ends") as caught:
        Endpoint("http://host/v1", "m", "sk\r\nX: y")
    assert "sk" not in str(caught.value) and KEY not in repr(Endpoint("http://host/v1", "m", KEY))
    with serving(says(GOOD)) as server:
        ask(server, key="", json_mode=False)
    [(_, headers, body)] = server.requests
    assert "Authorization" not in headers and "response_format" not in body


COUNT = 6


@pytest.fixture
def records(tmp_path):
    """Records of three methods, grey, black and white, on triplets of two tasks."""
    samples = [sample(i) for i in range(COUNT)]
    records = Records.begin(tmp_path / "out", samples, {"seed": 0})
    scores = pixel_scores()[:1]
    add_descriptions(records.folder, scores)
    for name, level in (("grey", 128), ("black", 0), ("white", 255)):
        make = lambda samples, seeds, level=level: [np.full_like(s.b, level) for s in samples]
        kept = make_images(records, Candidate(name, "LoRA", make, name), samples, tell=lambda text: None)
        add_scores(kept, {s.id: s for s in samples}, scores)
    return records


def levels(body):
    """The grey level of each result that is shown, in order."""
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls[3:]]
    return [int(image.mean()) for image in images]


def likes(order):
    """A judge that scores black 2/4, grey 5/5, white 8/6 and chooses what stands first in `order`."""

    def answer(handler, body):
        shown = levels(body)
        if len(shown) == 1:
            accuracy, consistency = {0: (2, 4), 128: (5, 5), 255: (8, 6)}[shown[0]]
            content = json.dumps({"accuracy": accuracy, "consistency": consistency})
        else:
            content = json.dumps({"choice": 1 + shown.index(min(shown, key=order.index))})
        time.sleep(0.02)
        handler.reply(200, completion(content))

    return answer


def run(records, server, monkeypatch, *options, key=KEY):
    monkeypatch.setenv("JUDGE_KEY", key)
    command.main(
        ["--out", str(records.folder), "--judge", server.url, "--judge-model", "m", "--judge-key", "JUDGE_KEY"]
        + ["--judge-tries", "1", *options]
    )
    return json.loads((records.folder / "results.json").read_text())["judge"]


def test_judged_and_kept(records, monkeypatch, capsys):
    with serving(likes([0, 128, 255])) as server:
        result = run(records, server, monkeypatch, "--judge-at-once", "3")
        asked = len(server.requests)
        assert asked == COUNT * (3 + 2) and 1 < server.most_at_once <= 3
        again = run(records, server, monkeypatch)
        assert again == result and len(server.requests) == asked
        # Another model is another judge.
        command.main(["--out", str(records.folder), "--judge", server.url, "--judge-model", "n"])
        assert len(server.requests) == 2 * asked
    assert {name: of["accuracy"]["mean"] for name, of in result["scores"].items()} == {
        "grey": 5,
        "black": 2,
        "white": 8,
    }
    assert result["scores"]["grey"] | {"accuracy": 0, "consistency": 0} == {
        "answered": COUNT,
        "unanswered": 0,
        "accuracy": 0,
        "consistency": 0,
    }
    black, white = result["choices"]
    assert (black["method"], black["against"], black["rate"], white["rate"]) == ("grey", "black", 0, 1)
    low, high = stats.binomtest(COUNT, COUNT).proportion_ci(0.68, "wilson")
    assert (white["low"], white["high"]) == pytest.approx((low, high), abs=1e-12)
    # Both orders are shown.
    shown = [levels(body) for _, _, body in server.requests[:asked] if len(levels(body)) == 2]
    assert [0, 128] in shown and [128, 0] in shown
    everything = "".join(path.read_text() for path in records.folder.rglob("*.*") if path.suffix != ".png")
    output = capsys.readouterr()
    assert KEY not in everything and KEY not in output.out + output.err
    assert "forced choice" in (records.folder / "report.html").read_text()
    # A later report without a judge still has it.
    command.main(["--out", str(records.folder)])
    assert "judge" in json.loads((records.folder / "results.json").read_text())


def test_unanswered_questions_are_counted_and_asked_again(records, monkeypatch, capsys):
    good = likes([255, 128, 0])

    def moody(handler, body):
        odd = sum(json.dumps(body).encode()) % 2
        if levels(body) == [0] or len(levels(body)) == 2 and 255 in levels(body):
            return handler.reply(500, KEY.encode())
        return good(handler, body) if odd else handler.reply(200, completion("well…"))

    with serving(moody) as server:
        result = run(records, server, monkeypatch)
    counts = {name: (of["answered"], of["unanswered"]) for name, of in result["scores"].items()}
    assert counts["black"] == (0, COUNT) and "accuracy" not in result["scores"]["black"]
    assert sum(counts["grey"]) == COUNT and 0 < counts["grey"][0] < COUNT
    assert result["scores"]["grey"]["accuracy"]["mean"] == 5
    assert result["choices"][1]["rate"] is None and result["choices"][1]["unanswered"] == COUNT
    output = capsys.readouterr().out
    assert "questions unanswered" in output and KEY not in output
    with serving(good) as server:
        healed = run(records, server, monkeypatch)
    assert all(of["unanswered"] == 0 for of in healed["scores"].values())


def test_an_interrupted_judging_keeps_its_answers(records, tmp_path):
    with serving(*[says(GOOD)] * 3, status(401)) as server:
        endpoint = Endpoint(server.url, "m", KEY, wait=0.01)
        data, samples = read_records(records.folder), records.samples()
        with pytest.raises(UserError, match="401"):
            judging.judge(data, samples, endpoint, tmp_path / "cache", concurrency=1)
        kept = list((tmp_path / "cache").glob("*.json"))
        assert len(kept) == 3
        kept[0].write_text("{")
        server.requests.clear()
        server.behaviours[:] = [likes([0, 128, 255])]
        result = judging.judge(data, samples, endpoint, tmp_path / "cache")
        assert len(server.requests) == COUNT * 5 - 2
        assert sum(of["answered"] for of in result["scores"].values()) == 3 * COUNT


def test_nobody_answers(records, monkeypatch):
    with serving(status(500)) as server, pytest.raises(UserError, match="answered none of 30 questions .HTTP 500"):
        run(records, server, monkeypatch)
    with pytest.raises(UserError, match="--judge-model was not given"):
        command.main(["--out", str(records.folder), "--judge", "http://localhost:1/v1"])
