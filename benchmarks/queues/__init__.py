"""The queues that `asyncflow bench store` and `benchmarks.semantics` compare, behind one small interface.

Each queue runs in a process and a Python environment of its own: `python -m benchmarks.queues NAME FOLDER` answers JSON
lines (`child`). What is measured is written once, against `base` (`figures`), so both sides do the same work. Only
`asyncflow_store` imports anything of AsyncFlow.
"""
