"""/proc/interrupts: which interrupt is which queue's, by the names that drivers give them. Pure.

No rule of the kernel says how a driver names its interrupts. What is here was taken from the
drivers' request_irq() calls; a name that fits nothing is a queue of unknown number.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Vector(NamedTuple):
    """An interrupt that brings received packets; ``queue`` None: the name does not tell."""

    queue: int | None


# Completions of sent packets only, and what has nothing to do with packets at all.
_NOT_RX = re.compile(
    r"(?:^|[-_.:])(?:tx|output)[-_.]?\d*(?:@.*)?$|-q\d+-tx$|[-_.]tx$"
    r"|(?:^|[-_.:@])(?:config|control|ctrl|event|misc|mgmnt|mgmt|async\d*|cmd\d*|pages\d*"
    r"|link|lsc|fw|hw|err\w*|aeq|ceq-?0?|asq|mbx|mbox|ptp|phc|wol|reset|health|slowpath|sp|ll2"
    r"|other|macsec|vf-?\w*|nic|ts|adminq|notifyq|cvq|vnic|lpi|sfty\w*|safety)(?:[-_.@].*)?$",
    re.IGNORECASE,
)
_QUEUE = (
    # igb, ixgbe, i40e, ice, iavf, bnxt_en, tg3, hns3: eth0-TxRx-3; ena: ens5-Tx-Rx-1;
    # vmxnet3, otx2: eth0-rxtx-0.
    re.compile(r"(?:tx-?rx|rx-?tx)[-_.]?(\d+)(?:@.*)?$", re.IGNORECASE),
    # xen-netfront: eth0-q0-rx.
    re.compile(r"-q(\d+)-rx$", re.IGNORECASE),
    # virtio_net: virtio1-input.0; mlx5: mlx5_comp3@pci:...; bnx2x, qede: eth0-fp-3;
    # e1000e, enic, tg3: eth0-rx-1; cxgb4: eth0-Rx0.
    re.compile(r"(?:^|[-_.:\d])(?:rx|input|comp|fp)[-_.]?(\d+)(?:@.*)?$", re.IGNORECASE),
)
# mlx4-1@0000:..., mana_q1@pci:...: number 0 is for events.
_FROM_ONE = re.compile(r"(?:mlx4-|mana_q)(\d+)@")


def parse(text: str) -> dict[int, tuple[str, ...]]:
    """The names of each numbered interrupt's handlers; those without a number are left out."""
    found: dict[int, tuple[str, ...]] = {}
    lines = text.splitlines()
    columns = len(lines[0].split()) if lines else 0
    for line in lines[1:]:
        number, colon, rest = line.partition(":")
        if not colon or not number.strip().isdigit():
            continue
        # A count for each CPU, the chip, its own number of the interrupt, the names.
        words = rest.split(None, columns)
        told = words[columns] if len(words) > columns else ""
        first, *others = told.split(", ")
        last = first.split()[-1:] if len(first.split()) > 1 else []
        names = tuple(name.strip() for name in (*last, *others))
        if any(names):
            found[int(number)] = names
    return found


def vector(name: str, device: str) -> Vector | None:
    """What the interrupt called ``name`` brings to ``device``; None: no received packets."""
    if name == device:
        return Vector(None)
    # sfc, atlantic, ionic and others: eth0-3, the driver's name perhaps before it.
    plain = re.search(rf"(?:^|[-_:]){re.escape(device)}[-_.](\d+)$", name)
    if plain:
        return Vector(int(plain[1]))
    # A device may be called anything, also "tx": only the rest tells.
    rest = name.replace(device, "", 1) if name.startswith(f"{device}-") else name
    for pattern in _QUEUE:
        told = pattern.search(rest)
        if told:
            return Vector(int(told[1]))
    counted = _FROM_ONE.match(name)
    if counted:
        return Vector(int(counted[1]) - 1) if int(counted[1]) else None
    return None if _NOT_RX.search(rest) else Vector(None)


def names_device(name: str, device: str) -> bool:
    """Whether an interrupt has the device in its name, as its own word."""
    return re.search(rf"(?:^|[-_:@.]){re.escape(device)}(?:$|[-_:@.])", name) is not None
