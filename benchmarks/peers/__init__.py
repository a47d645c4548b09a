"""Launchers for the servers we compare with."""
