"""The part of BigQuery's REST interface that the library uses, in this process: tables in memory,
and load jobs that check schema, partition and Parquet payload as BigQuery does. Queries are known
by their text."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ALIASES = {"INT64": "INTEGER", "FLOAT64": "FLOAT", "BOOL": "BOOLEAN"}
TYPES = {
    "string": "STRING",
    "int64": "INTEGER",
    "float": "FLOAT",
    "double": "FLOAT",
    "bool": "BOOLEAN",
    "date32[day]": "DATE",
    "timestamp[us, tz=UTC]": "TIMESTAMP",
}


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclasses.dataclass
class Table:
    resource: dict[str, Any]
    rows: pa.Table | None = None


class BigQuery:
    """What the server holds.

    Attributes:
        tables: "dataset.table" -> its resource and rows.
        queries: SQL -> the result; anything else is a syntax error, or run by `database`.
        database: `tests.bigquery_sql.Database` that runs all other SQL; None for none.
        broken: where it is set, load jobs fail at the end, with it as their message.
        page: rows of an answer.
        calls: "METHOD path" of every request.
    """

    def __init__(self) -> None:
        self.datasets: set[str] = {"shop"}
        self.tables: dict[str, Table] = {}
        self.queries: dict[str, pa.Table] = {}
        self.database: Any = None
        self.broken = ""
        self.page = 1000
        self.calls: list[str] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, dict[str, Any]] = {}

    def put(self, name: str, rows: pa.Table, kind: str = "TABLE") -> None:
        """A table that is there already."""
        project = self.database.project if self.database else "p"
        self.tables[name] = Table(
            {
                **_reference(project, *name.split(".")),
                "type": kind,
                "schema": {"fields": fields(rows)},
            },
            rows,
        )

    def add(self, name: str, rows: pa.Table) -> None:
        """A table that is there already, for SQL too."""
        self.database.put(name, rows)
        self.put(name, rows)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        for verb, pattern, handler in ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                return handler(self, *map(unquote, found.groups()), query, body)
        raise Refused(404, "notFound", f"no such method: {method} {path}")

    def create(self, project: str, dataset: str, query: dict, body: bytes) -> dict[str, Any]:
        resource = json.loads(body)
        name = f"{dataset}.{resource['tableReference']['tableId']}"
        if dataset not in self.datasets:
            raise Refused(404, "notFound", f"Not found: Dataset {project}:{dataset}")
        if name in self.tables:
            raise Refused(409, "duplicate", f"Already Exists: Table {project}:{name}")
        for field in resource["schema"]["fields"]:
            field["type"] = ALIASES.get(field["type"], field["type"])
        self.tables[name] = Table(resource | {"type": "TABLE", "location": "EU"})
        return self.tables[name].resource

    def get(
        self, project: str, dataset: str, table: str, query: dict, body: bytes
    ) -> dict[str, Any]:
        return self._table(project, f"{dataset}.{table}").resource

    def rows(
        self, project: str, dataset: str, table: str, query: dict, body: bytes
    ) -> dict[str, Any]:
        one = self._table(project, f"{dataset}.{table}")
        if one.resource["type"] == "VIEW":
            raise Refused(400, "invalid", f"Cannot list a table of type VIEW: {table}")
        return self._page(one.rows, query)

    def start(self, project: str, query: dict, body: bytes) -> dict[str, Any]:
        """A query job."""
        job = json.loads(body)
        sql = job["configuration"]["query"]["query"]
        if self.database is not None:
            return self._run(job, project, sql)
        if sql not in self.queries:
            raise Refused(400, "invalidQuery", f"Syntax error: Unexpected query {sql!r} at [1:1]")
        return self._select(job, project)

    def _select(self, job: dict[str, Any], project: str) -> dict[str, Any]:
        job["configuration"]["query"]["destinationTable"] = {
            "projectId": project,
            "datasetId": "_anonymous",
            "tableId": "result",
        }
        return self._done(job | {"statistics": {"query": {"statementType": "SELECT"}}})

    def _run(self, job: dict[str, Any], project: str, sql: str) -> dict[str, Any]:
        """A query that is only described, or a script with the tables that it leaves."""
        configuration = job["configuration"]
        try:
            if configuration.get("dryRun"):
                rows = self.database.select(sql, limit=0)
                described = {"schema": {"fields": fields(rows)}, "totalBytesProcessed": "1234567"}
                statistics = {"query": described, "totalBytesProcessed": "1234567"}
                job.setdefault("jobReference", {"projectId": "p"}).setdefault("jobId", "dry")
                return self._done(job | {"statistics": statistics})
            if sql.startswith("SELECT"):
                self.queries[sql] = self.database.select(sql)
                return self._select(job, project)
            self.database.run(sql)
            for name in self.database.tables():
                self.put(name, self.database.rows(name))
        # Otherwise the client would ask again for minutes.
        except Exception as error:
            raise Refused(400, "invalidQuery", f"{type(error).__name__}: {error}") from error
        return self._done(job | {"statistics": {"query": {"statementType": "SCRIPT"}}})

    def results(self, project: str, job: str, query: dict, body: bytes) -> dict[str, Any]:
        reference = self.jobs[job]["jobReference"]
        sql = self.jobs[job]["configuration"]["query"]["query"]
        # A script has no rows.
        if self.database is not None and sql not in self.queries:
            return {"jobComplete": True, "jobReference": reference}
        rows = self.queries[sql]
        return {
            "jobComplete": True,
            "jobReference": reference,
            "schema": {"fields": fields(rows)},
            **self._page(rows, query),
        }

    def job(self, project: str, job: str, query: dict, body: bytes) -> dict[str, Any]:
        return self.jobs[job]

    def load(self, job: dict[str, Any], payload: bytes) -> dict[str, Any]:
        """A load job: all of the payload, or an error in its status and nothing."""
        try:
            rows = self._load(job["configuration"]["load"], payload)
        except Refused as refused:
            return self._done(job, error={"reason": refused.reason, "message": str(refused)})
        return self._done(job | {"statistics": {"load": {"outputRows": str(rows)}}})

    def _load(self, load: dict[str, Any], payload: bytes) -> int:
        to = load["destinationTable"]
        name, _, partition = f"{to['datasetId']}.{to['tableId']}".partition("$")
        table = self._table(to["projectId"], name)
        assert load["sourceFormat"] == "PARQUET" and load["createDisposition"] == "CREATE_NEVER"
        new = pq.read_table(io.BytesIO(payload))
        infer = load.get("parquetOptions", {}).get("enableListInference", False)
        wanted, given = table.resource["schema"]["fields"], fields(new, infer=infer)
        if _plain(wanted) != _plain(given):
            raise Refused(
                400, "invalid", f"Provided Schema does not match Table {name}: {_plain(given)}"
            )
        column = table.resource.get("timePartitioning", {}).get("field")
        if partition:
            day = datetime.datetime.strptime(partition, "%Y%m%d").date()
            if table.resource["timePartitioning"]["type"] != "DAY" or set(
                new[column].to_pylist()
            ) - {day}:
                raise Refused(
                    400,
                    "invalid",
                    f"The row's value of {column} is not in the partition {partition}",
                )
        if self.broken:
            raise Refused(500, "backendError", self.broken)
        old = table.rows if table.rows is not None else new.slice(0, 0)
        if load["writeDisposition"] == "WRITE_TRUNCATE":
            old = (
                old.filter(pc.not_equal(old[column], pa.scalar(day)))
                if partition
                else old.slice(0, 0)
            )
        table.rows = pa.concat_tables([old, new.select(old.column_names)])
        return len(new)

    def _table(self, project: str, name: str) -> Table:
        if name not in self.tables:
            raise Refused(404, "notFound", f"Not found: Table {project}:{name}")
        return self.tables[name]

    def _page(self, rows: pa.Table, query: dict[str, str]) -> dict[str, Any]:
        start = int(query.get("pageToken") or query.get("startIndex") or 0)
        stop = min(start + min(self.page, int(query.get("maxResults", self.page))), len(rows))
        some = [
            {"f": [{"v": _json(v)} for v in row.values()]}
            for row in rows.slice(start, stop - start).to_pylist()
        ]
        more = {"pageToken": str(stop)} if stop < len(rows) else {}
        return {"totalRows": str(len(rows)), "rows": some, **more}

    def _done(self, job: dict[str, Any], error: dict[str, str] | None = None) -> dict[str, Any]:
        failed = {"errorResult": error, "errors": [error]} if error else {}
        self.jobs[job["jobReference"]["jobId"]] = job | {"status": {"state": "DONE", **failed}}
        return self.jobs[job["jobReference"]["jobId"]]


_AT = r"/bigquery/v2/projects/([^/]+)"
ROUTES = [
    ("POST", rf"{_AT}/datasets/([^/]+)/tables", BigQuery.create),
    ("GET", rf"{_AT}/datasets/([^/]+)/tables/([^/]+)", BigQuery.get),
    ("GET", rf"{_AT}/datasets/([^/]+)/tables/([^/]+)/data", BigQuery.rows),
    ("POST", rf"{_AT}/jobs", BigQuery.start),
    ("GET", rf"{_AT}/queries/([^/]+)", BigQuery.results),
    ("GET", rf"{_AT}/jobs/([^/]+)", BigQuery.job),
]


class _Handler(BaseHTTPRequestHandler):
    state: BigQuery
    protocol_version = "HTTP/1.1"
    # A head and its body otherwise wait for each other, 40 ms an answer.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.state.calls.append(f"{self.command} {parts.path}")
        try:
            if "/upload/" in parts.path:
                self._upload(parts.path, body)
            else:
                self._send(200, self.state.answer(self.command, parts.path, query, body))
        except Refused as refused:
            error = {"reason": refused.reason, "message": str(refused)}
            self._send(
                refused.status,
                {"error": {"code": refused.status, "message": str(refused), "errors": [error]}},
            )

    do_POST = do_PUT = do_GET

    def _upload(self, path: str, body: bytes) -> None:
        """A resumable upload, begun and then sent at once."""
        if self.command == "POST":
            key = str(len(self.state.uploads))
            self.state.uploads[key] = json.loads(body)
            self._send(200, {}, {"Location": f"http://{self.headers['Host']}{path}/{key}"})
        else:
            self._send(200, self.state.load(self.state.uploads[path.rpartition("/")[2]], body))

    def _send(
        self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[BigQuery, str]]:
    """What the server holds, and its address."""
    state = BigQuery()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fields(rows: pa.Table, *, infer: bool = True) -> list[dict[str, Any]]:
    """The schema that BigQuery takes from Parquet; lists are records unless it is told to infer
    them."""
    return [_field(field, infer) for field in rows.schema]


def _field(field: pa.Field, infer: bool) -> dict[str, Any]:
    if pa.types.is_list(field.type):
        inner = _field(field.type.value_field, infer)
        if infer:
            return {"name": field.name, "type": inner["type"], "mode": "REPEATED"}
        return {"name": field.name, "type": "RECORD", "mode": "NULLABLE", "fields": [inner]}
    mode = "NULLABLE" if field.nullable else "REQUIRED"
    return {"name": field.name, "type": TYPES[str(field.type)], "mode": mode}


def _plain(found: list[dict[str, Any]]) -> list[tuple]:
    return sorted((field["name"], field["type"], field.get("mode", "NULLABLE")) for field in found)


def _reference(project: str, dataset: str, table: str) -> dict[str, Any]:
    return {"tableReference": {"projectId": project, "datasetId": dataset, "tableId": table}}


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [{"v": _json(one)} for one in value]
    if isinstance(value, datetime.datetime):
        return str(round(value.timestamp() * 1e6))
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else None
        if value is None
        else str(value)
    )
