"""The table of queries: each query's own figures, and null where nothing was asked."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.evaluation.test_evaluate import make
from twotower.evaluation.evaluate import evaluate_both
from twotower.evaluation.query_table import query_table, write_query_table


def test_a_query_without_an_answer_is_null_and_the_others_are_their_own(tmp_path):
    # The second user had seen its only right answer; the third one's lies outside of the corpus.
    queries = make([1, 0, 2], [[3], [2], []], [[2], [], []], 4, missing=[0, 0, 1])
    scores = np.tile(np.float32([0, 1, 2, 3]), (3, 1))
    masked, _ = evaluate_both(lambda block: scores[block], queries, (1, 9))
    ids = pa.chunked_array([["a", "b", "c"]]).dictionary_encode()
    path = tmp_path / "evaluation" / "queries.parquet"
    write_query_table(query_table(ids, queries, {"model": masked}, {"split": "test"}), path)
    read = pq.read_table(path)
    assert read.schema.field("user").type == pa.string()
    assert read.schema.metadata[b"twotower"] == b'{"split": "test"}'
    columns = ["user", "query", "answered", "relevant", "model/recall@1", "model/ndcg@9"]
    assert read.select(columns).to_pylist() == [
        dict(zip(columns, ("b", 0, True, 1, 1.0, 1.0))),
        dict(zip(columns, ("a", 1, False, 0, None, None))),
        dict(zip(columns, ("c", 2, True, 1, 0.0, 0.0))),
    ]
    assert not [name for name in read.column_names if "novelty" in name]
