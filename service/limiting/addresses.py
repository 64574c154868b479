"""Which client an address stands for. `X-Forwarded-For` counts only from proxies that we trust."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network
_Address = IPv4Address | IPv6Address


def networks(written: Sequence[str]) -> tuple[Network, ...]:
    """CIDR ranges or single addresses. Raises ValueError."""
    return tuple(ip_network(one.strip()) for one in written if one.strip())


def client_address(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """The address to which a limit belongs: IPv4 whole, IPv6 by its /64, because one client has all of that.

    `peer`: who is connected; None for a unix socket, behind which only a proxy of ours can be.
    `forwarded_for`: the values of X-Forwarded-For in order; read from the right, past our own proxies.
    """
    address = _parsed(peer) if peer else None
    chain = [part.strip() for value in forwarded_for for part in value.split(",")]
    while chain and (address is None or _is_in(address, trusted)):
        nearer = _parsed(chain.pop())
        if nearer is None:  # whoever wrote that is as near as we can tell
            break
        address = nearer
    return _as_subject(address) if address is not None else "unix"


def _parsed(text: str) -> _Address | None:
    """Also with a port, as some proxies write it: `192.0.2.1:80`, `[2001:db8::1]:80`."""
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _is_in(address: _Address, trusted: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in trusted)


def _as_subject(address: _Address) -> str:
    if isinstance(address, IPv6Address):
        return f"ip:{IPv6Network((address, 64), strict=False).network_address}/64"
    return f"ip:{address}"
