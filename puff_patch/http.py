"""HTTP for plain programs: ``global_http_client`` and ``named_client(name)``, by httpx.

Every request waits in a greenlet and returns an awaitable where an event loop is running.  The client keeps its
connections, HTTP/1.1 and HTTP/2, up to a bound; it keeps no cookies.  It needs ``pip install 'puff-patch[http]'``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import gevent

from puff_patch import json as puff_json
from puff_patch.config import HttpClientOptions, current
from puff_patch.pools import httpx as pool
from puff_patch.runtime.calls import at_once, either_way

if TYPE_CHECKING:
    import httpx

# What may be asked for twice without harm.
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})


class Headers(Mapping[str, bytes]):
    """The headers of a response: bytes by name, in any case; several of one name are joined by commas."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self.raw = [(name.decode("latin-1").lower(), value) for name, value in raw]

    def getlist(self, name: str) -> list[bytes]:
        """All values of one name."""
        name = name.lower()
        return [value for known, value in self.raw if known == name]

    def __getitem__(self, name: str) -> bytes:
        values = self.getlist(name)
        if not values:
            raise KeyError(name)
        return b", ".join(values)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.raw))

    def __len__(self) -> int:
        return len(dict(self.raw))

    def __repr__(self) -> str:
        return f"Headers({dict(self)})"


class HttpResponse:
    """A response, read whole.

    Attributes:
        status: the status code; ``status_code`` is the same.
        headers: see `Headers`.
        content: the body.
        url: what was asked for, after redirections.
        http_version: ``HTTP/1.1`` or ``HTTP/2``.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status: int = response.status_code
        self.status_code: int = response.status_code
        self.headers = Headers(response.headers.raw)
        self.content: bytes = response.content
        self.url = str(response.url)
        self.http_version: str = response.http_version

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""
        return self.status < 400

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies that it sets, by name."""
        from http.cookies import CookieError, SimpleCookie

        found: dict[str, str] = {}
        for value in self.headers.getlist("set-cookie"):
            with contextlib.suppress(CookieError):
                found.update(
                    (name, morsel.value) for name, morsel in SimpleCookie(value.decode("latin-1")).items()
                )
        return found

    def header(self, header_name: str) -> bytes | None:
        """One header, or None."""
        return self.headers.get(header_name)

    @at_once
    def body(self) -> Any:
        """The body; an awaitable where an event loop is running, as are the next two.  See also `content`."""
        return self.content

    @at_once
    def text(self) -> Any:
        """The body as text, in the character set of its Content-Type, else UTF-8."""
        return self._response.text

    @at_once
    def json(self) -> Any:
        """The body parsed as JSON.

        Raises:
            puff_patch.json.JSONDecodeError: it is not JSON.
        """
        return puff_json.loadb(self.content)

    def raise_for_status(self) -> HttpResponse:
        """This response, if its status is below 400.

        Raises:
            httpx.HTTPStatusError: it is not.
        """
        if not self.ok:
            self._response.raise_for_status()
        return self

    def __repr__(self) -> str:
        return f"<HttpResponse {self.status} {self.url}>"


