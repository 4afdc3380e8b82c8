"""The transfer queue: where every sample is, who may have it next, and how old it is.

`schema` names columns and stages, `lifecycle` is the state machine, `table` decides (pure), `events` are its decisions,
`journal` keeps them (SQLite), `frames` and `segments` hold the data (Arrow), `account` knows which are needed. `broker`
is the one thin shell with a lock and those who wait; `store` is what everybody uses, and `client` the protocols of
both. `wire` is what they say to each other over Arrow Flight, `flight` the server and `remote` the client.
"""
