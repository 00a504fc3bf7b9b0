"""The type checker of the test run: beartype, which takes an int where a float is asked, as Python
does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
