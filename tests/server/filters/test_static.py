"""Files of folders, as clients get them."""

from __future__ import annotations

import gzip
import hashlib
import os
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer

from puff_patch.server.filters import StaticFiles

CSS = b"body { color: green }\n" * 50
BIG = os.urandom(3_000_000)
HASHED = "app.3f2a1b9c4d5e.js"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, with secrets beside it."""
    around = tmp_path_factory.mktemp("static")
    (around / "secret.txt").write_bytes(b"secret")
    (around / "files-secret").mkdir()
    (around / "files-secret" / "secret.txt").write_bytes(b"secret")
    found = around / "files"
    (found / "docs").mkdir(parents=True)
    for name, data in {
        "site.css": CSS,
        "big.bin": BIG,
        "empty.txt": b"",
        "a b+é.txt": b"named",
        "page.html": "<p>é".encode(),
        HASHED: b"//",
        "report-20240101.txt": b"r",
        ".env": b"secret",
        "docs/index.html": b"the index",
    }.items():
        (found / name).write_bytes(data)
    (found / "site.css.gz").write_bytes(gzip.compress(CSS))
    (found / "site.css.br").write_bytes(b"as if it were brotli")
    (found / "out.txt").symlink_to(around / "secret.txt")
    (found / "outside").symlink_to(around)
    (found / "sibling.txt").symlink_to(around / "files-secret" / "secret.txt")
    (found / "inside.css").symlink_to("site.css")
    os.mkfifo(found / "pipe.txt")
    return found


@pytest.fixture(scope="module")
def server(start_module_server: StartServer, folder: Path) -> ServerProcess:
    return start_module_server(
        static=[
            {"prefix": "/static", "folder": str(folder)},
            {"prefix": "/static/docs/", "folder": str(folder / "docs"), "max_age": 5, "index": "index.html"},
            {"prefix": "/", "folder": str(folder), "index": "index.html", "fallthrough": True},
        ]
    )


def test_file(server: ServerProcess) -> None:
    response, body = server.request("/static/page.html")
    assert (response.status, body) == (200, "<p>é".encode())
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Content-Length"] == "5"
    assert response.headers["Cache-Control"] == "public, max-age=60"
    assert response.headers["Accept-Ranges"] == "bytes"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    head, nothing = server.request("/static/page.html", "HEAD")
    assert nothing == b""
    assert {**dict(head.getheaders()), "date": ""} == {**dict(response.getheaders()), "date": ""}


def test_kinds_of_files(server: ServerProcess) -> None:
    assert server.request("/static/a%20b+%C3%A9.txt")[1] == b"named"
    assert server.request("/static/empty.txt")[1] == b""
    response, body = server.request("/static/big.bin")
    assert hashlib.sha256(body).digest() == hashlib.sha256(BIG).digest()
    assert response.headers["Content-Type"] == "application/octet-stream"
    response, body = server.request("/static/" + HASHED)
    assert response.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    # A date is no hash.
    assert "immutable" not in server.request("/static/report-20240101.txt")[0].headers["Cache-Control"]


def test_no_such_file(server: ServerProcess) -> None:
    for path in ("/static/", "/static/docs", "/static/none.css", "/static/" + "n" * 5000, "/static/page.html/x"):
        assert server.request(path)[0].status == 404, path
    response, _ = server.request("/static/site.css", "POST", b"x" * 200_000)
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("prefix", ["/static/", "/"])
@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "%2e%2e/secret.txt",
        "..%2fsecret.txt",
        "%2e%2e%2fsecret.txt",
        "%252e%252e%252fsecret.txt",
        "docs/../../secret.txt",
        "docs/%2e%2e/%2e%2e/secret.txt",
        "..%5csecret.txt",
        "%c0%ae%c0%ae/secret.txt",
        "//secret.txt",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "./page.html",
        "docs//index.html",
        "out.txt",
        "outside/secret.txt",
        "outside/files-secret/secret.txt",
        "sibling.txt",
        "../files-secret/secret.txt",
        ".env",
        "%2eenv",
        "page.html%00.txt",
        "pipe.txt",
    ],
)
def test_nothing_else_can_be_read(server: ServerProcess, prefix: str, path: str) -> None:
    answer = server.raw(f"GET {prefix}{path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    status = int(answer.split()[1])
    # 400 where the front takes it for no path at all.
    assert status in (400, 404), answer
    assert b"secret" not in answer.replace(b"secret.txt", b"")
    assert b"root:" not in answer


def test_links_within_the_folder_are_followed(server: ServerProcess) -> None:
    assert server.request("/static/inside.css")[1] == CSS


def test_validators(server: ServerProcess, folder: Path) -> None:
    response, _ = server.request("/static/page.html")
    tag, modified = response.headers["ETag"], response.headers["Last-Modified"]
    assert modified == formatdate((folder / "page.html").stat().st_mtime, usegmt=True)
    earlier = formatdate(time.time() - 86400, usegmt=True)
    for headers, status in [
        ({"If-None-Match": tag}, 304),
        ({"If-None-Match": f'"x", W/{tag}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"x"'}, 200),
        ({"If-None-Match": '"x"', "If-Modified-Since": modified}, 200),
        ({"If-Modified-Since": modified}, 304),
        ({"If-Modified-Since": formatdate(time.time() + 5, usegmt=True)}, 304),
        ({"If-Modified-Since": earlier}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
    ]:
        response, body = server.request("/static/page.html", headers=headers)
        assert (response.status, len(body)) == (status, 5 if status == 200 else 0), headers
        assert response.headers["ETag"] == tag
        assert response.headers["Cache-Control"] == "public, max-age=60"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=2999990-", 2999990, 3000000),
        ("bytes=0-99999999", 0, 3000000),
        ("bytes=-10", 2999990, 3000000),
        ("bytes=-99999999", 0, 3000000),
        ("bytes=100000-2900000", 100000, 2900001),
    ],
)
def test_range(server: ServerProcess, asked: str, start: int, end: int) -> None:
    response, body = server.request("/static/big.bin", headers={"Range": asked})
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/3000000"
    assert response.headers["Content-Length"] == str(end - start)
    assert body == BIG[start:end]


def test_ranges_that_are_not_there_or_not_understood(server: ServerProcess) -> None:
    for asked in ("bytes=3000000-", "bytes=-0", "bytes=999999999999999999-"):
        response, body = server.request("/static/big.bin", headers={"Range": asked})
        assert (response.status, body) == (416, b"")
        assert response.headers["Content-Range"] == "bytes */3000000"
    for asked in ("bytes=5-2", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,5-6", "bytes=" + "9" * 5000 + "-"):
        response, body = server.request("/static/big.bin", headers={"Range": asked})
        assert (response.status, len(body)) == (200, len(BIG)), asked
    assert server.request("/static/big.bin", "HEAD", headers={"Range": "bytes=0-1"})[0].status == 200
    assert server.request("/static/empty.txt", headers={"Range": "bytes=0-"})[0].status == 416


def test_a_range_of_what_has_changed_is_all_of_it(server: ServerProcess) -> None:
    tag = server.request("/static/big.bin", "HEAD")[0].headers["ETag"]
    for condition, status in [(tag, 206), ('"x"', 200), (f"W/{tag}", 200), (formatdate(0, usegmt=True), 200)]:
        headers = {"Range": "bytes=0-9", "If-Range": condition}
        assert server.request("/static/big.bin", headers=headers)[0].status == status


def test_compressed_neighbours(server: ServerProcess) -> None:
    plain, body = server.request("/static/site.css")
    assert body == CSS
    tags = {plain.headers["ETag"]}
    for accept, encoding, expected in [
        ("gzip", "gzip", CSS),
        ("gzip, br;q=0.9", "gzip", CSS),
        ("gzip, br", "br", b"as if it were brotli"),
    ]:
        response, body = server.request("/static/site.css", headers={"Accept-Encoding": accept})
        assert response.headers["Content-Encoding"] == encoding
        assert response.headers["Content-Type"] == "text/css; charset=utf-8"
        assert response.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
        assert (gzip.decompress(body) if encoding == "gzip" else body) == expected
        tags.add(response.headers["ETag"])
    assert len(tags) == 3, "each has a tag of its own"
    ranged, body = server.request("/static/site.css", headers={"Accept-Encoding": "gzip", "Range": "bytes=0-3"})
    assert ("Content-Encoding" in ranged.headers, body) == (False, CSS[:4])


def test_index(server: ServerProcess) -> None:
    response, body = server.request("/static/docs/")
    assert (body, response.headers["Content-Type"]) == (b"the index", "text/html; charset=utf-8")
    assert response.headers["Cache-Control"] == "public, max-age=5", "the longer prefix counts"
    response, _ = server.request("/docs?a=b")
    assert (response.status, response.headers["Location"]) == (301, "/docs/?a=b")


def test_fallthrough(server: ServerProcess) -> None:
    assert server.request("/page.html")[1] == "<p>é".encode()
    assert server.request("/hello")[1] == b"hello\n"
    assert server.request("/hello", "POST", b"x")[1] == b"hello\n"
    assert server.request("/")[1] == b"no such path"


def test_file_made_later_is_seen(server: ServerProcess, folder: Path) -> None:
    assert server.request("/static/late.txt")[0].status == 404
    (folder / "late.txt").write_bytes(b"late")
    assert server.request("/static/late.txt")[1] == b"late"


def test_folder_that_is_a_link_put_elsewhere(start_server: StartServer, tmp_path: Path) -> None:
    for release in ("one", "two"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "name.txt").write_text(release)
    current = tmp_path / "current"
    current.symlink_to("one")
    server = start_server(static=[{"prefix": "/s", "folder": str(current)}], compression={})
    assert server.request("/s/name.txt")[1] == b"one"
    current.unlink()
    current.symlink_to("two")
    assert server.request("/s/name.txt")[1] == b"two"
    # What has no neighbour is compressed on the way, and known again by its weakened tag.
    (tmp_path / "two" / "long.css").write_bytes(CSS)
    response, body = server.request("/s/long.css", headers={"Accept-Encoding": "gzip"})
    assert gzip.decompress(body) == CSS
    tag = response.headers["ETag"]
    assert tag.startswith("W/")
    assert server.request("/s/long.css", headers={"If-None-Match": tag})[0].status == 304


def test_missing_folder_is_one_clear_error(tmp_path: Path, start_server: StartServer) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"error: the folder of static files at /s/ does not exist: /"):
        start_server(static=[{"prefix": "/s", "folder": str(tmp_path / "none")}])


@pytest.mark.parametrize("wrong", [{"prefix": "s"}, {"max_age": -1}, {"index": "a/b"}, {"immutable": "("}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        StaticFiles(**{"prefix": "/s", "folder": ".", **wrong})
