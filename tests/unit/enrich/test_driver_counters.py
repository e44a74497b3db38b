"""Counters of drivers by their real names: which of them are lost packets, and whose."""

from __future__ import annotations

import pytest

from stalld.enrich.driver_counters import Counter, counter

NAMES = [
    ("igb", "rx_queue_3_drops", Counter(3)),
    ("igb", "rx_queue_3_alloc_failed", Counter(3)),
    ("igb", "rx_queue_3_packets", None),
    ("igb", "rx_queue_3_csum_err", None),
    ("igb", "rx_no_buffer_count", Counter(None)),
    ("virtio_net", "rx_queue_0_drops", Counter(0)),
    ("virtio_net", "rx_queue_0_xdp_drops", None),
    ("virtio_net", "rx0_drops", Counter(0)),
    ("virtio_net", "rx0_hw_drop_overruns", Counter(0)),
    ("mlx5", "rx3_buff_alloc_err", Counter(3)),
    ("mlx5", "rx3_xdp_drop", None),
    ("mlx5", "rx3_packets", None),
    ("mlx5", "rx_out_of_buffer", Counter(None)),
    ("mlx5", "rx_discards_phy", Counter(None)),
    ("mlx5", "tx_discards_phy", None),
    ("mlx4", "rx3_dropped", Counter(3)),
    ("some driver", "rx3_discards", Counter(3)),
    ("bnx2x", "[3]: rx_discards", Counter(3)),
    ("bnx2x", "[3]: rx_skb_alloc_discard", Counter(3)),
    ("bnxt_en", "[12]: rx_drops", Counter(12)),
    ("bnxt_en", "[12]: tx_drops", None),
    ("bnxt_en", "rx_total_discard_pkts", Counter(None)),
    ("ena", "queue_0_rx_skb_alloc_fail", Counter(0)),
    ("ena", "queue_0_rx_cnt", None),
    ("ena", "queue_0_tx_missed_tx", None),
    ("ena", "rx_drops", Counter(None)),
    ("ixgbe", "rx_no_dma_resources", Counter(None)),
    ("ixgbe", "rx_missed_errors", Counter(None)),
    ("i40e", "port.rx_dropped", Counter(None)),
    ("gve", "rx_no_buffers_posted[4]", Counter(4)),
    ("gve", "rx_dropped_pkt[4]", Counter(4)),
    ("gve", "rx_posted_desc[4]", None),
    ("hinic", "rxq2_rx_buf_empty", Counter(2)),
    ("mlx5, a page that is not used again", "rx0_cache_full", None),
    ("ena, a ring that is not filled at once", "queue_3_rx_refil_partial", None),
    ("anything", "tx_queue_3_drops", None),
    ("anything", "collisions", None),
    ("anything", "", None),
]


@pytest.mark.parametrize(("driver", "name", "wanted"), NAMES)
def test_names(driver: str, name: str, wanted: Counter | None) -> None:
    """Packets lost for want of room are meant, of one queue or of the device, nothing else."""
    assert counter(name) == wanted
