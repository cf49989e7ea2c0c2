"""Which addresses belong to the public network, whatever they are wrapped in."""

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

# What `is_global` of some version of Python calls global all the same.
_SPECIAL_4 = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"))
_SPECIAL_6 = (IPv6Network("2001::/23"), IPv6Network("2001:db8::/32"), IPv6Network("3fff::/20"))
_UNICAST_6 = IPv6Network("2000::/3")
"""All of IPv6 that is handed out for the public network."""
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: Address, trusted: Collection[Address] = ()) -> bool:
    """Whether it is, and every address in it too: of IPv4-mapped, NAT64, 6to4 and Teredo ones. Or it is `trusted`."""
    if address in trusted:
        return True
    if isinstance(address, IPv4Address):
        is_special = address.is_multicast or any(address in network for network in _SPECIAL_4)
        return address.is_global and not is_special
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped, trusted)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF), trusted)
    if address.sixtofour is not None and not is_public(address.sixtofour):
        return False
    if address.teredo is not None and not all(is_public(inner) for inner in address.teredo):
        return False
    is_special = any(address in network for network in _SPECIAL_6)
    return address.is_global and address in _UNICAST_6 and not is_special
