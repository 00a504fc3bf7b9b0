"""A check of data against the part of JSON Schema that Kubernetes uses for its resources."""

from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def mistakes(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Returns what does not fit: wrong types, missing and unknown fields, values that are not open.

    Args:
        value: Data, as JSON or YAML gives it.
        schema: Its schema, of type, enum, required, properties, additionalProperties and items.
        path: Path of the data in the whole, for the messages.
    """
    kind = schema.get("type")
    # In Python True is an integer too.
    if kind and (not isinstance(value, TYPES[kind]) or (kind == "integer" and value is True)):
        return [f"{path}: {value!r} is no {kind}"]
    if value not in schema.get("enum", [value]):
        return [f"{path}: {value!r} is none of {schema['enum']}"]
    found = []
    if kind == "array":
        for number, item in enumerate(value):
            found += mistakes(item, schema["items"], f"{path}[{number}]")
    if kind == "object":
        for name in schema.get("required", []):
            if name not in value:
                found.append(f"{path}.{name} is missing")
        for name, item in value.items():
            known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if known is None:
                found.append(f"{path}.{name} is unknown")
            else:
                found += mistakes(item, known, f"{path}.{name}")
    return found
