"""The HTTP service of AsyncFlow (installed as `asyncflow_api`)."""
