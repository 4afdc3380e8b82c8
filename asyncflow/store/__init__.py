"""The transfer queue: where every sample is, who may have it next, and how old it is.

`schema` names columns and stages, `lifecycle` is the state machine, `table` decides (pure), `events` are its decisions,
`journal` keeps them (SQLite), `segments` hold the data (Arrow), `broker` is the one thin shell with locks and waits,
and `client` is the protocol through which everybody talks to it.
"""
