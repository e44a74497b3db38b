"""Names of interrupts as drivers give them, in tables as kernels show them."""

from __future__ import annotations

import pytest

from stalld.enrich.interrupts import Vector, names_device, parse, vector

VIRTIO = """\
           CPU0       CPU1       
 24:          1          0  IO-APIC   5-edge      ACPI:Ged
 36:     147434      32608 PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0
 38:       9321       1482 PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0
 39:       7674          0 PCI-MSIX-0000:00:03.0   2-edge      virtio2-output.0
NMI:          0          0   Non-maskable interrupts
ERR:          0
MIS:          0
"""  # noqa: W291 - as the kernel writes it
IXGBE = """\
            CPU0       CPU1       CPU2       CPU3
  16:         30          0          0          0   IO-APIC  16-fasteoi   ehci_hcd:usb1, eth9
  77:   12345678          0          0          0  IR-PCI-MSI 524288-edge      eth0-TxRx-0
  78:          0   12345678          0          0  IR-PCI-MSI 524289-edge      eth0-TxRx-1
  81:          3          0          0          0  IR-PCI-MSI 524292-edge      eth0
"""
ARM = """\
           CPU0       CPU1
  1:   48871212   31999999     GICv3  27 Level     arch_timer
 45:      17000          0   ITS-MSI 524289 Edge      ens5-Tx-Rx-0
 46:          0      18000   ITS-MSI 524290 Edge      ens5-Tx-Rx-1
IPI0:    330000     340000       Rescheduling interrupts
"""


def test_virtio() -> None:
    """Only numbered ones, by the last word."""
    assert parse(VIRTIO) == {
        24: ("ACPI:Ged",),
        36: ("virtio1-req.0",),
        38: ("virtio2-input.0",),
        39: ("virtio2-output.0",),
    }


def test_shared() -> None:
    """Several handlers may share one."""
    assert parse(IXGBE) == {
        16: ("ehci_hcd:usb1", "eth9"),
        77: ("eth0-TxRx-0",),
        78: ("eth0-TxRx-1",),
        81: ("eth0",),
    }


def test_arm() -> None:
    """Another chip, another number of words."""
    assert parse(ARM) == {1: ("arch_timer",), 45: ("ens5-Tx-Rx-0",), 46: ("ens5-Tx-Rx-1",)}


@pytest.mark.parametrize("text", ["", "CPU0\n", "CPU0\n 1: 5\n", "CPU0 CPU1\n 1:\n", "x\ny: z"])
def test_nothing(text: str) -> None:
    """What is cut short or empty names nothing."""
    assert parse(text) == {}


RX = Vector
NAMES = [
    # driver, device, interrupt, what it brings
    ("igb", "eth0", "eth0-TxRx-3", RX(3)),
    ("igb", "eth0", "eth0-rx-1", RX(1)),
    ("igb", "eth0", "eth0-tx-1", None),
    ("e1000e", "eth0", "eth0-rx-0", RX(0)),
    ("e1000e", "eth0", "eth0-tx-0", None),
    ("e1000e", "eth0", "eth0", RX(None)),
    ("ixgbe", "enp3s0f1", "enp3s0f1-TxRx-63", RX(63)),
    ("i40e", "ens1f0", "i40e-ens1f0-TxRx-12", RX(12)),
    ("i40e", "ens1f0", "i40e-0000:3b:00.0:misc", None),
    ("ice", "ens1f0", "ice-ens1f0-TxRx-12", RX(12)),
    ("ice", "ens1f0", "ice-0000:b1:00.0:misc", None),
    ("iavf", "eth0", "iavf-eth0-TxRx-2", RX(2)),
    ("iavf", "eth0", "iavf-0000:00:02.0:mbx", None),
    ("ena", "ens5", "ens5-Tx-Rx-1", RX(1)),
    ("ena", "ens5", "ena-mgmnt@pci:0000:00:05.0", None),
    ("mlx5", "eth2", "mlx5_comp3@pci:0000:5e:00.0", RX(3)),
    ("mlx5", "eth2", "mlx5_async0@pci:0000:5e:00.0", None),
    ("mlx4", "eth2", "mlx4-3@0000:05:00.0", RX(2)),
    ("mlx4", "eth2", "mlx4-0@0000:05:00.0", None),
    ("virtio_net", "eth0", "virtio1-input.0", RX(0)),
    ("virtio_net", "eth0", "virtio1-output.0", None),
    ("virtio_net", "eth0", "virtio1-config", None),
    ("virtio_net", "eth0", "virtio1-control", None),
    ("bnxt_en", "eno1", "eno1-TxRx-7", RX(7)),
    ("bnxt_en", "eno1", "eno1-rx-7", RX(7)),
    ("bnx2x", "eth4", "eth4-fp-3", RX(3)),
    ("bnx2x", "eth4", "eth4-sp", None),
    ("qede", "ens2f0", "ens2f0-fp-1", RX(1)),
    ("tg3", "eth0", "eth0-txrx-1", RX(1)),
    ("tg3", "eth0", "eth0-rx-2", RX(2)),
    ("tg3", "eth0", "eth0-tx-0", None),
    ("vmxnet3", "ens192", "ens192-rxtx-1", RX(1)),
    ("vmxnet3", "ens192", "ens192-event-8", None),
    ("hns3", "eth0", "hns3-0000:7d:00.0-TxRx-4", RX(4)),
    ("hns3", "eth0", "hns3-0000:7d:00.0-misc", None),
    ("sfc", "eth3", "eth3-5", RX(5)),
    ("atlantic", "enp1s0", "enp1s0-2", RX(2)),
    ("ionic", "ens3", "ionic-ens3-4", RX(4)),
    ("xen-netfront", "eth0", "eth0-q1-rx", RX(1)),
    ("xen-netfront", "eth0", "eth0-q1-tx", None),
    ("cxgb4", "eth5", "eth5-Rx2", RX(2)),
    ("r8169", "enp2s0", "enp2s0", RX(None)),
    ("gve", "ens4", "gve-ntfy-blk7@pci:0000:00:04.0", RX(None)),
    ("gve", "ens4", "gve-mgmnt@pci:0000:00:04.0", None),
    ("mana", "eth0", "mana_q2@pci:7870:00:00.0", RX(1)),
    ("mana", "eth0", "mana_hwc@pci:7870:00:00.0", RX(None)),
    ("a device called tx", "tx", "tx-rx-0", RX(0)),
    ("a device called tx", "tx", "tx-TxRx-0", RX(0)),
    ("nobody knows", "eth0", "whatever", RX(None)),
]


@pytest.mark.parametrize(("driver", "device", "name", "wanted"), NAMES)
def test_names(driver: str, device: str, name: str, wanted: Vector | None) -> None:
    """Which queue's received packets it brings, none for sent ones and for events."""
    assert vector(name, device) == wanted


@pytest.mark.parametrize(
    ("name", "device", "told"),
    [
        ("eth0-TxRx-3", "eth0", True),
        ("i40e-eth0-TxRx-3", "eth0", True),
        ("eth0", "eth0", True),
        ("eth01-TxRx-3", "eth0", False),
        ("veth0-TxRx-3", "eth0", False),
        ("mlx5_comp3@pci:0000:5e:00.0", "eth0", False),
    ],
)
def test_names_device(name: str, device: str, told: bool) -> None:
    """As a word of its own, not as the beginning of another one's name."""
    assert names_device(name, device) is told
