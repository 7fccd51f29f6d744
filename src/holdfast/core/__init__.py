"""The domain: values and pure rules. Standard library and pydantic only; no I/O, clock or randomness that is not passed in."""
