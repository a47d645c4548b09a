"""Names as browsers send them: the origin of a page, and the host that it asks for."""

from __future__ import annotations

import ipaddress
import re

DEFAULT_PORTS = {"http": "80", "ws": "80", "https": "443", "wss": "443"}
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[^\]/]*\]|[^\[\]:/]+)(?::([0-9]*))?", re.ASCII)
NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII)
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::([0-9]*))?", re.ASCII)
LOOPBACK_NAME = "localhost"
# Where a server is that nobody told another place.
DEFAULT_URL = "http://127.0.0.1:8000"


def origin_fault(text: str) -> str | None:
    """Why no page can have this origin, in words that follow it; None where one can. `*` stands for
    every page, `null` for those without an origin."""
    if text in ("*", "null"):
        return None
    reason = _origin_reason(text)
    if reason is None:
        return None
    return f"matches no page: {reason}; an origin looks like http://localhost:3000"


def _origin_reason(text: str) -> str | None:
    if "," in text:
        return "it is several, and each is given alone"
    if "*" in text:
        return "it is no pattern (`*` alone stands for all)"
    if "://" not in text:
        return "it has no scheme"
    if text != text.lower() or not text.isascii():
        return "browsers write it in lower case and ASCII"
    parts = ORIGIN.fullmatch(text)
    if parts is None:
        scheme, _, rest = text.partition("://")
        if "/" in rest:
            return "a path or a slash at the end is no part of it"
        return "it is not SCHEME://HOST or SCHEME://HOST:PORT"
    scheme, host, port = parts.groups()
    if port is not None and not _is_port(port):
        return f"{port or 'nothing'} is no port"
    if port is not None and DEFAULT_PORTS.get(scheme) == port:
        return f"browsers leave out the port {port} of {scheme}"
    return _host_reason(host)


def host_fault(text: str) -> str | None:
    """Why no client can ask for this host, in words that follow it; None where one can. `*` stands
    for every host."""
    if text == "*":
        return None
    host = f"[{text}]" if text.count(":") > 1 else text
    if text != text.lower():
        reason: str | None = "it is written in lower case"
    elif text.endswith("."):
        reason = "the dot at its end is left out"
    else:
        reason = _host_reason(host)
    if reason is None:
        return None
    return f"is no host: {reason}; give a name or an address without scheme and port, or `*`"


def _host_reason(host: str) -> str | None:
    """An address is compared as browsers write it: in its shortest form."""
    if host.startswith("["):
        return None if _shortest(host[1:-1]) == host[1:-1] else f"{host} is no IPv6 address"
    if NAME.fullmatch(host) is None:
        return f"{host} is no name"
    if host.rstrip(".").rpartition(".")[2].isdigit() and _shortest(host) != host:
        return f"{host} is no IPv4 address"
    return None


def _shortest(address: str) -> str | None:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return None


def _is_port(text: str) -> bool:
    return text.isdigit() and text == str(int(text)) and int(text) < 65536


def split_authority(text: str) -> tuple[str, str | None] | None:
    """Host, without brackets and in lower case, and port of a header Host; None for what is
    neither."""
    parts = AUTHORITY.fullmatch(text)
    if parts is None:
        return None
    host, port = parts.groups()
    return host.lower().removesuffix(".").strip("[]"), port or None


def split_origin(text: str) -> tuple[str, str | None] | None:
    """Host and port, which is never left out of a scheme whose port is known."""
    scheme, _, authority = text.partition("://")
    parts = split_authority(authority)
    if parts is None or not parts[0]:
        return None
    return parts[0], parts[1] or DEFAULT_PORTS.get(scheme)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can be meant: localhost, and addresses like 127.0.0.1."""
    if host == LOOPBACK_NAME:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def is_loopback_name(host: str) -> bool:
    """Also the names under localhost, which resolvers give to this machine (RFC 6761)."""
    return is_loopback(host) or host.endswith("." + LOOPBACK_NAME)
