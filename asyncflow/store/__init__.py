"""The transfer queue: where every sample is, who may have it next, and how old it is.

`schema` names columns and stages, `lifecycle` is the state machine, `table` decides (pure), `events` are its decisions,
`journal` keeps them (SQLite), `frames` are the data (Arrow), `segments` the files they are in, `bulk` reads many of
them at once, `broker` is the one thin shell with locks and waits, and `client` is the protocol through which everybody
talks to it.
"""
