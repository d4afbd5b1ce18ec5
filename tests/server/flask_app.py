"""A Flask application as one writes it for any server; only the two lines at the top know of puff_patch.

Run by the tests as ``python flask_app.py``: serves on a free port.
"""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import hashlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any

from flask import (
    Flask,
    Response,
    abort,
    jsonify,
    redirect,
    request,
    send_file,
    session,
    stream_with_context,
    url_for,
)

from puff_patch.server import ServerOptions, serve

app = Flask(__name__)
app.secret_key = "of the tests"
app.config["MAX_CONTENT_LENGTH"] = 3_000_000
ended: list[str] = []


class TeapotError(Exception):
    """Handled below."""


@app.get("/users/<int:number>")
def user(number: int) -> Any:
    return jsonify(number=number, url=url_for("user", number=number, _external=True), args=request.args.to_dict())


@app.route("/login", methods=["POST"])
def login() -> Any:
    session["user"] = request.form["user"]
    response = redirect(url_for("whoami"))
    response.set_cookie("seen", "yes", httponly=True)
    return response


@app.get("/whoami")
def whoami() -> Any:
    return {"user": session.get("user"), "seen": request.cookies.get("seen")}


@app.post("/upload")
def upload() -> Any:
    found = request.files["file"]
    return {
        "name": found.filename,
        "sha256": hashlib.sha256(found.read()).hexdigest(),
        "comment": request.form["comment"],
    }


@app.get("/download")
def download() -> Any:
    return send_file(io.BytesIO(b"d" * 500_000), download_name="d.bin", as_attachment=True, etag="tag")


@app.get("/count")
def count() -> Any:
    def parts() -> Iterator[str]:
        try:
            for number in range(int(request.args["to"])):
                time.sleep(0.01)
                yield f"{number}\n"
        finally:
            ended.append("count")

    return Response(stream_with_context(parts()), mimetype="text/plain")


@app.get("/ended")
def show_ended() -> Any:
    return ended


@app.get("/teapot")
def teapot() -> Any:
    raise TeapotError


@app.errorhandler(TeapotError)
def handle(error: TeapotError) -> Any:
    return "short and stout", 418


@app.get("/forbidden")
def forbidden() -> Any:
    abort(403, "not you")


@app.get("/broken")
def broken() -> Any:
    raise LookupError("broken in Flask")


if __name__ == "__main__":
    sys.exit(serve(app, ServerOptions(port=0)))
