"""Deciders that ask a policy engine: `file` (rules in CEL, in one YAML file), `cedar`, `authzen`, `rego`.

Each comes with an extra of the same name, `file` with ``policy``, and is imported as a module of its own.
"""
