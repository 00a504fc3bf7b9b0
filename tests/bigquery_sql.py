"""BigQuery's SQL and its scripts on DuckDB, translated by `sqlglot` statement by statement.

What BigQuery itself would refuse and DuckDB takes is not seen, but for errors of syntax.
"""

from __future__ import annotations

import io
import re

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot
from sqlglot import exp
from sqlglot.tokens import Token, TokenType

# Spaces of Unicode, which DuckDB's own `trim` leaves.
SPACES = r"[\s\p{Z}\x{85}]+"


class Database:
    """Tables "dataset.table" of one project, and the objects of buckets that are written.

    Attributes:
        statements: Statements that were run, in BigQuery's SQL.
        variables: Values of the variables of the last script.
    """

    def __init__(self, project: str = "p"):
        self.connection = duckdb.connect(config={"threads": 2})
        self.connection.execute(f"SET TimeZone = 'UTC'; ATTACH ':memory:' AS \"{project}\"")
        self.project = project
        self.statements: list[str] = []
        self.variables: dict[str, object] = {}
        self.schemas: set[str] = set()

    def put(self, name: str, rows: pa.Table) -> None:
        dataset, table = name.split(".")
        self._make(dataset)
        self.connection.register("given", rows)
        self.connection.execute(
            f'CREATE OR REPLACE TABLE "{self.project}"."{dataset}"."{table}" AS FROM given'
        )
        self.connection.unregister("given")

    def _make(self, dataset: str) -> None:
        if dataset not in self.schemas:
            self.connection.execute(f'CREATE SCHEMA "{self.project}"."{dataset}"')
            self.schemas.add(dataset)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object "BUCKET/NAME"; a test puts that of its buckets in its place."""
        raise NotImplementedError(name)

    def tables(self) -> list[str]:
        sql = (
            "SELECT schema_name, table_name FROM duckdb_tables() "
            f"WHERE database_name = '{self.project}'"
        )
        return [".".join(row) for row in self.connection.execute(sql).fetchall()]

    def rows(self, name: str) -> pa.Table:
        dataset, table = name.split(".")
        return self._typed(f'FROM "{self.project}"."{dataset}"."{table}"')

    def select(self, sql: str, limit: int | None = None) -> pa.Table:
        (statement,) = parse(sql)
        sql = translate(statement, {})
        return self._typed(sql if limit is None else f"FROM ({sql}) LIMIT {limit}")

    def run(self, script: str) -> None:
        """Runs a script: declarations, assignments, WHILE loops, and other statements."""
        self.variables = {}
        try:
            self._run_block(split(script))
        finally:
            # Temporary tables are those of one script.
            sql = "SELECT table_name FROM duckdb_tables() WHERE temporary"
            for (name,) in self.connection.execute(sql).fetchall():
                self.connection.execute(f'DROP TABLE temp."{name}"')

    def _run_block(self, statements: list) -> None:
        for statement in statements:
            if isinstance(statement, tuple):
                condition, block = statement
                while self._value(condition):
                    self._run_block(block)
            else:
                self._run_one(statement)

    def _run_one(self, sql: str) -> None:
        self.statements.append(sql)
        declared = re.fullmatch(r"DECLARE ([\w, ]+) (?:BOOL|INT64|FLOAT64)(?: DEFAULT (.*))?", sql)
        if declared:
            value = self._value(declared[2]) if declared[2] else None
            self.variables |= dict.fromkeys(declared[1].split(", "), value)
            return
        assigned = re.fullmatch(r"SET (\w+) = (.*)", sql, re.DOTALL)
        if assigned:
            assert assigned[1] in self.variables, assigned[1]
            self.variables[assigned[1]] = self._value(assigned[2])
            return
        exported = re.fullmatch(r"EXPORT DATA OPTIONS \((.*?)\) AS\s(.*)", sql, re.DOTALL)
        if exported:
            self._export(exported[1], exported[2])
            return
        (statement,) = parse(sql)
        for table in statement.find_all(exp.Table):
            if table.db:
                self._make(table.db)
        self.connection.execute(translate(statement, self.variables))

    def _value(self, sql: str) -> object:
        (statement,) = parse(f"SELECT {sql}")
        ((value,),) = self.connection.execute(translate(statement, self.variables)).fetchall()
        return value

    def _export(self, options: str, query: str) -> None:
        values = dict(re.findall(r"(\w+) = '?([^',\n]+)'?", options))
        assert values["format"] == "PARQUET" and values["uri"].count("*") == 1, options
        rows = self.select(query)
        # In several files, and in no order.
        half = len(rows) // 2
        for number, part in enumerate((rows.slice(half), rows.slice(0, half))):
            file = io.BytesIO()
            pq.write_table(part, file)
            uri = values["uri"].replace("*", f"{number:012d}")
            self.write(uri.removeprefix("gs://"), file.getvalue())

    def _typed(self, sql: str) -> pa.Table:
        """Rows with the types that BigQuery has, whose whole numbers are all of 64 bits."""
        rows = self.connection.sql(sql).to_arrow_table()
        kinds = {pa.types.is_integer: pa.int64(), pa.types.is_timestamp: pa.timestamp("us", "UTC")}
        fields = []
        for field in rows.schema:
            for is_kind, kind in kinds.items():
                if is_kind(field.type):
                    field = field.with_type(kind)
            fields.append(field)
        return rows.cast(pa.schema(fields))


def parse(sql: str) -> list[exp.Expression]:
    found = sqlglot.parse(sql, read="bigquery", error_level=sqlglot.ErrorLevel.RAISE)
    assert not any(isinstance(statement, exp.Command) for statement in found), sql
    return found


def translate(statement: exp.Expression, variables: dict[str, object]) -> str:
    """A statement as DuckDB's SQL, with the values of variables in it."""

    def replace(node: exp.Expression) -> exp.Expression:
        if isinstance(node, exp.Column) and not node.table and node.name in variables:
            value = exp.convert(variables[node.name])
            return exp.cast(value, "bigint") if type(variables[node.name]) is int else value
        if isinstance(node, exp.Literal) and node.is_string:
            text = re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), node.name)
            return exp.Literal.string(text)
        if isinstance(node, exp.Normalize):
            return exp.func("nfc_normalize", node.this)
        if isinstance(node, exp.Trim) and not node.expression:
            text = exp.Literal.string(f"^{SPACES}|{SPACES}$")
            return exp.Anonymous(
                this="regexp_replace",
                expressions=[node.this, text, exp.Literal.string(""), exp.Literal.string("g")],
            )
        # Sums and counts of BigQuery have 64 bits, and not 128.
        is_sum = isinstance(node, exp.Window) and isinstance(node.this, exp.Sum)
        if is_sum or isinstance(node, exp.CountIf):
            return exp.cast(node, "bigint")
        if isinstance(node, exp.UnixSeconds):
            return exp.cast(exp.func("floor", exp.func("epoch", node.this)), "bigint")
        return node

    return statement.transform(replace).sql(
        dialect="duckdb", unsupported_level=sqlglot.ErrorLevel.RAISE
    )


def split(script: str) -> list:
    """The statements of a script: texts, and for a loop its condition and its own statements."""
    # A word of no dialect: `sqlglot` takes all behind WHILE for one text.
    tokens = sqlglot.tokenize(re.sub(r"\bWHILE\b", "_HILE", script), read="bigquery")
    statements, rest = _split(script, tokens)
    assert not rest, rest
    return statements


def _split(script: str, tokens: list[Token]) -> tuple[list, list[Token]]:
    statements = []
    while tokens:
        words = [token.text.upper() for token in tokens[:2]]
        if words == ["END", "_HILE"]:
            return statements, tokens[2:]
        if words[0] == "_HILE":
            begin = next(n for n, token in enumerate(tokens) if token.text.upper() == "DO")
            condition = script[tokens[1].start : tokens[begin - 1].end + 1]
            block, tokens = _split(script, tokens[begin + 1 :])
            statements.append((condition, block))
        else:
            end = next(n for n, one in enumerate(tokens) if one.token_type == TokenType.SEMICOLON)
            statements.append(script[tokens[0].start : tokens[end - 1].end + 1])
            tokens = tokens[end:]
        assert tokens[0].token_type == TokenType.SEMICOLON
        tokens = tokens[1:]
    return statements, tokens
