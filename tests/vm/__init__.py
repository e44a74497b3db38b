"""Other kernels: each boots under QEMU with this machine's own files and runs the tests there.

``python -m tests.vm --help`` is what ``make test-vm`` calls; see README.md here.
"""
