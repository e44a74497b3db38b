"""Compile, load and attach the BPF programs in a child that then exits.

Only this package imports bcc: an imported bcc maps LLVM (75 MB, 150 MB after a
compile), which the daemon must not keep. The child hands over descriptors, so
the programs stay attached exactly as long as the daemon holds them.
"""
