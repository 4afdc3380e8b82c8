"""The HTTP service from Python: `Client` submits jobs, watches and steers them, and looks into their runs.

    from asyncflow.client import Client

    with Client("http://127.0.0.1:8765", token) as client:      # or Client.from_login(), after `asyncflow login`
        job = client.submit({"model": "tiny", …})
        for event in client.events(job.id):                     # goes on over disconnects, until the job has ended
            print(event.message)

`client` is what there is to call, `models` what comes back, `connection` one request with its deadline and its repeats,
`streams` server-sent events that resume, `login` the file that `asyncflow login` writes.
"""

from __future__ import annotations

from asyncflow.client.client import Client
from asyncflow.errors import ServiceError, ServiceUnreachable

__all__ = ["Client", "ServiceError", "ServiceUnreachable"]
