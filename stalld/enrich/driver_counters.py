"""Which of a driver's own counters (``ethtool -S``) are lost received packets, by name. Pure.

Their names are each driver's own. The table holds those that count packets lost for want of
room or time; checksum errors, XDP's verdicts and packets that nobody wanted are not meant.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Counter(NamedTuple):
    """A counter of lost packets; ``queue`` None: of the whole device."""

    queue: int | None


_LOST = (
    r"(?:drops?|dropped|dropped_pkts?|discards?|discard_packets|no_?bufs?|no_?buffers?(?:_posted)?"
    r"|buff_alloc_err|alloc_fail(?:ed)?|alloc_rx_buff_failed|skb_alloc_(?:fail(?:ed)?|discard)"
    r"|page_alloc_fail|alloc_err|out_of_buffer|buf_alloc_(?:fail|err)|sw_dropped|hw_drops"
    r"|hw_drop_overruns|overruns?|nobuf_drops|oversize_pkts_sw_drop|fifo_errors|ring_full"
    r"|page_allocation_error|noskb_drops|no_desc)"
)
_QUEUES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # igb, igc, virtio_net, ice, nfp: rx_queue_3_drops; hns3: rxq3_...
        rf"rx_?q(?:ueue)?[_-]?(\d+)[_.](?:rx_)?{_LOST}",
        # mlx5, mlx4: rx3_buff_alloc_err, rx3_dropped.
        rf"rx[_-]?(\d+)[_.:](?:rx_)?{_LOST}",
        # bnx2x, bnxt_en: [3]: rx_discards.
        rf"\[(\d+)\]: ?rx_{_LOST}",
        # qede: 3: rx_...; ena: queue_3_rx_skb_alloc_fail.
        rf"(?:queue[_-])?(\d+)[_:] ?rx_{_LOST}",
        # gve: rx_no_buffers_posted[3], rx_dropped_pkt[3].
        rf"rx_(?:dropped_pkt|no_buffers_posted|drops_packet_over_mru|{_LOST})\[(\d+)\]",
        # hns3: rxq3_non_vld..., hinic: rxq3_alloc_skb_err.
        r"rxq_?(\d+)_(?:alloc_skb_err|map_rx_buf_err|rx_buf_empty)",
    )
)
_DEVICES = re.compile(
    # ixgbe, i40e, mlx5, igb, e1000e, bnxt_en, ena.
    r"rx_no_dma_resources|rx_out_of_buffer|rx_no_buffer_count|rx_fifo_errors|rx_missed_errors"
    r"|rx_discards_phy|rx_steer_missed_packets|port\.rx_dropped|rx_dropped|rx_missed"
    r"|rx_discards|rx_drops|rx_overruns|rx_out_of_bufs?|rx_total_(?:discard_pkts|buf_errors)"
    r"|rx_prio\d+_discards|rx_buffer_overflow|hw_rx_drops",
    re.IGNORECASE,
)


def counter(name: str) -> Counter | None:
    """What a counter of that name tells; None: nothing about lost packets."""
    name = name.strip()
    if "xdp" in name.lower():
        return None
    for pattern in _QUEUES:
        told = pattern.fullmatch(name)
        if told:
            return Counter(int(told[1]))
    return Counter(None) if _DEVICES.fullmatch(name) else None
