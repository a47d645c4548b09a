"""Engines from outside: their processes, the requests in them and what is counted of both."""
