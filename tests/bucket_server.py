"""An emulator of Google Cloud Storage with object generations, on which TensorStore relies."""

import contextlib
import http.server
import io
import json
import re
import socket
import time
import urllib.parse

from gcp_storage_emulator import exceptions, server


class _Handler(server.RequestHandler):
    """Adds features that the emulator lacks: preconditions, generations of read objects, moving.

    https://cloud.google.com/storage/docs/request-preconditions
    """

    _generation: str | None = None

    def _object(self):
        """Returns the generation of the object that is asked for ("0": there is none), and the query."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        found = re.fullmatch(r"(?:/upload|/download)?(?:/storage/v1)?/b/([^/]+)/o(?:/(.+))?", url.path)
        name = query.get("name") or (found and urllib.parse.unquote(found[2] or "")) or self._name_in_body(query)
        if not found or not name:
            return None, query
        try:
            return self.storage.get_file_obj(found[1], name)["generation"], query
        except exceptions.NotFound:
            return "0", query

    def _name_in_body(self, query):
        """The name of an object that comes in one request: in the JSON before its content."""
        if query.get("uploadType") != "multipart":
            return None
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.rfile = io.BytesIO(body)
        return json.loads(re.search(rb"\r?\n\r?\n(\{.*?\})\r?\n--", body, re.DOTALL)[1])["name"]

    def _answer(self, method):
        connection = self.rfile
        try:
            self._answer_or_refuse(method)
        finally:
            self.rfile = connection

    def _answer_or_refuse(self, method):
        self._generation, query = self._object()
        if self._generation is not None:
            if query.get("ifGenerationMatch", self._generation) != self._generation:
                return self._say(412)
            if query.get("ifGenerationNotMatch") == self._generation:
                return self._say(304)
        return method()

    def _say(self, status, body=b""):
        if length := int(self.headers.get("Content-Length") or 0):
            self.rfile.read(length)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self):
        if self._generation not in (None, "0") and self.command == "GET":
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def do_GET(self):
        self._answer(super().do_GET)

    def do_POST(self):
        move = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/?]+)(?:\?.*)?", self.path)
        self._answer(super().do_POST if not move else lambda: self._move(*map(urllib.parse.unquote, move.groups())))

    def _move(self, bucket, source, target):
        """What the emulator does not know: https://cloud.google.com/storage/docs/json_api/v1/objects/move"""
        try:
            moved = {**self.storage.get_file_obj(bucket, source), "name": target, "generation": str(time.time_ns())}
        except exceptions.NotFound:
            return self._say(404)
        self.storage.create_file(bucket, target, self.storage.get_file(bucket, source), moved)
        self.storage.delete_file(bucket, source)
        self._say(200, json.dumps(moved).encode())

    def do_DELETE(self):
        self._answer(super().do_DELETE)


@contextlib.contextmanager
def serve(bucket, patch):
    """Serves an empty bucket while the context lasts, to this process and those that it starts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    patch.setattr(server, "RequestHandler", _Handler)
    # of more than five connections at a time, by default, some would wait seconds for their packet to be sent again
    patch.setattr(http.server.HTTPServer, "request_queue_size", 256)
    emulator = server.create_server("localhost", port, in_memory=True, default_bucket=bucket)
    emulator.start()
    address = f"http://localhost:{port}"
    patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # what Orbax writes arrays with
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google itself what kind of bucket it is
    yield
    emulator.stop()