class HttpClient:
    """An HTTP client with its own options and connections.

    Args:
        name: which of the configured clients (``[[http_client]]`` in puff.toml).
        options: its options; by default those configured for ``name``.
    """

    def __init__(self, name: str = "default", options: HttpClientOptions | None = None) -> None:
        self.name = name
        self._options = options

    @property
    def settings(self) -> HttpClientOptions:
        """How it is set up, read from the configuration at the first request."""
        if self._options is None:
            self._options = current().http_client(self.name)
        return self._options

    def client(self) -> httpx.Client:
        """httpx's client in this thread, for what is not here (streams, say); for greenlets only."""
        return pool.client_of_hub(self, self.settings)

    @either_way
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        json: Any = None,
        body: bytes | str | None = None,
        data: Mapping[str, Any] | None = None,
        files: Any = None,
        timeout_ms: float | None = None,
        *,
        query: Any = None,
        timeout: float | None = None,
        body_bytes: bytes | None = None,
        follow_redirects: bool = True,
    ) -> Any:
        """Send a request and read its response.

        Args:
            method: ``GET``, ``POST``, ...
            url: absolute, or relative to the option ``base_url``.
            headers: its headers, as str or bytes.
            json: to be sent as JSON, by `puff_patch.json`.
            body: to be sent as it is; ``body_bytes`` is the same.
            data: to be sent as a form.
            files: to be sent as a multipart form: ``{name: contents}`` or ``{name: (file name, contents)}``, the
                contents str, bytes or a file.
            timeout_ms: milliseconds that all of it may take, by default the option ``timeout``.
            query: parameters for the URL, as a mapping or pairs.
            timeout: as ``timeout_ms``, in seconds.
            body_bytes: see ``body``.
            follow_redirects: whether a redirection, of which there may be ten, is followed.

        Returns:
            A `HttpResponse`, whatever its status.

        Raises:
            httpx.TimeoutException: the time is over.
            httpx.HTTPError: there is no response for another reason.
            ValueError: more than one of ``json``, ``body`` and ``data`` or ``files``.
        """
        content: Any = body if body is not None else body_bytes
        if sum(given for given in (json is not None, content is not None, bool(data or files))) > 1:
            raise ValueError("a request has one body: json, body, or data and files")
        sent = {**(headers or {})}
        if json is not None:
            content = puff_json.dumpb(json)
            if not any(name.lower() == "content-type" for name in sent):
                sent["content-type"] = "application/json"
        seconds = timeout_ms / 1000 if timeout_ms is not None else timeout or self.settings.timeout
        send = functools.partial(
            self._send,
            self.client(),
            method.upper(),
            url,
            headers=sent,
            content=content,
            data=data,
            files=files,
            params=query,
            follow_redirects=follow_redirects,
        )
        expired = gevent.Timeout(seconds)
        try:
            with expired:
                return send(seconds)
        except gevent.Timeout as error:
            if error is not expired:
                raise
            pool.give_up_request(patience=self.settings.timeout)
            httpx = pool.library()
            raise httpx.ReadTimeout(
                f"{method.upper()} {url}: no response within {seconds:g} seconds; give it more with timeout_ms, "
                "or all requests of the client with its option timeout"
            ) from None

    def _send(self, client: httpx.Client, method: str, url: str, seconds: float, **options: Any) -> HttpResponse:
        httpx = pool.library()
        # The whole has its own limit; httpx's are for a connection that has died without telling.
        patience = max(seconds, self.settings.timeout)
        limits = httpx.Timeout(patience, connect=min(seconds, self.settings.connect_timeout), pool=None)
        repeatable = method in _REPEATABLE and not options["files"]
        while True:
            pool.begin_request()
            try:
                return HttpResponse(client.request(method, url, timeout=limits, **options))
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A connection that was kept may have been closed by its server while the request was on its way.
                if not repeatable or not pool.went_over_kept_connection():
                    raise
                repeatable = False

    def json(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        json: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Send JSON; as `request`, but with ``timeout`` in milliseconds."""
        return self.request(method, url, headers, json, timeout_ms=timeout)

    def get(self, url: str, **kwargs: Any) -> Any:
        """`request` with GET."""
        return self.request("GET", url, **kwargs)

    def post(self, url: str, **kwargs: Any) -> Any:
        """`request` with POST."""
        return self.request("POST", url, **kwargs)

    def put(self, url: str, **kwargs: Any) -> Any:
        """`request` with PUT."""
        return self.request("PUT", url, **kwargs)

    def patch(self, url: str, **kwargs: Any) -> Any:
        """`request` with PATCH."""
        return self.request("PATCH", url, **kwargs)

    def delete(self, url: str, **kwargs: Any) -> Any:
        """`request` with DELETE."""
        return self.request("DELETE", url, **kwargs)

    def head(self, url: str, **kwargs: Any) -> Any:
        """`request` with HEAD."""
        return self.request("HEAD", url, **kwargs)

    def options(self, url: str, **kwargs: Any) -> Any:
        """`request` with OPTIONS."""
        return self.request("OPTIONS", url, **kwargs)

    def __repr__(self) -> str:
        return f"<HttpClient {self.name}>"


#: The client ``default``.
global_http_client = HttpClient()


@functools.cache
def named_client(name: str = "default") -> HttpClient:
    """A client by its name; it connects with its first request.

    Args:
        name: which of the configured clients (``[[http_client]]`` in puff.toml).
    """
    return global_http_client if name == "default" else HttpClient(name)
