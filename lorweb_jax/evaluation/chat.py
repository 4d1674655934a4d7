"""Questions with images to a model behind an OpenAI-compatible endpoint (chat completions)."""

import base64
import email.utils
import http.client
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.images.io import encoded_png

LARGEST_ANSWER = 2**20  # bytes
SMALLEST = 256  # px of an image's shorter side; smaller ones are enlarged, each pixel to k x k of its kind
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_AGAIN = (408, 409, 425, 429)  # and all from 500 on: another try may do
_NEVER = {401: "the key is refused", 403: "the key has no access", 404: "there is no such model or path"}


class Unanswered(Exception):
    """A question that got no usable answer, after all tries; why, without the key."""


class Judge(Protocol):
    """A model that answers questions with images: an Endpoint, or one that runs here (tools/transformers_judge.py).

    url: where it is, model: what it is called, in reports. `question` makes what `digest` hashes and `ask` answers, as
    Endpoint's do; several threads may ask at once.
    """

    url: str
    model: str

    def question(self, text: str, images: Sequence[tuple[str, np.ndarray]]) -> dict[str, Any]: ...

    def digest(self, body: dict[str, Any]) -> str: ...

    def ask(self, body: dict[str, Any], parse: Any) -> Any: ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead the key to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


@dataclass
class Endpoint:
    """Where a model answers.

    url: of the API, such as http://localhost:8000/v1. model: its name there. key: sent as a bearer token; never logged,
    stored or part of a message. timeout: seconds for one whole try. tries: of one question. wait: seconds before the
    second try, twice as many before each further one. json_mode: ask for JSON by response_format, which some servers
    don't know. Raises UserError for an address or a key that can't be one.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    tries: int = 4
    wait: float = 1.0
    json_mode: bool = True

    def __post_init__(self):
        address = urllib.parse.urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
            raise UserError(
                "the judge's address is no http:// or https:// URL without a user name in it; give one such as "
                "http://localhost:8000/v1, and a key in an environment variable",
                2,
            )
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise UserError("the judge's key holds line ends or letters that no HTTP header takes; set it anew", 2)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def question(self, text: str, images: Sequence[tuple[str, np.ndarray]]) -> dict[str, Any]:
        """The body of a request: text, then each image uint8 [h, w, 3] under its title."""
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for title, image in images:
            content += [{"type": "text", "text": title}, {"type": "image_url", "image_url": {"url": data_url(image)}}]
        return {
            "model": self.model,
            "temperature": 0,
            **({"response_format": {"type": "json_object"}} if self.json_mode else {}),
            "messages": [{"role": "user", "content": content}],
        }

    def digest(self, body: dict[str, Any]) -> str:
        """A hash of all that the answer depends on: the address, the model, the texts, the images."""
        return fingerprint.of_text(json.dumps([self.url, body], sort_keys=True))

    def ask(self, body: dict[str, Any], parse: Any) -> Any:
        """parse(the answer's text), where parse raises ValueError for an answer of another form.

        Timeouts, lost connections, 408, 409, 425, 429, 5xx and malformed answers are tried again, later each time or
        as Retry-After says. Raises Unanswered when all tries are used up or the server refuses this question (other
        4xx), and UserError where it would refuse every one: 401, 403, 404, a redirect.
        """
        reason = ""
        for number in range(self.tries):
            pause = self.wait * 2**number * random.uniform(0.8, 1.2)
            try:
                return parse(_content(self._post(body)))
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code}"
                    if error.code in _NEVER or 300 <= error.code < 400:
                        what = _NEVER.get(error.code, "it redirects, which is not followed")
                        raise UserError(
                            f"the judge at {self.url} answers {error.code}: {what}; check --judge, --judge-model and "
                            "the environment variable of --judge-key"
                        ) from None
                    if error.code not in _AGAIN and error.code < 500:
                        raise Unanswered(f"{reason}: {self._safe(_detail(error))}") from None
                    pause = max(pause, _retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                reason = self._safe(str(getattr(error, "reason", None) or error) or type(error).__name__)
            except ValueError as error:
                reason = f"malformed answer: {self._safe(str(error))}"
            if number + 1 < self.tries:
                time.sleep(min(pause, LONGEST_WAIT))
        raise Unanswered(reason)

    def _post(self, body: dict[str, Any]) -> bytes:
        """The answer, whole within `timeout` seconds, however slowly it drips."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        ends = time.monotonic() + self.timeout
        parts, size = [], 0
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(65536):
                parts.append(part)
                size += len(part)
                if size > LARGEST_ANSWER:
                    raise ValueError(f"the answer has more than {LARGEST_ANSWER:,} bytes")
                if time.monotonic() > ends:
                    raise TimeoutError(f"no whole answer in {self.timeout:g} seconds")
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _safe(self, text: str) -> str:
        """A server may repeat the key in what it answers."""
        return printable(text.replace(self.key, "…") if self.key else text, 200)


def data_url(image: np.ndarray) -> str:
    """A PNG of uint8 [h, w, 3] in a data URL."""
    factor = -(-SMALLEST // min(image.shape[:2]))
    data = encoded_png(image.repeat(factor, 0).repeat(factor, 1))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _content(answer: bytes) -> str:
    """The text of the first choice; ValueError if the answer isn't a chat completion."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (LookupError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"no chat completion ({type(error).__name__})") from None
    if not isinstance(content, str):
        raise ValueError(f"the content is a {type(content).__name__}")
    return content


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(500).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _retry_after(value: str | None) -> float:
    """Seconds from now, of a Retry-After header in seconds or as a date; 0 without a usable one."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
