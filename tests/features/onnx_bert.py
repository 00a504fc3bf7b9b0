"""BERT's encoder as an ONNX graph over given weights, as exporters write it: for tests of models
that no network brings."""

import numpy as np

from tests.extras import extra


class Graph:
    """A graph under construction: each method adds a node and returns the name of its output."""

    def __init__(self):
        extra("onnx", "dev")
        self.nodes = []
        self.initializers = []

    def constant(self, value):
        from onnx import numpy_helper

        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator, *inputs, **attributes):
        from onnx import helper

        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def save(self, path, output, inputs, width):
        import onnx
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [output], ["last_hidden_state"]))
        ends = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in inputs
        ]
        shape = ["batch", "length", width]
        hidden = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "encoder", ends, [hidden], self.initializers)
        opset = [helper.make_opsetid("", 17)]
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


class Bert(Graph):
    """The encoder of a BERT or XLM-RoBERTa model.

    Args:
        weights: Name -> array, as published, without a prefix.
        config: The model's config.json.
    """

    def __init__(self, weights, config):
        super().__init__()
        self.weights = weights
        self.config = config
        self.heads = config["num_attention_heads"]
        self.head_width = config["hidden_size"] // self.heads

    def weight(self, name):
        return self.constant(self.weights[name])

    def number(self, value):
        return self.constant(np.float32(value))

    def dense(self, x, name):
        product = self.add("MatMul", x, self.constant(self.weights[f"{name}.weight"].T))
        return self.add("Add", product, self.weight(f"{name}.bias"))

    def norm(self, x, name):
        parts = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        epsilon = self.config["layer_norm_eps"]
        return self.add("LayerNormalization", x, *parts, axis=-1, epsilon=epsilon)

    def gelu(self, x):
        error = self.add("Erf", self.add("Div", x, self.number(np.sqrt(2))))
        half = self.add("Mul", x, self.number(0.5))
        return self.add("Mul", half, self.add("Add", error, self.number(1)))

    def split_heads(self, x):
        shape = self.constant(np.array([0, 0, self.heads, self.head_width], np.int64))
        return self.add("Transpose", self.add("Reshape", x, shape), perm=[0, 2, 1, 3])

    def positions(self):
        if self.config["model_type"] == "bert":
            zeros = self.add("Sub", "input_ids", "input_ids")
            ones = self.add("Add", zeros, self.constant(np.int64(1)))
            counted = self.add("CumSum", ones, self.constant(np.int64(1)))
            return self.add("Sub", counted, self.constant(np.int64(1)))
        # Of tokens alone, counted from behind the padding's id.
        counted = self.add("CumSum", "attention_mask", self.constant(np.int64(1)))
        counted = self.add("Mul", counted, "attention_mask")
        return self.add("Add", counted, self.constant(np.int64(self.config["pad_token_id"])))

    def embeddings(self):
        words = self.weight("embeddings.word_embeddings.weight")
        x = self.add("Gather", words, "input_ids")
        table = self.weight("embeddings.position_embeddings.weight")
        x = self.add("Add", x, self.add("Gather", table, self.positions()))
        kinds = self.weight("embeddings.token_type_embeddings.weight")
        x = self.add("Add", x, self.add("Gather", kinds, "token_type_ids"))
        return self.norm(x, "embeddings.LayerNorm")

    def padding_logits(self):
        mask = self.add("Cast", "attention_mask", to=1)
        logits = self.add("Mul", self.add("Sub", self.number(1), mask), self.number(-1e9))
        return self.add("Unsqueeze", logits, self.constant(np.array([1, 2], np.int64)))

    def attention(self, x, padding, name):
        names = [f"{name}.self.{part}" for part in ("query", "key", "value")]
        query, key, value = (self.split_heads(self.dense(x, part)) for part in names)
        scores = self.add("MatMul", query, self.add("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.add("Div", scores, self.number(np.sqrt(self.head_width)))
        shares = self.add("Softmax", self.add("Add", scores, padding), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", shares, value), perm=[0, 2, 1, 3])
        joined = self.constant(np.array([0, 0, self.config["hidden_size"]], np.int64))
        return self.dense(self.add("Reshape", mixed, joined), f"{name}.output.dense")

    def block(self, x, padding, name):
        mixed = self.attention(x, padding, f"{name}.attention")
        x = self.norm(self.add("Add", x, mixed), f"{name}.attention.output.LayerNorm")
        hidden = self.gelu(self.dense(x, f"{name}.intermediate.dense"))
        added = self.add("Add", x, self.dense(hidden, f"{name}.output.dense"))
        return self.norm(added, f"{name}.output.LayerNorm")


def write_bert(path, weights, config):
    """Writes a model of these weights to an ONNX file; see `Bert`."""
    graph = Bert(weights, config)
    padding = graph.padding_logits()
    x = graph.embeddings()
    for layer in range(config["num_hidden_layers"]):
        x = graph.block(x, padding, f"encoder.layer.{layer}")
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    graph.save(path, x, inputs, config["hidden_size"])
