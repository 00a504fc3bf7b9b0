"""A server of buckets on this machine that speaks what Arrow's file systems ask of S3 and of Google
Cloud Storage."""

import contextlib
import email.utils
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape


class Buckets(ThreadingHTTPServer):
    """Objects by "BUCKET/NAME", each with its time; after `writes_left` more it takes none."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _S3)
        self.objects = {}
        self.uploads = {}
        # Number of objects that may still be written; None for any.
        self.writes_left = None
        self.log = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, key, content):
        if self.writes_left is not None:
            if not self.writes_left:
                return False
            self.writes_left -= 1
        self.objects[key] = (content, time.time())
        return True


class _S3(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A head and its body otherwise wait for each other, 40 ms an answer.
    disable_nagle_algorithm = True

    def log_message(self, *words):
        pass

    def _parse(self):
        path, _, query = self.path.partition("?")
        self.key = urllib.parse.unquote(path)[1:]
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.server.log.append((self.command, self.key, self.query))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            self.body = _unchunk(self.body)

    def _chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, code):
        self._send(status, f"<Error><Code>{code}</Code></Error>".encode())

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self._parse()
        if self.key.startswith("storage/") or self.key.startswith("download/"):
            return self._get_google()
        if "list-type" in self.query:
            return self._list()
        found = self.server.objects.get(self.key)
        if "/" not in self.key.strip("/"):
            return self._send(200)
        if found is None:
            return self._refuse(404, "NoSuchKey")
        content, modified = found
        headers = {"Last_Modified": email.utils.formatdate(modified, usegmt=True), "ETag": '"x"'}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), min(int(span[2]), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], **headers)
        if self.command == "HEAD":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            return None
        return self._send(200, content, **headers)

    def _list(self):
        prefix = f"{self.key}/{self.query.get('prefix', '')}"
        delimiter = self.query.get("delimiter")
        rows, folders = [], set()
        for key, (content, modified) in sorted(self.server.objects.items()):
            if not key.startswith(prefix):
                continue
            name = key[len(self.key) + 1 :]
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(self.query.get("prefix", "") + rest.partition(delimiter)[0] + delimiter)
                continue
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(modified))
            millis = int(modified % 1 * 1000)
            rows.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size>"
                f"<LastModified>{stamp}.{millis:03d}Z</LastModified></Contents>"
            )
        found = "".join(rows) + "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        )
        count = len(rows) + len(folders)
        body = (
            f"<ListBucketResult><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>"
            f"{found}</ListBucketResult>"
        )
        self._send(200, body.encode(), Content_Type="application/xml")

    def _get_google(self):
        """An object or its description, or those of a bucket, by name."""
        bucket, _, name = self.key.partition("/b/")[2].partition("/o")
        objects = self.server.objects
        if name:
            key = f"{bucket}{name}"
            if key not in objects:
                return self._send_json(404, {"error": {"code": 404, "message": "Not Found"}})
            if self.query.get("alt") == "media":
                return self._send(200, objects[key][0])
            return self._send_json(200, self._describe(key))
        start = f"{bucket}/{self.query.get('prefix', '')}"
        found = [self._describe(key) for key in sorted(objects) if key.startswith(start)]
        return self._send_json(200, {"kind": "storage#objects", "items": found})

    def _describe(self, key):
        content, modified = self.server.objects[key]
        bucket, _, name = key.partition("/")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified))
        described = {"kind": "storage#object", "bucket": bucket, "name": name, "updated": stamp}
        described["timeCreated"] = stamp
        return described | {"size": str(len(content)), "generation": "1", "id": key}

    def _send_json(self, status, content):
        self._send(status, json.dumps(content).encode(), Content_Type="application/json")

    def _put_google(self):
        """Parts of an object, in their order, each with its place in a header."""
        parts = self.server.uploads[self.query["upload_id"]]
        parts["content"] += self.body
        if self.headers["Content-Range"].endswith("/*"):
            return self._send(308, Range=f"bytes=0-{len(parts['content']) - 1}")
        if not self.server.put(parts["key"], parts["content"]):
            return self._send_json(403, {"error": {"code": 403, "message": "Forbidden"}})
        return self._send_json(200, self._describe(parts["key"]))

    def do_POST(self):
        self._parse()
        if self.key.startswith("upload/storage/"):
            bucket = self.key.partition("/b/")[2].partition("/")[0]
            number = str(len(self.server.uploads))
            key = f"{bucket}/{self.query['name']}"
            self.server.uploads[number] = {"key": key, "content": b""}
            url = f"{self.server.url}/{self.key}?uploadType=resumable&upload_id={number}"
            return self._send(200, Location=url)
        if "uploads" in self.query:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = {}
            name = "InitiateMultipartUploadResult"
            body = f"<{name}><UploadId>{number}</UploadId></{name}>"
            return self._send(200, body.encode(), Content_Type="application/xml")
        if "delete" in self.query:
            for name in re.findall(rb"<Key>(.*?)</Key>", self.body):
                self.server.objects.pop(f"{self.key}/{name.decode()}", None)
            return self._send(200, b"<DeleteResult></DeleteResult>", Content_Type="application/xml")
        parts = self.server.uploads.pop(self.query["uploadId"])
        if not self.server.put(self.key, b"".join(parts[i] for i in sorted(parts))):
            return self._refuse(403, "AccessDenied")
        body = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        return self._send(200, body.encode(), Content_Type="application/xml")

    def do_PUT(self):
        self._parse()
        if "upload_id" in self.query:
            return self._put_google()
        if "uploadId" in self.query:
            self.server.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = self.body
        elif not self.server.put(self.key, self.body):
            return self._refuse(403, "AccessDenied")
        return self._send(200, ETag='"x"')

    def do_DELETE(self):
        self._parse()
        bucket, _, name = self.key.partition("/b/")[2].partition("/o")
        self.server.objects.pop(f"{bucket}{name}" if name else self.key, None)
        self._send(204)


def _unchunk(body):
    """The content of a body in the chunks of AWS, each with its size in a line before it."""
    content = b""
    while body:
        line, _, body = body.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        content += body[:size]
        body = body[size + 2 :]
    return content


@contextlib.contextmanager
def serving():
    server = Buckets()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def set_addresses(patch, server):
    """Lets the clients of both clouds ask the server."""
    patch.setenv("AWS_ENDPOINT_URL", server.url)
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)
