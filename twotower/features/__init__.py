"""Features of users and items: one module a kind, a specification, and the encoder of both towers.

>>> from twotower.features.spec import from_mappings
>>> spec = from_mappings({"item": {"title": {"type": "text", "embedding_size": 32}}})
>>> list(spec.item), list(spec.user)
(['title'], ['user_id'])
"""
